"""`loralab plan`: what a recipe will cost, before anything is downloaded, and whether it fits.

Sizes are published ones, or a config file's; lengths are the recipe's. Products and memory are predicted by the forward
and backward pass on shapes alone (cost/), for the largest batch: every row as long as it may be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from loralab.config.data import ExpectedData
from loralab.config.recipe import Recipe
from loralab.cost.base import Base, Unknown, find_base
from loralab.cost.model import Shape
from loralab.cost.step import Run, StepCost
from loralab.cost.variant import PRECISIONS, Sizes, cost_of, forward_flops, run_of, shape_of, sizes_of, trained_by
from loralab.data.splits import StreamedSplit, index_split
from loralab.engine import measure, trace
from loralab.errors import RecipeError
from loralab.models.checkpoint_files import load_tokenizer
from loralab.planning.memory_advice import NO_BUDGET, remedy
from loralab.runs.environment import Machine, this_machine

LABELS = 2  # of a classifier whose recipe does not name them


@dataclass(frozen=True)
class PlanOptions:
    """What is asked beside the recipe."""

    measure: bool = False
    price_per_hour: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Lengths:
    """What is known of the rows."""

    source: int
    target: int
    rows: int | None
    """For training; None where nobody says."""
    notes: tuple[str, ...] = ()


def plan(recipe: Recipe, question: PlanOptions = PlanOptions(), machine: Machine | None = None) -> dict[str, Any]:
    """What `loralab plan --json` prints.

    Raises:
        RecipeError: a length is a percentile of data that is not at hand, or a price has no time to go by.
        ModelError: nobody knows the model's sizes.
    """
    if question.price_per_hour is not None and not (question.measure or question.tokens_per_second):
        raise RecipeError("--price-per-hour needs a time: add --measure, or --tokens-per-second from an earlier run.")
    machine = machine or this_machine(recipe.model.device)
    recipes = {name: recipe.variant(name) for name in recipe.variants} or {recipe.name: recipe}
    lengths = {name: lengths_of(each) for name, each in recipes.items()}
    rows = [_row(name, each, lengths[name], machine, question) for name, each in recipes.items()]
    notes = dict.fromkeys(note for each in lengths.values() for note in each.notes)
    notes |= dict.fromkeys(note for row in rows for note in row.pop("notes"))
    return {
        "name": recipe.name,
        "machine": {**asdict(machine), "room": machine.room},
        "variants": rows,
        "notes": list(notes),
        "published": recipe.published,
    }


# What is known of the rows


def lengths_of(recipe: Recipe) -> Lengths:
    """From the recipe; from the data where it is on this machine, for percentiles with the tokenizer that is needed; else from
    data.expected."""
    data, expected = recipe.data, recipe.data.expected or ExpectedData()
    settings: dict[str, int | str] = {
        "source": data.max_source_length,
        "target": 0 if data.label is not None else data.max_target_length,
    }
    rows, notes, known = (
        expected.train_rows,
        list[str](),
        {"source": expected.source_length, "target": expected.target_length},
    )
    if Path(data.name).exists():
        training = index_split(data, "train")
        rows = len(training)
        if any(isinstance(each, str) for each in settings.values()) and Path(recipe.model.name).is_dir():
            known = dict(zip(settings, _percentiles(recipe, training, settings), strict=True))
            expected = ExpectedData()
    found = {side: _length(setting, known[side], side) for side, setting in settings.items()}
    if recipe.data.expected is not None and expected == recipe.data.expected and not Path(data.name).exists():
        taken = [f"{settings[side]} taken as {found[side]} tokens" for side in found if isinstance(settings[side], str)]
        taken += [f"{rows:,} training rows"] if rows is not None else []
        notes.append(f"{data.name} is not at hand: {', '.join(taken)}, as data.expected says")
    if rows is not None and data.max_train_rows is not None:
        rows = min(rows, data.max_train_rows)
    if recipe.mixture:
        notes.append("the further data of the mixture are not counted in the whole run")
    return Lengths(found["source"], found["target"], rows, tuple(notes))


def _length(setting: int | str, known: int | None, side: str) -> int:
    if isinstance(setting, int):
        return setting
    if known is None:
        raise RecipeError(
            f"data.max_{side}_length is {setting}, a percentile of data that is not at hand together with a tokenizer. Give a "
            f"number of tokens, data.max_{side}_length=256, or what is known of the data, data.expected.{side}_length=256."
        )
    return known


def _percentiles(recipe: Recipe, training: StreamedSplit, settings: dict[str, int | str]) -> tuple[int, int]:
    """Both lengths, from the rows themselves."""
    from loralab.data.lengths import resolve_lengths

    tokenizer = load_tokenizer(Path(recipe.model.name))
    return resolve_lengths(training, tokenizer, settings["source"], settings["target"])


# One variant


def _row(name: str, recipe: Recipe, lengths: Lengths, machine: Machine, question: PlanOptions) -> dict[str, Any]:
    classes = None if recipe.data.label is None else len(recipe.data.labels) or LABELS
    itemsize, dtype_note = itemsize_of(recipe, machine)
    try:
        base = find_base(recipe.model, classes)
    except Unknown as unknown:
        return _unknown(name, recipe, unknown, lengths, itemsize, machine, dtype_note)
    trained = trained_by(recipe, base)
    sizes, run = sizes_of(base, trained, itemsize), run_of(recipe, base, itemsize, machine.kind == "cpu")
    shape = shape_of(recipe, base, _within(base, lengths))
    cost = cost_of(recipe, base, trained, run, [shape] * run.accumulate)
    steps, whole = _whole_run(recipe, base, run, shape, cost, lengths.rows)
    row = _facts(name, recipe.training.method, sizes) | {
        "batch": asdict(shape) | {"accumulate": run.accumulate},
        "dtype": next(key for key, size in PRECISIONS.items() if size == itemsize),
        "flops_per_step": cost.flops,
        "steps": steps,
        "flops": whole,
        "memory_bytes": {key: value for key, value in asdict(cost).items() if key != "flops"},
        **_fit(recipe, base, run, shape, cost, machine),
    }
    row["notes"] = [f"{recipe.model.name}: {base.origin}", *dtype_note]
    if recipe.training.method == "lora":
        row["saves"] = _saves(recipe, base, run, shape, cost)
    if question.measure and recipe.training.method != "none":
        row["measured"] = asdict(measure(recipe, base, run, shape, machine.kind, row["dtype"]))
    return row | _money(row, lengths, recipe, question)


def _facts(name: str, method: str, sizes: Sizes) -> dict[str, Any]:
    return {
        "variant": name,
        "method": method,
        "trainable": sizes.trainable,
        "total": sizes.total,
        "trainable_percent": 100 * sizes.trainable / sizes.total,
        "adapter_bytes": sizes.saved_bytes,
        "values_bytes": sizes.values_bytes,
        "base_bytes": sizes.base_bytes,
    }


def itemsize_of(recipe: Recipe, machine: Machine) -> tuple[int, list[str]]:
    """Bytes of an element in the recipe's dtype; auto is settled by what the machine can, and a run will try it."""
    if recipe.model.dtype != "auto":
        return PRECISIONS[recipe.model.dtype], []
    dtype = "bfloat16" if machine.bfloat16 else "float32"
    return PRECISIONS[dtype], [f"model.dtype auto is taken as {dtype} here; a run tries which is faster"]


