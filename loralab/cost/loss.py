"""The loss on tensors without numbers: on_torch/training/loss.py's three ways, and a classifier's."""

from __future__ import annotations

from collections.abc import Sequence

from loralab.cost import operations as ops
from loralab.cost.layers import Weights
from loralab.cost.operations import FLOAT
from loralab.cost.tape import Gradients, Tensor, operation

CHUNK = 512  # tokens that meet the vocabulary at one time


def token_loss(model: Weights, states: Tensor, head: Tensor, adapted: bool = False) -> Tensor:
    """Cross-entropy of [N, D] states against a head [V, D]: see on_torch/training/loss.py for its three ways."""
    if not head.learns and not adapted:
        return _frozen_head_loss(states, head, model.on_cpu)
    count = states.shape[0]
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    parts = _split_rows(states, sizes)
    if count <= CHUNK:
        return _loss_of(parts[0], head)
    losses = [ops.checkpointed(_loss_of, part, head) for part in parts]
    return _put_together(losses)


def _loss_of(states: Tensor, head: Tensor) -> Tensor:
    logits = ops.product(states, head)
    meter, shape, itemsize = states.meter, logits.shape, logits.itemsize
    wide = logits if itemsize == FLOAT else logits.like(FLOAT)
    log_p = logits.like(FLOAT).detached()
    del wide

    def backward(gradients: Gradients) -> Gradients:
        gradients.clear()
        of_log_p = meter.new(shape, FLOAT)
        found = meter.new(shape, itemsize)
        del of_log_p
        return [found]

    return operation([logits], [meter.new(shape[:1], FLOAT)], backward, [log_p])[0]


def classifier_loss(logits: Tensor) -> Tensor:
    """Of a classifier's [B, C]."""
    return ops.elementwise(ops.activation(ops.cast(logits, FLOAT), keeps_input=False))


def _split_rows(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    meter, shape, itemsize = x.meter, x.shape, x.itemsize
    if len(sizes) == 1:
        return [x]
    parts = [Tensor(meter, (size, shape[1]), itemsize, x.storage) for size in sizes]

    def backward(gradients: Gradients) -> Gradients:
        whole = meter.new(shape, itemsize)
        gradients.clear()
        return [whole]

    return operation([x], parts, backward)


def _put_together(losses: Sequence[Tensor]) -> Tensor:
    meter = losses[0].meter
    sizes = [each.shape[0] for each in losses]

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        return [gradient.view(size) for size in sizes]

    return operation(losses, [meter.new((sum(sizes),), FLOAT)], backward)[0]


def _frozen_head_loss(states: Tensor, head: Tensor, on_cpu: bool) -> Tensor:
    """Loss and the states' gradient in one sweep; the gradient is kept, and nothing as wide as the vocabulary."""
    meter, (count, width), vocabulary, itemsize = states.meter, states.shape, head.shape[0], states.itemsize
    gradients_of: list[Tensor] = []
    for start in range(0, count, CHUNK):
        rows = min(CHUNK, count - start)
        logits = meter.new((rows, vocabulary), itemsize)
        wide = logits if itemsize == FLOAT or not on_cpu else logits.like(FLOAT)  # a GPU casts within log_softmax
        log_p = logits.like(FLOAT)
        del logits, wide
        narrow = log_p if itemsize == FLOAT else log_p.like(itemsize)
        gradients_of.append(meter.new((rows, width), itemsize))
        del log_p, narrow
        meter.flops += 2 * 2 * rows * vocabulary * width
    kept = meter.new((count, width), itemsize)
    gradients_of.clear()

    def backward(gradients: Gradients) -> Gradients:
        gradients.clear()
        return [meter.new((count, width), itemsize)]

    return operation([states], [meter.new((count,), FLOAT)], backward, [kept])[0]
