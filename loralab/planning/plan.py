"""`loralab plan`: what a recipe will cost, before anything is downloaded, and whether it fits.

Sizes are published ones, or a config file's; lengths are the recipe's. Products and memory are those of the real model's
forward and backward pass, run without numbers (on_torch/profiling/traced_model.py) for the largest batch: every row as long
as it may be.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from loralab.config.data import ExpectedData
from loralab.config.recipe import Recipe
from loralab.data.splits import StreamedSplit, index_split
from loralab.engine import BatchShape, CannotTrace, ModelFacts, StepCost, StepSettings, TracedModel, measure, trace
from loralab.errors import RecipeError
from loralab.models.checkpoint_files import load_tokenizer
from loralab.models.lookup import Base, find_base
from loralab.planning.memory_advice import NO_BUDGET, remedy
from loralab.planning.sizes import Sizes, sizes_of
from loralab.runs.environment import Machine, this_machine
from loralab.tasks import task_of

LABELS = 2  # of a classifier whose recipe does not name them


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan, beside the recipe."""

    measure: bool = False
    price_per_hour: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Lengths:
    """Lengths and number of the rows."""

    source: int
    target: int
    rows: int | None
    """For training; None where nobody says."""
    notes: tuple[str, ...] = ()


def plan(recipe: Recipe, question: PlanOptions = PlanOptions(), machine: Machine | None = None) -> dict[str, Any]:
    """Returns what `loralab plan --json` prints.

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
        "target": 0 if task_of(data).classifies else data.max_target_length,
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
    base = find_base(recipe.model, label_count(recipe))
    dtype, dtype_note = dtype_of(recipe, machine)
    traced = trace(recipe, base)
    facts, settings = traced.facts, step_settings(recipe, dtype, machine.kind)
    sizes, shape = sizes_of(facts, recipe.training.method, dtype), shape_of(recipe, facts, lengths)
    row = _facts(name, recipe.training.method, sizes) | {
        "batch": asdict(shape) | {"accumulate": settings.accumulate},
        "dtype": dtype,
        "notes": [_origin(recipe, base), *dtype_note],
        "steps": _steps(recipe, shape, lengths.rows),
    }
    try:
        row |= _costs(recipe, traced, settings, shape, row["steps"], lengths.rows)
        row |= _fit(recipe, traced, settings, shape, row["memory_bytes"]["peak"], machine)
        if recipe.training.method == "lora":
            row["saves"] = _saves(recipe, base, settings, shape, row)
    except CannotTrace as failure:
        row |= _counts_alone(facts, sizes, settings)
        row["notes"].append(
            f"a step of {base.origin} cannot be run without numbers ({failure}): counts alone are known"
        )
        return row
    if question.measure and recipe.training.method != "none":
        row["measured"] = asdict(measure(recipe, base, settings, shape))
    return row | _money(row, lengths, recipe, question)


def label_count(recipe: Recipe) -> int | None:
    """Returns how many labels a classifier's recipe names; None for a model that writes text."""
    task = task_of(recipe.data)
    return task.num_outputs or len(recipe.data.labels) or LABELS if task.classifies else None


def _origin(recipe: Recipe, base: Base) -> str:
    if base.published:
        return f"{recipe.model.name}: {base.origin}"
    return f"{base.origin}: a class for this config, built without numbers"


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


def dtype_of(recipe: Recipe, machine: Machine) -> tuple[str, list[str]]:
    """Returns the dtype of weights and products, and a note where it is a guess: a run tries what auto means."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype, []
    dtype = "bfloat16" if machine.bfloat16 else "float32"
    return dtype, [f"model.dtype auto is taken as {dtype} here; a run tries which is faster"]


def step_settings(recipe: Recipe, dtype: str, device: str) -> StepSettings:
    """Returns the settings of a recipe's steps. Weights that are all trained are never quantised."""
    training, quantize = recipe.training, recipe.model.quantize
    return StepSettings(
        dtype,
        device,
        training.gradient_checkpointing,
        training.accumulate,
        None if training.method == "full" else quantize,
    )


