"""One training step on shapes: what is computed, what is held, and the most at one time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loralab.config.lora import LoRASpec
from loralab.cost.layers import Update, Weights
from loralab.cost.loss import CHUNK
from loralab.cost.model import Module, Shape
from loralab.cost.operations import FLOAT
from loralab.cost.tape import GPU_BLOCK, Leaf, Meter, Storage, Tensor, run_backward

Forward = Callable[[Weights, Shape], Tensor]


@dataclass(frozen=True)
class Trained:
    """What a method trains of a model."""

    spec: LoRASpec
    targets: Sequence[str]
    """Modules with an update."""
    whole: frozenset[str]
    """Parameters that are trained themselves; copies of the base's, unless all of the model is."""
    everything: bool = False
    updates_learn: bool = True

    def update_shapes(self, modules: Mapping[str, Module]) -> dict[str, dict[str, tuple[int, ...]]]:
        """Target -> A, B and DoRA's magnitudes."""
        return {name: self._shapes(modules[name]) for name in self.targets}

    def _shapes(self, module: Module) -> dict[str, tuple[int, ...]]:
        rank, (outputs, inputs) = self.spec.rank_of(module.name), module.shape
        if module.kind == "Embedding":
            outputs, inputs = inputs, outputs
        shapes: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (outputs, rank)}
        return shapes | ({"magnitude": (outputs,)} if self.spec.use_dora else {})


@dataclass(frozen=True)
class Run:
    """How a model runs."""

    itemsize: int
    on_cpu: bool
    rate: float | None = None
    """The model's own dropout, where a recipe sets it."""
    checkpointing: bool = False
    accumulate: int = 1
    quantize: str | None = None
    plain: frozenset[str] = frozenset()
    """Linear modules that are not quantised all the same."""


@dataclass(frozen=True)
class StepCost:
    """What one step takes. Bytes are of tensors alone, without the process around them."""

    flops: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Held for the backward pass when the forward one has ended."""
    logits: int
    """The widest piece of them at one time."""
    peak: int
    """The most at one time; not a sum of the others, which are not all there together."""


def step_cost(
    modules: Sequence[Module],
    forward: Forward,
    trained: Trained,
    run: Run,
    shapes: Sequence[Shape],
    outputs: int,
    first: bool = False,
) -> StepCost:
    """The cost of a step.

    Args:
        shapes: of the batches whose gradients are added up.
        outputs: tokens or labels to choose from.
        first: of a run, before the optimizer has moments.
    """
    meter = Meter(1 if run.on_cpu else GPU_BLOCK)
    parts, before = dict[str, int](), 0

    def part(name: str) -> None:
        nonlocal before
        parts[name] = meter.live - before
        before = meter.live

    weights = _weights(meter, modules, trained, run)
    part("weights")
    weights.updates = _updates(meter, modules, trained)
    leaves = _leaves(weights)
    part("adapter")
    optimizer = [] if first else _optimizer(meter, leaves)
    part("optimizer")
    parts["activations"] = 0
    for shape in shapes:
        loss = forward(weights, shape)
        parts["activations"] = max(parts["activations"], meter.live - before)
        if loss.node is not None:
            run_backward(loss, loss.like())
        del loss
        before = meter.live
    parts["gradients"] = sum(_size(leaf.gradient) for _, leaf in leaves)
    if first:
        optimizer = _optimizer(meter, leaves)
    _optimizer_step(leaves)
    assert optimizer or not leaves
    return StepCost(
        flops=meter.flops,
        weights=parts["weights"],
        adapter=parts["adapter"],
        gradients=parts["gradients"],
        optimizer=sum(each.storage.size for each in optimizer),
        activations=parts["activations"],
        logits=min(max(shape.target_tokens for shape in shapes), CHUNK) * outputs * FLOAT,
        peak=meter.peak,
    )


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.storage.size


def _weights(meter: Meter, modules: Sequence[Module], trained: Trained, run: Run) -> Weights:
    parameters, packed = {}, set()
    for module in modules:
        if run.quantize and module.packable and module.name not in run.plain:
            packed.add(module.name)
        for name, shape in module.parameters.items():
            learns = trained.everything or name in trained.whole
            if module.name in packed and name.endswith(".weight"):
                storage = Storage(meter, packed_bytes(shape, run.quantize or ""))
                parameters[name] = Tensor(meter, shape, run.itemsize, storage)
                continue
            parameters[name] = meter.new(shape, run.itemsize, Leaf() if learns else None)
            if learns and not trained.everything:
                parameters[f"{name} of the base"] = meter.new(shape, run.itemsize)
    return Weights(meter, run.itemsize, run.on_cpu, parameters, {}, run.rate, run.checkpointing, frozenset(packed))


def packed_bytes(shape: tuple[int, ...], quantize: str) -> int:
    """A quantised matrix: int8 with a scale a row; nf4 with a scale for 64 numbers."""
    numel = math.prod(shape)
    return numel + shape[0] * FLOAT if quantize == "int8" else (numel + 1) // 2 + -(-numel // 64) * FLOAT


def _updates(meter: Meter, modules: Sequence[Module], trained: Trained) -> dict[str, Update]:
    found = {}
    for name, shapes in trained.update_shapes({module.name: module for module in modules}).items():
        tensors = {
            part: meter.new(shape, FLOAT, Leaf() if trained.updates_learn else None) for part, shape in shapes.items()
        }
        found[name] = Update(dropout=trained.spec.dropout, shared_dropout=trained.spec.shared_dropout, **tensors)
    return found


def _leaves(weights: Weights) -> list[tuple[Tensor, Leaf]]:
    tensors = list(weights.parameters.values())
    for update in weights.updates.values():
        tensors += [each for each in (update.A, update.B, update.magnitude) if each is not None]
    return [(tensor, tensor.node) for tensor in tensors if isinstance(tensor.node, Leaf)]


def _optimizer(meter: Meter, leaves: Sequence[tuple[Tensor, Leaf]]) -> list[Tensor]:
    """Two moments in fp32 and a count for each parameter, and an fp32 copy of what is not in fp32."""
    state = []
    for tensor, _ in leaves:
        state += [meter.new(tensor.shape, FLOAT), meter.new(tensor.shape, FLOAT), meter.new((), FLOAT)]
        if tensor.itemsize != FLOAT:
            state.append(meter.new(tensor.shape, FLOAT))
    return state


def _optimizer_step(leaves: Sequence[tuple[Tensor, Leaf]]) -> None:
    """Gradients that are not in fp32 become so, one after the other."""
    wide = []
    for tensor, leaf in leaves:
        if tensor.itemsize != FLOAT and leaf.gradient is not None:
            wide.append(leaf.gradient.like(FLOAT))
            leaf.gradient = None
