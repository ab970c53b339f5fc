"""The layers of our models on tensors without numbers, made of operations.py in the order in which the real ones run:
linear maps with LoRA (on_torch/adapters/lora.py), dropout, norms.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from loralab.cost import operations as ops
from loralab.cost.operations import FLOAT, LONG
from loralab.cost.tape import Gradients, Meter, Storage, Tensor, operation

PART = 2**20  # weights of a packed matrix that are there at one time on a CPU


@dataclass
class Update:
    """LoRA's part in one linear map."""

    A: Tensor
    B: Tensor
    dropout: float
    shared_dropout: bool
    magnitude: Tensor | None = None


@dataclass
class Weights:
    """What a model consists of, and how it runs."""

    meter: Meter
    itemsize: int
    """Bytes of an element in products and activations."""
    on_cpu: bool
    parameters: dict[str, Tensor]
    updates: dict[str, Update]
    rate: float | None
    """The model's own dropout, where a recipe sets it."""
    checkpointing: bool = False
    packed: frozenset[str] = frozenset()
    """Modules whose weight is quantised: their dense weight is there only while it is used."""
    masks: dict[str, tuple[weakref.ref[Storage], Tensor]] = field(default_factory=dict)
    """The last mask that each parent module drew for LoRA, and for what."""

    def rate_or(self, rate: float) -> float:
        """The dropout of a place that has this one by itself."""
        return rate if self.rate is None else self.rate

    def weight(self, module: str) -> Tensor:
        return self.parameters[f"{module}.weight"]


def linear(model: Weights, name: str, x: Tensor) -> Tensor:
    """x Wᵀ + b, and LoRA's update where there is one."""
    return project(model, (name,), x)[0]


