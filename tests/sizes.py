"""Sizes of the long tests: a sample in `make test`, the whole in `make long`."""

from __future__ import annotations

import os

LONG = os.environ.get("LORALAB_LONG") == "1"


def sized(whole: int, sample: int) -> int:
    """Returns the number of steps, rows or variants that a test takes in this run."""
    return whole if LONG else sample
