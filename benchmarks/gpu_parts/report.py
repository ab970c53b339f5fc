"""A part's results, on disk as soon as each is there, and the time that the part has."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class OutOfTime(Exception):
    """The part's time is spent, or what is left is too little for what comes next."""


class CannotRun(Exception):
    """The part needs something that is not here; the message says what."""


class Report:
    """`PART.json` in a folder: status, reason, results so far."""

    def __init__(self, part: str, folder: Path, seconds: float, machine: dict[str, Any]) -> None:
        self.file, self.seconds = folder / f"{part}.json", seconds
        self.begun = time.monotonic()
        self.results: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {"part": part, "budget_seconds": seconds, "machine": machine}
        folder.mkdir(parents=True, exist_ok=True)
        self._write("running", "")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.begun)

    def add(self, name: str, **values: Any) -> None:
        """One result: kept, written, printed."""
        self.results.append({"name": name, **values})
        self._write("running", "")
        print(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in values.items()), flush=True)

    def check(self, name: str, value: float, limit: float) -> None:
        """One result that must not exceed its limit."""
        self.add(name, passed=value <= limit, value=value, limit=limit)

    @property
    def failed(self) -> list[str]:
        """The checks that did not pass."""
        return [str(result["name"]) for result in self.results if result.get("passed") is False]

    @contextmanager
    def unit(self, name: str, seconds: float) -> Iterator[None]:
        """A piece of work that is likely to take so long; what does not fit into a memory is a result too.

        Raises:
            OutOfTime: less is left.
        """
        if self.left < seconds:
            raise OutOfTime(f"{name} may take {seconds:.0f} s, and {max(self.left, 0):.0f} s are left")
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.add(name, reason=str(error).splitlines()[0])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self, status: str, reason: str = "") -> None:
        """The last state: done, failed, stopped, or cannot run."""
        self._write(status, reason)
        print(f"{self.about['part']}: {status}{f' ({reason})' if reason else ''}; {self.file}", flush=True)

    def _write(self, status: str, reason: str) -> None:
        state = {**self.about, "status": status, "reason": reason, "seconds": time.monotonic() - self.begun}
        beside = self.file.with_suffix(".part")
        beside.write_text(json.dumps(state | {"results": self.results}, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.file)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
