"""Whether a step fits into a machine's memory; and where it does not, the cheapest change to the recipe by which it would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from loralab.cost.model import Shape
from loralab.cost.step import Run

Change = tuple[Run, Shape]

NO_BUDGET = "training.tokens_per_batch=null"  # where a recipe counts tokens, and now rows


@dataclass(frozen=True)
class Remedy:
    """A changed recipe that fits."""

    overrides: tuple[str, ...]
    """To be typed after the recipe's name."""
    peak: int


def remedy(run: Run, shape: Shape, room: int, quantizable: bool, peak_of: Callable[[Run, Shape], int]) -> Remedy | None:
    """The first change that fits, of those below in their order; None where none does.

    Args:
        room: bytes for tensors.
        quantizable: whether the base is frozen and not quantised yet.
        peak_of: what a step takes at most.
    """
    for changed, rows in _changes(run, shape, quantizable):
        peak = peak_of(changed, rows)
        if peak <= room:
            return Remedy(tuple(overrides(run, shape, changed, rows)), peak)
    return None


def _changes(run: Run, shape: Shape, quantizable: bool) -> Iterator[Change]:
    """From cheap to dear: bf16 costs digits; shorter batches some speed, for the same updates; checkpointing a third more
    time; int8 and nf4 digits of the base. Each alone, then each on top of those before it."""
    bf16 = [replace(run, itemsize=2)] if run.itemsize == 4 else []
    again = [] if run.checkpointing else [True]
    packed = ["int8", "nf4"] if quantizable and run.quantize is None else []
    yield from ((each, shape) for each in bf16)
    yield from _shorter(run, shape)
    yield from ((replace(run, checkpointing=True), shape) for _ in again)
    yield from ((replace(run, quantize=each), shape) for each in packed)
    for best in bf16:
        yield from _shorter(best, shape)
    least = replace(run, itemsize=2)
    one, short = max(_shorter(least, shape), key=lambda change: change[0].accumulate, default=(least, shape))
    yield replace(one, checkpointing=True), short
    for each in packed:
        yield from _shorter(replace(least, quantize=each), shape)
        yield replace(one, checkpointing=True, quantize=each), short


def _shorter(run: Run, shape: Shape) -> Iterator[Change]:
    """A half of the rows, a quarter, …, each with as many batches more a step."""
    rows, accumulate = shape.rows, run.accumulate
    while rows > 1:
        rows, accumulate = (rows + 1) // 2, accumulate * 2
        tokens = shape.target_tokens * rows // shape.rows
        yield (
            replace(run, accumulate=accumulate),
            replace(shape, rows=rows, padded=shape.padded and rows > 1, target_tokens=tokens),
        )


def overrides(run: Run, shape: Shape, changed: Run, rows: Shape) -> Iterator[str]:
    """What to type for a change."""
    if changed.itemsize != run.itemsize:
        yield "model.dtype=bfloat16"
    if rows.rows != shape.rows:
        yield f"training.batch_size={rows.rows}"
        yield NO_BUDGET
        yield f"training.accumulate={changed.accumulate}"
    if changed.checkpointing and not run.checkpointing:
        yield "training.gradient_checkpointing=true"
    if changed.quantize and not run.quantize:
        yield f"model.quantize={changed.quantize}"