def _within(base: Base, lengths: Lengths) -> tuple[int, int]:
    """No longer than an encoder's positions."""
    positions = [module.shape[0] for module in base.modules if module.name.endswith("position_embeddings")]
    return min([lengths.source, *positions]), lengths.target


def _whole_run(
    recipe: Recipe, base: Base, run: Run, shape: Shape, cost: StepCost, rows: int | None
) -> tuple[int | None, int | None]:
    """(steps, operations) of all epochs, as if every row were as long as it may be."""
    training = recipe.training
    if rows is None or training.method == "none":
        return None, None
    steps = ceil(ceil(rows / shape.rows) / training.accumulate) * training.epochs
    flops = cost.flops * steps
    if training.method == "head" and not training.frozen_dropout and base.head_forward is not None:
        flops += forward_flops(base, run, shape) * ceil(rows / shape.rows)  # the frozen part, once
    return steps, flops


def _fit(recipe: Recipe, base: Base, run: Run, shape: Shape, cost: StepCost, machine: Machine) -> dict[str, Any]:
    if not machine.memory:
        return {"fits": None, "remedy": None}
    if cost.peak <= machine.room:
        return {"fits": True, "remedy": None}
    trained, method = trained_by(recipe, base), recipe.training.method

    def peak_of(run: Run, shape: Shape) -> int:
        return cost_of(recipe, base, trained, run, [shape] * min(run.accumulate, 2)).peak

    found = remedy(run, shape, machine.room, method != "full", peak_of)
    if found is not None and recipe.training.tokens_per_batch is None:
        found = replace(found, overrides=tuple(each for each in found.overrides if each != NO_BUDGET))
    return {"fits": False, "remedy": None if found is None else asdict(found)}


