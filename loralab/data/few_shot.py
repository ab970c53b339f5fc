"""Worked examples before a row: few-shot prompting, which needs no training.

With two of them a row whose prompt is "Q: {question}\\nA: " reads

    Q: <the source of a training row>
    A: <its first reference>

    Q: <the source of another>
    A: <its first reference>

    Q: <the row's own source>
    A:

Where a prompt does not end in white space, the reference stands on a line of its own. In a chat the examples are earlier
turns, after the row's own system message. A row gets as many of the examples drawn for it as fit whole beside it.

Brown et al. 2020, "Language Models are Few-Shot Learners", https://arxiv.org/abs/2005.14165
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.console.progress import Progress
from loralab.data.chat_template import Chat
from loralab.data.prompts import Prompt
from loralab.data.rows import Example
from loralab.data.splits import AnySplit
from loralab.errors import DataError


@dataclass(frozen=True)
class Shots:
    """The worked examples before each row."""

    wanted: int
    """Examples a row, as the recipe says."""
    within: int
    """The tokens that a row may have, its examples included."""
    rows: tuple[tuple[int, ...], ...]
    """[rows]: the numbers of the training rows, in the order in which they stand."""

    def as_json(self) -> dict[str, Any]:
        """For a record: how many rows got so many examples."""
        counts = Counter(map(len, self.rows))
        numbers = range(self.wanted, -1, -1)
        return {
            "wanted": self.wanted,
            "within": self.within,
            "rows": {str(number): counts[number] for number in numbers},
        }


def shots_in_words(told: Mapping[str, Any]) -> str:
    """ "worked examples of training rows: 1 before 310 rows, none before 190 rows, as more ..." of what `as_json` gave."""
    counts = {int(number): count for number, count in told["rows"].items() if count}
    parts = [f"{number or 'none'} before {count:,} row{'s' * (count != 1)}" for number, count in counts.items()]
    limit = f", as more would not fit whole into {told['within']:,} tokens (data.max_source_length)"
    return f"worked examples of training rows: {', '.join(parts)}{limit if min(counts) < told['wanted'] else ''}"


def draw_shots(
    rows: Sequence[tuple[int, str]], avoid: NDArray[np.uint64], training: AnySplit, count: int, seed: int
) -> list[list[Example]]:
    """[rows][count]: training rows of different sources for each row, by chance.

    The draws are a function of the seed and the row's number; rows of one source share those of the first.

    Args:
        rows: (number in its file, source).
        avoid: hashes of sources that are no examples: those of the rows themselves, and of all that are scored with them.

    Raises:
        DataError: the training rows have too few other sources.
    """
    hashes, avoided = training.source_hashes, set(avoid.tolist())
    if (others := len(np.setdiff1d(hashes, avoid))) < count:
        raise DataError(
            f"evaluation.shots is {count}, and {training.name}, {training.split} has {others} different sources beside those "
            "that are asked. Lower evaluation.shots, or give more training rows."
        )
    first: dict[str, int] = {}
    numbers = [first.setdefault(source, number) for number, source in rows]
    places = [_draw(hashes, avoided, count, np.random.default_rng([seed, number])) for number in numbers]
    needed = set(chain.from_iterable(places))
    examples = {place: example for place, example in enumerate(training) if place in needed}
    return [[examples[place] for place in some] for some in places]


def _draw(hashes: NDArray[np.uint64], avoided: set[int], count: int, coins: np.random.Generator) -> list[int]:
    """Places of training rows. One at a time, so that a source more to avoid changes the draws of few rows."""
    chosen: dict[int, int] = {}
    while len(chosen) < count:
        place = int(coins.integers(len(hashes)))
        if (source := int(hashes[place])) not in avoided:
            chosen.setdefault(source, place)
    return list(chosen.values())


def with_shots(
    ids: Sequence[list[int]],
    sources: Sequence[str],
    drawn: Sequence[Sequence[Example]],
    prompt: Prompt | Chat,
    ask: Callable[[str], list[int]],
    max_length: int,
) -> tuple[list[list[int]], Shots]:
    """Each row's tokens with its examples before them, and which those are.

    Args:
        ids: [rows] tokens without examples, which a row keeps where none fits.
        ask: the tokens of a source in its prompt, of any length.
        max_length: in tokens.
    """
    rows, shots, progress = list(ids), [], Progress("examples", len(ids))
    for row, (source, examples) in enumerate(zip(sources, drawn, strict=True)):
        rows[row], used = _fitted(rows[row], source, examples, prompt, ask, max_length)
        shots.append(tuple(example.row for example in used))
        progress.update(row + 1)
    return rows, Shots(max(map(len, drawn), default=0), max_length, tuple(shots))


def _fitted(
    alone: list[int],
    source: str,
    examples: Sequence[Example],
    prompt: Prompt | Chat,
    ask: Callable[[str], list[int]],
    max_length: int,
) -> tuple[list[int], Sequence[Example]]:
    """(tokens of a row after as many of its examples as fit, these): the longest is left out first."""

    def after(some: Sequence[Example]) -> list[int]:
        return ask(prompt.with_examples([(example.source, example.targets[0]) for example in some], source))

    kept = list(examples)
    while kept:
        ids = after(kept)
        if len(ids) <= max_length:
            return ids, kept
        kept.remove(max(kept, key=lambda example: len(after([example]))))
    return alone, []
