"""Texts that a model goes on with while it is trained: what a loss does not show.

RUN/samples.jsonl   one line a text: step, prompt (the beginning of a held-out text), text (what the model wrote after it)
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loralab.config.generation import Decoding
from loralab.data.sequence_packing import PackedSplit
from loralab.data.stop_sequences import truncate_at_stop
from loralab.engine import Engine
from loralab.errors import RecipeError

PROMPT_TOKENS = 32  # of a text, its start included; at most half of it
LINES_SHOWN, WIDTH = 12, 75  # of a text on the screen, and of one of its lines


@dataclass(frozen=True)
class TextSample:
    """The beginning of a text, and what the model wrote after it."""

    prompt: str
    text: str


def check_sample_length(max_new_tokens: int, positions: int | None) -> None:
    """Raises RecipeError where the beginning and what follows it are more than the model has positions."""
    if positions is not None and PROMPT_TOKENS + max_new_tokens > positions:
        raise RecipeError(
            f"validation.samples go on after up to {PROMPT_TOKENS} tokens of a text for evaluation.max_new_tokens {max_new_tokens}, "
            f"{PROMPT_TOKENS + max_new_tokens} in all, and the model has {positions} positions. "
            f"Set evaluation.max_new_tokens to {positions - PROMPT_TOKENS} or less."
        )


def beginnings(encoded: PackedSplit, count: int) -> list[list[int]]:
    """The first tokens of so many texts, spread evenly over all."""
    chosen = np.linspace(0, len(encoded.rows) - 1, min(count, len(encoded.rows))).round().astype(int)
    bounds = [(int(encoded.offsets[i]), int(encoded.offsets[i + 1])) for i in chosen]
    return [encoded.ids[start : start + min(PROMPT_TOKENS, (end - start) // 2)].tolist() for start, end in bounds]


def sample_texts(
    engine: Engine, encoded: PackedSplit, count: int, decoding: Decoding, on_done: Callable[[int], None]
) -> list[TextSample]:
    """So many texts' beginnings with what the model writes after each."""
    prompts = beginnings(encoded, count)
    answers = engine.generate(prompts, decoding, on_done)
    texts = (engine.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, answers))
    return [TextSample(prompt, truncate_at_stop(text, decoding.stop)) for prompt, text in zip(*texts, strict=True)]


def samples_in_words(written: Sequence[TextSample]) -> Iterator[str]:
    """For the screen: a bar stands where the model begins; long texts are cut."""
    for each in written:
        whole = f"{each.prompt}▌{each.text}".splitlines()
        lines = [part for line in whole for part in textwrap.wrap(line, WIDTH, drop_whitespace=False) or [""]]
        yield from ("  | " + line for line in lines[:LINES_SHOWN])
        yield "  …" if len(lines) > LINES_SHOWN else "  -"
