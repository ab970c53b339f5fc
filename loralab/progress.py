"""Progress of long work, on stderr: one line that renews itself on a terminal, a line now and then in a file or pipe."""

from __future__ import annotations

import sys
import time
from typing import TextIO

EVERY_TERMINAL, EVERY_FILE = 0.2, 15.0  # seconds between two lines


def say(text: str) -> None:
    """One line of plain news."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """`total` units of work under a label, with the time left."""

    def __init__(self, label: str, total: int, stream: TextIO | None = None, done: int = 0) -> None:
        """`done`: units that an earlier life of the run has done."""
        self.label, self.total, self.stream, self.begun = label, total, stream or sys.stderr, done
        self.terminal = self.stream.isatty()
        self.started = self.shown = time.monotonic()
        self.width = 0

    def update(self, done: int, note: str = "") -> None:
        """Says that `done` units are done, if it is time to say something."""
        now = time.monotonic()
        if done < self.total and now - self.shown < (EVERY_TERMINAL if self.terminal else EVERY_FILE):
            return
        self.shown = now
        elapsed = now - self.started
        left = elapsed / max(done - self.begun, 1) * (self.total - done)
        ending = f"{clock(left)} left" if done < self.total else f"in {clock(elapsed)}"
        self._show(f"{self.label}  {done}/{self.total}  {note}{'  ' if note else ''}{ending}", final=done >= self.total)

    def _show(self, line: str, final: bool) -> None:
        if self.terminal:
            self.stream.write("\r" + line.ljust(self.width) + ("\n" if final else ""))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """1:05 or 2:03:20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