def _saves(recipe: Recipe, base: Base, run: Run, shape: Shape, cost: StepCost) -> dict[str, Any]:
    """What LoRA saves against the training of all weights, on the same batch, in shares."""
    training = recipe.training.model_copy(update={"method": "full"})
    full = recipe.model_copy(update={"training": training})
    other = cost_of(full, base, trained_by(full, base), replace(run, quantize=None), [shape] * run.accumulate)
    return {"memory": 1 - cost.peak / other.peak, "flops": 1 - cost.flops / other.flops}


def _money(row: dict[str, Any], lengths: Lengths, recipe: Recipe, question: PlanOptions) -> dict[str, Any]:
    """Hours and price of the whole run, once a time is known."""
    if not row.get("steps"):
        return {}
    if question.tokens_per_second:
        tokens = (lengths.source + lengths.target) * (lengths.rows or 0) * recipe.training.epochs
        hours = tokens / question.tokens_per_second / 3600
    elif "measured" in row:
        hours = row["steps"] * row["measured"]["seconds"] / 3600
    else:
        return {}
    return {"hours": hours} | ({} if question.price_per_hour is None else {"price": hours * question.price_per_hour})


def _unknown(
    name: str, recipe: Recipe, unknown: Unknown, lengths: Lengths, itemsize: int, machine: Machine, notes: list[str]
) -> dict[str, Any]:
    """Any other architecture: its class, built without numbers by the engine."""
    dtype = next(key for key, size in PRECISIONS.items() if size == itemsize)
    source, target = lengths.source, 0 if recipe.data.label is not None else lengths.target
    rows = recipe.training.batch_size or max(1, (recipe.training.token_budget or 0) // (source + max(target, 1)))
    labels = None if recipe.data.label is None else len(recipe.data.labels) or LABELS
    found = trace(recipe, unknown.file, rows, (source, target), dtype, labels)
    kept = found.total - found.linear
    base_bytes = {
        **{key: size * found.total for key, size in PRECISIONS.items()},
        "int8": 2 * kept + found.linear,
        "nf4": 2 * kept + found.linear * 9 // 16,
    }
    full = recipe.training.method == "full"
    values = found.trainable * (itemsize if full else 4)
    sizes = Sizes(found.trainable, found.total, values, values, base_bytes)
    failed = found.flops is None
    steps = None
    if lengths.rows is not None and recipe.training.method != "none":
        steps = ceil(ceil(lengths.rows / rows) / recipe.training.accumulate) * recipe.training.epochs
    parts = {
        "weights": found.weights, "adapter": 0, "gradients": values, "optimizer": 2 * 4 * found.trainable,
        "activations": found.activations, "logits": 0, "peak": 0 if failed else found.peak,
    }  # fmt: skip
    said = [f"{unknown.file}: Transformers' class, built without numbers"]
    if failed:
        said.append(f"its step cannot be run without numbers ({found.failure}): counts alone are known")
    return _facts(name, recipe.training.method, sizes) | {
        "batch": {"rows": rows, "source": source, "target": target, "accumulate": recipe.training.accumulate},
        "dtype": dtype,
        "flops_per_step": None if failed else found.flops * recipe.training.accumulate,
        "steps": steps,
        "flops": None if failed or steps is None else found.flops * recipe.training.accumulate * steps,
        "memory_bytes": parts,
        "fits": None if failed or not machine.memory else found.peak <= machine.room,
        "remedy": None,
        "notes": [*said, *notes],
    }
