"""A learning rate found on rows that are not reported: a short training at each of five rates, all from one start.

Methods are then compared each at its own best rate; a rate that suits one of them favours it. The loss is measured on
the rows that choose (validation.py). Where the best rate is the lowest or the highest one tried, the
next one is tried too: an edge is no optimum.

    RUN/pilot.json   the points, as they come: a pilot that was stopped goes on with the next
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_json
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.batches import Rows
from loralab.data.encoded import Trained
from loralab.engine import Engine
from loralab.runs.folder import PILOT
from loralab.runs.record import read_json
from loralab.training.loop import plan_steps
from loralab.training.lr_schedule import rate_at
from loralab.training.validation import Validator

RATES = {
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "head": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
}
SHARE, LEAST = 0.1, 30  # of the run's steps; and no fewer than so many, where it has them
FURTHER = 2  # more rates at most, beyond an edge

Points = dict[float, float | None]  # learning rate -> loss; None where it was not finite


def find_rate(engine: Engine, recipe: Recipe, encoded: Trained, validator: Validator, run: Path) -> dict[str, Any]:
    """{"chosen": the rate of the lowest loss, "steps", "points"}; the engine is left as it came."""
    steps = plan_steps(recipe, encoded)
    steps = steps[: max(LEAST, math.ceil(SHARE * len(steps)))]
    points = _known(run / PILOT)
    with tempfile.TemporaryDirectory(dir=run) as scratch:
        start = Path(scratch) / "start.safetensors"
        engine.save_state(start)
        while (rate := next_rate(points, recipe.training.method)) is not None:
            points[rate] = _try(engine, recipe, rate, steps, encoded, validator)
            engine.load_state(start)
            write_json(run / PILOT, _summary(points, len(steps)))
    say(f"Learning rate {best(points):g}, the best of {len(points)} after {len(steps)} steps each:\n{table(points)}")
    return _summary(points, len(steps))


def next_rate(points: Points, method: str) -> float | None:
    """The next one to try; None where the best has a worse neighbour on either side, or enough were tried."""
    planned = RATES[method]
    for rate in planned:
        if rate not in points:
            return rate
    if len(points) >= len(planned) + FURTHER:
        return None
    if best(points) == max(points):
        return further(max(points), up=True)
    return further(min(points), up=False) if best(points) == min(points) else None


def further(rate: float, up: bool) -> float:
    """The neighbour in …, 1e-4, 3e-4, 1e-3, 3e-3, …"""
    half_decades = round(2 * math.log10(rate)) + (1 if up else -1)
    exponent, odd = divmod(half_decades, 2)
    return float(f"{3 if odd else 1}e{exponent}")


def best(points: Points) -> float:
    """The rate of the lowest loss."""
    return min(points, key=lambda rate: _or_infinity(points[rate]))


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss


def table(points: Points) -> str:
    """One line a rate."""
    chosen = best(points)
    return "\n".join(
        f"  {rate:<8g} {'not finite' if loss is None else f'loss {loss:.4f}'}{'  <-' if rate == chosen else ''}"
        for rate, loss in sorted(points.items())
    )


def _try(
    engine: Engine,
    recipe: Recipe,
    rate: float,
    steps: list[list[Rows]],
    encoded: Trained,
    validator: Validator,
) -> float | None:
    """A short training at this rate, with a schedule of its own that ends with it, and its loss."""
    settings = recipe.optimizer.model_copy(update={"learning_rate": rate})
    progress = Progress(f"pilot {rate:g}", len(steps))
    for number, rows in enumerate(steps):
        batches = [encoded.collate(each, engine.pad_id) for each in rows]
        if not math.isfinite(engine.train_step(batches, rate_at(number, len(steps), settings)).loss):
            return None
        progress.update(number + 1)
    return validator.loss(engine)


def _known(file: Path) -> Points:
    if not file.exists():
        return {}
    return {point["learning_rate"]: point["loss"] for point in read_json(file)["points"]}


def _summary(points: Points, steps: int) -> dict[str, Any]:
    listed = [{"learning_rate": rate, "loss": loss} for rate, loss in sorted(points.items())]
    return {"steps": steps, "chosen": best(points), "points": listed}