def shape_of(recipe: Recipe, facts: ModelFacts, lengths: Lengths) -> BatchShape:
    """Returns the largest batch: every row as long as it may be, and no longer than a classifier's positions."""
    target, source = lengths.target, min(lengths.source, facts.positions or lengths.source)
    task = task_of(recipe.data)
    if facts.causal and not task.has_source:
        source = 0
    rows = recipe.training.batch_size or max(1, (recipe.training.token_budget or 0) // (source + max(target, 1)))
    learnt = rows * (target - 1 if source == 0 and target > 1 else max(target, 1))
    return BatchShape(rows, source, target, rows > 1, learnt, task.packed_length is not None)


def _steps(recipe: Recipe, shape: BatchShape, rows: int | None) -> int | None:
    """Returns the steps of all epochs, where the number of rows is known."""
    training = recipe.training
    if training.method == "none":
        return None
    if training.max_steps is not None:
        return training.max_steps
    if rows is None:
        return None
    return ceil(ceil(rows / shape.rows) / training.accumulate) * training.epochs


def _costs(
    recipe: Recipe,
    traced: TracedModel,
    settings: StepSettings,
    shape: BatchShape,
    steps: int | None,
    rows: int | None,
) -> dict[str, Any]:
    """Returns what a step takes, and all of them."""
    cost = cost_of(traced, settings, shape)
    whole = None if steps is None else cost.flops * steps
    if whole is not None and rows is not None and traced.trains_head_alone:
        whole += traced.forward_flops(settings, shape) * ceil(rows / shape.rows)  # the frozen part, once
    return {
        "flops_per_step": cost.flops,
        "flops": whole,
        "memory_bytes": {key: value for key, value in asdict(cost).items() if key != "flops"},
        "inference_bytes": traced.inference_peak(settings, shape),
    }


def cost_of(traced: TracedModel, settings: StepSettings, shape: BatchShape) -> StepCost:
    """Returns the cost of a step. Of many batches two are traced: from the second on, all find the same in memory."""
    batches = min(settings.accumulate, 2)
    cost = traced.step_cost(settings, [shape] * batches)
    return replace(cost, flops=cost.flops // batches * settings.accumulate)


def _counts_alone(facts: ModelFacts, sizes: Sizes, settings: StepSettings) -> dict[str, Any]:
    """Returns what is known where no step can be traced."""
    weights, trained = sizes.base_bytes[settings.quantize or settings.dtype], facts.trainable
    known = {"weights": weights, "gradients": sizes.values_bytes, "optimizer": 2 * 4 * trained}
    names = [field.name for field in fields(StepCost) if field.name != "flops"]
    return {
        "flops_per_step": None,
        "flops": None,
        "memory_bytes": {name: known.get(name, 0) for name in names},
        "inference_bytes": None,
        "fits": None,
        "remedy": None,
    }


def _fit(
    recipe: Recipe, traced: TracedModel, settings: StepSettings, shape: BatchShape, peak: int, machine: Machine
) -> dict[str, Any]:
    room = machine.room
    if not machine.memory:
        return {"fits": None, "remedy": None}
    if peak <= room:
        return {"fits": True, "remedy": None}

    def peak_of(settings: StepSettings, shape: BatchShape) -> int:
        held = traced.held_bytes(settings)
        return held if held > room else cost_of(traced, settings, shape).peak

    found = remedy(settings, shape, room, recipe.training.method != "full", peak_of)
    if found is not None and recipe.training.tokens_per_batch is None:
        found = replace(found, overrides=tuple(each for each in found.overrides if each != NO_BUDGET))
    return {"fits": False, "remedy": None if found is None else asdict(found)}


def _saves(
    recipe: Recipe, base: Base, settings: StepSettings, shape: BatchShape, row: dict[str, Any]
) -> dict[str, float]:
    """Returns what LoRA saves against the training of all weights, on the same batch, in shares."""
    training = recipe.training.model_copy(update={"method": "full"})
    full = trace(recipe.model_copy(update={"training": training}), base)
    other = cost_of(full, replace(settings, quantize=None), shape)
    return {"memory": 1 - row["memory_bytes"]["peak"] / other.peak, "flops": 1 - row["flops_per_step"] / other.flops}


def _money(row: dict[str, Any], lengths: Lengths, recipe: Recipe, question: PlanOptions) -> dict[str, Any]:
    """Hours and price of the whole run, once a time is known."""
    if not row.get("steps"):
        return {}
    if question.tokens_per_second:
        rows = row["steps"] * recipe.training.accumulate * row["batch"]["rows"]
        if recipe.training.max_steps is None:
            rows = (lengths.rows or 0) * recipe.training.epochs
        tokens = (lengths.source + lengths.target) * rows
        hours = tokens / question.tokens_per_second / 3600
    elif "measured" in row:
        hours = row["steps"] * row["measured"]["seconds"] / 3600
    else:
        return {}
    return {"hours": hours} | ({} if question.price_per_hour is None else {"price": hours * question.price_per_hour})
