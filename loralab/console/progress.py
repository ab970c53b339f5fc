"""Progress of long work, on stderr: one line that renews itself on a terminal and in a notebook, else a line now and then."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TextIO

EVERY_TERMINAL, EVERY_FILE = 0.2, 15.0  # seconds between two lines


def say(text: str) -> None:
    """Plain news; on a terminal sentences are wrapped between words, tables and lists (two spaces) are left as they are."""
    if is_terminal(sys.stderr):
        text = "\n".join(line if "  " in line else wrapped(line) for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)


def wrapped(line: str) -> str:
    """The line in parts that the terminal has room for, the later ones indented."""
    parts = textwrap.wrap(line, columns() + 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts)


def is_terminal(stream: TextIO) -> bool:
    """Tells whether a line can be written over: a carriage return does so on a terminal, and in a notebook's cell."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")


class Progress:
    """`total` units of work under a label, with the time left."""

    def __init__(
        self, label: str, total: int, stream: TextIO | None = None, done: int = 0, transient: bool = False
    ) -> None:
        """`done`: units that an earlier life of the run has done. `transient`: its end is no news, the line is to be written over."""
        self.label, self.total, self.stream, self.begun = label, total, stream or sys.stderr, done
        self.terminal, self.transient = is_terminal(self.stream), transient
        self.started = self.shown = time.monotonic()

    def update(self, done: int, *notes: str) -> None:
        """Says that `done` units are done, if it is time to say something."""
        now, final = time.monotonic(), done >= self.total and not self.transient
        if not final and now - self.shown < (EVERY_TERMINAL if self.terminal else EVERY_FILE):
            return
        self.shown = now
        elapsed = now - self.started
        left = elapsed / max(done - self.begun, 1) * (self.total - done)
        ending = f"in {clock(elapsed)}" if final else f"{clock(left)} left"
        self._show(fit_line([f"{self.label} {done}/{self.total}", *notes, ending], columns()), renew=not final)

    def say(self, text: str) -> None:
        """One line of plain news, in the place of the line that renews itself."""
        self._show(text, renew=False)

    def _show(self, line: str, renew: bool) -> None:
        if self.terminal:
            self.stream.write("\r" + line.ljust(columns()) + ("" if renew else "\n"))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def columns() -> int:
    """Returns what a line may take, so that it does not run over into the next one; 79 where there is no terminal."""
    return shutil.get_terminal_size().columns - 1


def fit_line(parts: Sequence[str], width: int) -> str:
    """The parts in one line: two spaces between them, or one where that is too long, then without the last but one."""
    for line in ("  ".join(parts), " ".join(parts), " ".join([*parts[:-2], *parts[-1:]])):
        if len(line) <= width:
            return line
    return line[:width]


def clock(seconds: float) -> str:
    """1:05 or 2:03:20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
