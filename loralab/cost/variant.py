"""What one recipe asks of a model: what is trained, on batches of which shape, in which precision; and what that costs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loralab import models as families
from loralab.adapters.files import EMBEDDING_PARTS, LINEAR_PARTS, PREFIX
from loralab.adapters.target_modules import Module as Target
from loralab.adapters.target_modules import check_patterns, refuse_shared, resolve, tuned_names
from loralab.config.lora import LoRASpec
from loralab.config.recipe import Recipe
from loralab.cost.base import Base
from loralab.cost.layers import Weights
from loralab.cost.model import Module, Shape
from loralab.cost.operations import FLOAT
from loralab.cost.step import Run, StepCost, Trained, packed_bytes, step_cost
from loralab.cost.tape import Tensor

PRECISIONS = {"float32": 4, "bfloat16": 2}
KEPT = {"int8": 2, "nf4": 2}  # bytes of what is not quantised


def trained_by(recipe: Recipe, base: Base) -> Trained:
    """What the recipe's method trains.

    Raises:
        TargetError: a rule selects nothing, or something that LoRA cannot wrap.
    """
    spec, method = recipe.spec(), recipe.training.method
    head = frozenset(name for module in base.modules if _of_head(base, module) for name in module.parameters)
    if method in ("full", "none"):
        return Trained(spec, (), frozenset(), everything=method == "full")
    if method == "head":
        return Trained(spec, (), head)
    rules = spec.rules or families.DEFAULT_RULES[base.family]
    targets = resolve(rules, _described(base))
    check_patterns(spec.rank_pattern, targets, "rank_pattern")
    check_patterns(spec.alpha_pattern, targets, "alpha_pattern")
    parameters = {name: len(shape) for module in base.modules for name, shape in module.parameters.items()}
    whole = set(tuned_names(spec, _names(base), parameters, targets))
    refuse_shared(targets, whole, base.shared)
    classifies, asked = recipe.data.label is not None, recipe.training.head
    if classifies and (asked == "trained" or (asked is None and not base.brings_head)):
        whole |= head
    return Trained(spec, targets, frozenset(whole))


def _of_head(base: Base, module: Module) -> bool:
    return module.name.startswith(families.HEADS.get(base.family, ("-",)))


def _names(base: Base) -> list[str]:
    """Of all modules, those that hold others too."""
    names: dict[str, None] = {}
    for module in base.modules:
        parts = module.name.split(".")
        names |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return list(names)


def _described(base: Base) -> Iterable[Target]:
    """As rules see them."""
    known = {module.name: module for module in base.modules}
    for name in _names(base):
        module = known.get(name)
        kind = "module" if module is None else module.kind
        yield Target(name, kind, kind in ("Linear", "Embedding"), kind == "Linear", module is not None and module.head)


@dataclass(frozen=True)
class Sizes:
    """Counts that depend on no batch."""

    trainable: int
    total: int
    saved_bytes: int
    """Of the adapter's file; of the model's where all of it is trained."""
    values_bytes: int
    """Of the numbers in it alone."""
    base_bytes: dict[str, int]
    """At each precision."""


def sizes_of(base: Base, trained: Trained, itemsize: int) -> Sizes:
    """Parameters and bytes."""
    modules = {module.name: module for module in base.modules}
    whole = {name: shape for module in base.modules for name, shape in module.parameters.items()}
    held = sum(map(math.prod, whole.values()))
    updates = trained.update_shapes(modules)
    tensors = dict(_saved(updates, modules))
    tensors |= {name: shape for name, shape in whole.items() if name in trained.whole}
    values = sum(map(math.prod, tensors.values()))
    saved = values * FLOAT if not trained.everything else held * itemsize
    header = 0 if trained.everything or not tensors else _header(tensors)
    added = sum(math.prod(shape) for shapes in updates.values() for shape in shapes.values())
    return Sizes(held if trained.everything else values, held + added, saved + header, saved, _base_bytes(base))


def _saved(
    updates: Mapping[str, Mapping[str, tuple[int, ...]]], modules: Mapping[str, Module]
) -> Iterable[tuple[str, tuple[int, ...]]]:
    """The tensors of an adapter's file (adapters/files.py)."""
    for module, shapes in updates.items():
        parts = EMBEDDING_PARTS if modules[module].kind == "Embedding" else LINEAR_PARTS
        yield from ((f"{module}.{parts[part]}", shape) for part, shape in shapes.items())


def _header(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes before the numbers in a safetensors file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in sorted(tensors):
        end = place + math.prod(tensors[name]) * FLOAT
        entries[PREFIX + name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [place, end]}
        place = end
    text = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-text // 8) * 8


def _base_bytes(base: Base) -> dict[str, int]:
    found = {name: sum(module.size for module in base.modules) * size for name, size in PRECISIONS.items()}
    for quantize, kept in KEPT.items():
        found[quantize] = sum(_packed(module, quantize, kept) for module in base.modules)
    return found


def _packed(module: Module, quantize: str, kept: int) -> int:
    if not module.packable:
        return module.size * kept
    return packed_bytes(module.shape, quantize) + (module.shape[0] * kept if module.bias else 0)


def run_of(recipe: Recipe, base: Base, itemsize: int, on_cpu: bool) -> Run:
    """How it runs.

    Raises:
        TargetError: a rule of model.quantize_except selects no linear module.
    """
    quantize = None if recipe.training.method == "full" else recipe.model.quantize
    training, rules = recipe.training, recipe.model.quantize_except
    plain = frozenset(resolve(rules, _described(base)) if quantize and rules else ())
    return Run(
        itemsize, on_cpu, recipe.model.dropout, training.gradient_checkpointing, training.accumulate, quantize, plain
    )


def shape_of(recipe: Recipe, base: Base, lengths: tuple[int, int]) -> Shape:
    """The largest batch: every row as long as it may be."""
    source, target = lengths
    if base.causal and recipe.data.source is None and recipe.data.messages is None:  # whole texts
        source = 0
    rows = recipe.training.batch_size or max(1, (recipe.training.token_budget or 0) // (source + max(target, 1)))
    learnt = rows * (target - 1 if source == 0 and target > 1 else max(target, 1))
    return Shape(rows, source, target, rows > 1, learnt, recipe.data.packing)


def cost_of(
    recipe: Recipe, base: Base, trained: Trained, run: Run, shapes: Sequence[Shape], first: bool = False
) -> StepCost:
    """Of one step of these batches."""
    forward = base.forward
    if recipe.training.method == "head" and not recipe.training.frozen_dropout and base.head_forward is not None:
        run_head, width = base.head_forward, base.modules[0].shape[1]

        def forward(model: Weights, shape: Shape) -> Tensor:
            return run_head(model, model.meter.new((shape.rows, width), model.itemsize))

    return step_cost(base.modules, forward, trained, run, shapes, base.outputs, first)


def forward_flops(base: Base, run: Run, shape: Shape) -> int:
    """Of one forward pass that nothing learns from."""
    nothing = Trained(LoRASpec(), (), frozenset())
    return step_cost(base.modules, base.forward, nothing, run, [shape], base.outputs).flops
