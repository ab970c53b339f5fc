"""Checks that a step fits into a machine's memory; where it does not, finds the cheapest change to the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loralab.engine import BatchShape, StepSettings

Change = tuple[StepSettings, BatchShape]

NO_BUDGET = "training.tokens_per_batch=null"  # where a recipe counts tokens, and now rows


@dataclass(frozen=True)
class Remedy:
    """A changed recipe that fits."""

    overrides: tuple[str, ...]
    """To be typed after the recipe's name."""
    peak: int


def remedy(
    settings: StepSettings,
    shape: BatchShape,
    room: int,
    quantizable: bool,
    peak_of: Callable[[StepSettings, BatchShape], int],
) -> Remedy | None:
    """Returns the first change that fits, of those below in their order; None where none does.

    Args:
        room: bytes for tensors.
        quantizable: the base is frozen and not quantised yet.
        peak_of: what a step takes at most.
    """
    for series in _changes(settings, shape, quantizable):
        if not series or peak_of(*series[-1]) > room:  # not even the shortest batch
            continue
        changed, rows = next(each for each in series if peak_of(*each) <= room)
        return Remedy(tuple(overrides(settings, shape, changed, rows)), peak_of(changed, rows))
    return None


def _changes(settings: StepSettings, shape: BatchShape, quantizable: bool) -> Iterator[list[Change]]:
    """Yields series of changes, each series from the longest batch to the shortest.

    From cheap to dear: bf16 costs digits; shorter batches some speed, for the same updates; checkpointing a third more
    time; int8 and nf4 digits of the base. Each alone, then each on top of those before it.
    """
    bf16 = [replace(settings, dtype="bfloat16")] if settings.dtype == "float32" else []
    packed = ["int8", "nf4"] if quantizable and settings.quantize is None else []
    yield from ([(each, shape)] for each in bf16)
    yield list(_shorter(settings, shape))
    if not settings.checkpointing:
        yield [(replace(settings, checkpointing=True), shape)]
    yield from ([(replace(settings, quantize=each), shape)] for each in packed)
    for best in bf16:
        yield list(_shorter(best, shape))
    least = replace(settings, dtype="bfloat16")
    one, short = max(_shorter(least, shape), key=lambda change: change[0].accumulate, default=(least, shape))
    yield [(replace(one, checkpointing=True), short)]
    for each in packed:
        yield list(_shorter(replace(least, quantize=each), shape))
        yield [(replace(one, checkpointing=True, quantize=each), short)]


def _shorter(settings: StepSettings, shape: BatchShape) -> Iterator[Change]:
    """A half of the rows, a quarter, …, each with as many batches more a step."""
    rows, accumulate = shape.rows, settings.accumulate
    while rows > 1:
        rows, accumulate = (rows + 1) // 2, accumulate * 2
        tokens = shape.target_tokens * rows // shape.rows
        yield (
            replace(settings, accumulate=accumulate),
            replace(shape, rows=rows, padded=shape.padded and rows > 1, target_tokens=tokens),
        )


def overrides(settings: StepSettings, shape: BatchShape, changed: StepSettings, rows: BatchShape) -> Iterator[str]:
    """Returns what to type for a change."""
    if changed.dtype != settings.dtype:
        yield "model.dtype=bfloat16"
    if rows.rows != shape.rows:
        yield f"training.batch_size={rows.rows}"
        yield NO_BUDGET
        yield f"training.accumulate={changed.accumulate}"
    if changed.checkpointing and not settings.checkpointing:
        yield "training.gradient_checkpointing=true"
    if changed.quantize and not settings.quantize:
        yield f"model.quantize={changed.quantize}"