def project(model: Weights, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Several maps of one input: their updates meet it in one low-rank product."""
    updates = [model.updates[name] for name in names if name in model.updates]
    together = len(updates) > 1 and (not updates[0].dropout or updates[0].shared_dropout)
    parts: dict[int, Tensor] = {}
    if together:
        small = down(model, names[0], updates, x)
        sizes = [update.A.shape[0] for update in updates]
        parts = {id(update): part for update, part in zip(updates, ops.split(small, sizes), strict=True)}
        del small
    outputs = []
    for name in names:
        update = model.updates.get(name)
        if update is None:
            outputs.append(base_linear(model, name, x))
        else:
            small = parts.pop(id(update)) if together else down(model, name, [update], x)
            outputs.append(_add_update(model, name, update, x, small))
            del small
    return outputs


def base_linear(model: Weights, name: str, x: Tensor) -> Tensor:
    """x Wᵀ + b without an update."""
    if name in model.packed:
        return packed_product(model, name, x)
    y = ops.product(x, model.weight(name))
    bias = model.parameters.get(f"{name}.bias")
    return y if bias is None else _with_bias(y, bias)


def _with_bias(y: Tensor, bias: Tensor) -> Tensor:
    """A product to which the bias is added on the way: the sum takes no further memory."""

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        return [gradient, gradient.meter.new(bias_shape, gradient.itemsize) if learns else None]

    bias_shape, learns = bias.shape, bias.learns
    return operation([y, bias], [y.detached()], backward)[0]


def packed_product(model: Weights, name: str, x: Tensor) -> Tensor:
    """A product with a quantised weight, whose dense form is made for it, forward and backward."""
    meter, weight = model.meter, model.weight(name)
    outputs, inputs = weight.shape
    flops = 2 * (x.numel // inputs) * outputs * inputs
    shape, itemsize = x.shape, x.itemsize

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        found = meter.new(shape, itemsize)
        unpacked()
        return [found]

    def unpacked() -> None:
        """The weight, or on a CPU a part of it at a time."""
        meter.flops += flops
        count = min(PART, outputs * inputs) if model.on_cpu else outputs * inputs
        wide = meter.new((count,), FLOAT)
        dense = meter.new((count,), itemsize)
        del wide, dense

    y = meter.new((*shape[:-1], outputs), itemsize)
    unpacked()
    y = operation([x], [y], backward)[0]
    bias = model.parameters.get(f"{name}.bias")
    return y if bias is None else _with_bias(y, bias)


def down(model: Weights, name: str, updates: Sequence[Update], x: Tensor) -> Tensor:
    """s · drop(x) Aᵀ for the updates side by side."""
    factors = [ops.elementwise(update.A) for update in updates]
    A = ops.cast(ops.stack_rows(factors), x.itemsize)
    del factors
    rate = updates[0].dropout
    if not rate:
        return ops.product(x, A)
    return masked_product(x, _lora_mask(model, name, updates[0].shared_dropout, x), A)


def _lora_mask(model: Weights, name: str, shared: bool, x: Tensor) -> Tensor:
    """The mask that the parent's other modules drew for the same input, or a new one."""
    parent = name.rpartition(".")[0]
    if parent in model.masks and shared:
        drawn_for, mask = model.masks[parent]
        if drawn_for() is x.storage:
            return mask
    mask = coins(model, x)
    model.masks[parent] = weakref.ref(x.storage), mask
    return mask


def masked_product(x: Tensor, mask: Tensor, A: Tensor) -> Tensor:
    """(x ⊙ mask) Aᵀ, which keeps x and the mask, and masks again in the backward pass."""
    meter, rank, rows = x.meter, A.shape[0], x.numel // x.shape[-1]
    flops = 2 * rows * rank * x.shape[-1]
    shape, itemsize, learns, a_shape = x.shape, x.itemsize, x.learns, A.shape

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        found = meter.new(shape, itemsize) if learns else None
        masked = meter.new(shape, itemsize)
        meter.flops += flops * (1 + learns)
        of_A = meter.new(a_shape, gradient.itemsize)
        del masked
        return [found, of_A]

    masked = x.like()
    meter.flops += flops
    result = meter.new((*x.shape[:-1], rank), x.itemsize)
    del masked
    return operation([x, A], [result], backward, [x, mask, A])[0]


def _add_update(model: Weights, name: str, update: Update, x: Tensor, small: Tensor) -> Tensor:
    base = base_linear(model, name, x)
    up = ops.product(small, ops.cast(update.B, x.itemsize))
    y = ops.add(base, up)
    del base, up
    if update.magnitude is None:
        return y
    stretch = ops.cast(_stretch(model, name, update), x.itemsize)
    if f"{name}.bias" not in model.parameters:
        return ops.multiply(y, stretch)
    return ops.add(ops.multiply(ops.elementwise(y), stretch), model.parameters[f"{name}.bias"])


def _stretch(model: Weights, name: str, update: Update) -> Tensor:
    """DoRA's factor on each output: the norm of every row of W + sBA, without a gradient."""
    meter, rank = model.meter, update.A.shape[0]
    outputs, inputs = model.weight(name).shape
    dense = meter.new((outputs, inputs), model.itemsize) if name in model.packed else None
    meter.flops += 2 * outputs * inputs * rank
    raw = meter.new((outputs, inputs), FLOAT)
    delta = raw.like()
    del raw
    wide = meter.new((outputs, inputs), FLOAT) if model.itemsize != FLOAT else None
    total = delta.like()
    norms = meter.new((outputs,), FLOAT)
    del delta, wide, total, dense
    assert update.magnitude is not None
    return ops.elementwise(update.magnitude, [norms])


# Dropout


def coins(model: Weights, x: Tensor) -> Tensor:
    """A mask of ones and zeros; on a CPU four of them come from one random number of 64 bits."""
    mask = x.like().detached()
    if model.on_cpu:
        model.meter.new(((x.numel + 3) // 4,), LONG)
    return mask


def dropped(model: Weights, x: Tensor, rate: float) -> Tensor:
    """The model's own dropout, as dropout.py draws it."""
    return ops.multiply(x, coins(model, x)) if model.rate_or(rate) else x


# Norms


def rms_norm(model: Weights, name: str, x: Tensor) -> Tensor:
    """T5's, statistics in fp32, made of single operations: the square, its mean, the root, the product."""
    wide = ops.cast(x, FLOAT)
    root = ops.activation(_mean(_square(wide)), keeps_input=False)
    normed = ops.cast(ops.multiply(wide, root), x.itemsize)
    del wide, root
    return ops.multiply(model.weight(name), normed)


def _square(x: Tensor) -> Tensor:

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        power = gradient.like()
        double = power.like()
        del power
        return [double.like()]

    return operation([x], [x.like()], backward, [x])[0]


def _mean(x: Tensor) -> Tensor:
    shape = x.shape
    result = x.meter.new((*shape[:-1], 1), x.itemsize)

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        return [gradient.meter.new(shape, gradient.itemsize)]

    return operation([x], [result], backward)[0]


def layer_norm(model: Weights, name: str, x: Tensor) -> Tensor:
    """PyTorch's, in one operation."""
    weight, bias = model.weight(name), model.parameters[f"{name}.bias"]
    rows, itemsize = x.shape[:-1], x.itemsize
    statistics = [x.meter.new((*rows, 1), FLOAT) for _ in range(2)]
    learn, width = (x.learns, weight.learns, bias.learns), x.shape[-1]

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        found = gradient.like() if learn[0] else None
        scale, shift = (gradient.meter.new((width,), itemsize) if wanted else None for wanted in learn[1:])
        return [found, scale, shift]

    return operation([x, weight, bias], [x.like()], backward, [x, weight, *statistics])[0]
