"""The operations that our models are made of, on tensors without numbers: what each makes, keeps and computes, forward and backward.

What is kept follows PyTorch's rules: a product keeps a factor iff the other one needs a gradient. A gradient that is asked
for comes first in the list that `backward` is given, and is dropped when it has been used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loralab.cost.tape import Gradients, Leaf, Node, Tensor, operation, run_backward

FLOAT, LONG, BOOL = 4, 8, 1  # bytes of an element


def elementwise(x: Tensor, kept: Sequence[Tensor] = (), itemsize: int | None = None) -> Tensor:
    """f(x), whose backward pass reads what is kept: a scaling, a cast, an activation."""
    size = x.itemsize
    return operation([x], [x.like(itemsize)], lambda gradients: [_only(gradients).like(size)], kept)[0]


def cast(x: Tensor, itemsize: int) -> Tensor:
    """x itself where it has this precision."""
    return x if x.itemsize == itemsize else elementwise(x, itemsize=itemsize)


def copy(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A contiguous copy; its gradient is a view."""
    result = x.meter.new(shape, x.itemsize)
    before = x.shape
    return operation([x], [result], lambda gradients: [_only(gradients).view(*before)])[0]


def view_back_copied(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A transposed view, whose gradient has to be copied into the order of x."""
    before = x.shape
    return operation([x], [x.view(*shape).detached()], lambda gradients: [_copied(_only(gradients), before)])[0]


def _copied(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    return gradient.meter.new(shape, gradient.itemsize)


def _only(gradients: Gradients) -> Tensor:
    gradient = gradients.pop()
    assert gradient is not None
    return gradient


def broadcast(shape: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """NumPy's rule."""
    length = max(len(shape), len(other))
    a, b = ((1,) * (length - len(each)) + tuple(each) for each in (shape, other))
    return tuple(max(pair) for pair in zip(a, b, strict=True))


def _reduced(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Summed to a shape that was broadcast."""
    return gradient if math.prod(shape) == gradient.numel else gradient.meter.new(shape, gradient.itemsize)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y; both get the gradient itself."""
    shapes, learn = (x.shape, y.shape), (x.learns, y.learns)

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        return [_reduced(gradient, shape) if wanted else None for shape, wanted in zip(shapes, learn, strict=True)]

    result = x.meter.new(broadcast(x.shape, y.shape), max(x.itemsize, y.itemsize))
    return operation([x, y], [result], backward)[0]


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x · y element by element."""
    shapes, learn = (x.shape, y.shape), (x.learns, y.learns)
    kept = [y if x.learns else None, x if y.learns else None]

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        products = [gradient.like() if wanted else None for wanted in learn]
        return [
            None if product is None else _reduced(product, shape)
            for product, shape in zip(products, shapes, strict=True)
        ]

    result = x.meter.new(broadcast(x.shape, y.shape), max(x.itemsize, y.itemsize))
    return operation([x, y], [result], backward, kept)[0]


def product(x: Tensor, w: Tensor) -> Tensor:
    """x Wᵀ, of x [..., in] and W [out, in]."""
    rows, (outputs, inputs) = x.numel // x.shape[-1], w.shape
    return _product(x, w, (*x.shape[:-1], outputs), 2 * rows * outputs * inputs)


def batched_product(x: Tensor, y: Tensor) -> Tensor:
    """x y, of x [N, rows, inner] and y [N, inner, columns]."""
    (number, rows, inner), columns = x.shape, y.shape[-1]
    return _product(x, y, (number, rows, columns), 2 * number * rows * inner * columns)


def _product(x: Tensor, y: Tensor, shape: Sequence[int], flops: int) -> Tensor:
    """Each factor that learns costs one more such product backwards, and needs the other for it."""
    meter, shapes, learn = x.meter, (x.shape, y.shape), (x.learns, y.learns)
    kept = [x if y.learns else None, y if x.learns else None]

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        meter.flops += flops * sum(learn)
        found = [
            meter.new(shape, gradient.itemsize) if wanted else None for shape, wanted in zip(shapes, learn, strict=True)
        ]
        return found

    meter.flops += flops
    return operation([x, y], [meter.new(tuple(shape), x.itemsize)], backward, kept)[0]


def activation(x: Tensor, keeps_input: bool) -> Tensor:
    """GELU keeps what it was given, ReLU, tanh and softmax what they gave."""
    result = x.like()
    kept = [x if keeps_input else result]
    return operation([x], [result], lambda gradients: [_only(gradients).like()], kept)[0]


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of parts of the last axis; their gradients are put together."""
    meter, shape, itemsize = x.meter, x.shape, x.itemsize
    parts = [Tensor(meter, (*shape[:-1], size), itemsize, x.storage) for size in sizes]

    def backward(gradients: Gradients) -> Gradients:
        whole = meter.new(shape, itemsize)
        gradients.clear()
        return [whole]

    return operation([x], parts, backward)


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """Matrices below each other; their gradients are views."""
    meter, rows = parts[0].meter, [part.shape[0] for part in parts]
    result = meter.new((sum(rows), parts[0].shape[1]), parts[0].itemsize)

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        return [gradient.view(count, gradient.shape[1]) for count in rows]

    return operation(parts, [result], backward)[0]


def look_up(table: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of a table by indices of this shape; a gradient fills the whole table."""
    meter, whole = table.meter, table.shape

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        return [meter.new(whole, gradient.itemsize)]

    return operation([table], [meter.new((*shape, table.shape[-1]), table.itemsize)], backward)[0]


def choose_rows(x: Tensor, count: int) -> Tensor:
    """`count` rows of x [..., D]; their gradients are put into zeros."""

    def backward(gradients: Gradients) -> Gradients:
        gradient = _only(gradients)
        zeros = gradient.meter.new(shape, gradient.itemsize)
        return [zeros.like()]

    shape = x.shape
    return operation([x], [x.meter.new((count, x.shape[-1]), x.itemsize)], backward)[0]


def first_of_rows(x: Tensor) -> Tensor:
    """[B, S, D] -> [B, D], a view of each row's first; its gradient is put into zeros."""
    shape = x.shape
    result = Tensor(x.meter, (shape[0], shape[2]), x.itemsize, x.storage)
    return operation([x], [result], lambda gradients: [_copied(_only(gradients), shape)])[0]


def checkpointed(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What `run` gives, of which nothing is kept: it is run again in the backward pass."""
    meter = inputs[0].meter
    with meter.not_recording():
        result = run(*inputs)
    if not meter.recording:
        return result
    kept = [x.detached() for x in inputs]
    learn = [x.learns for x in inputs]

    def backward(gradients: Gradients) -> Gradients:
        ends = [Leaf() if wanted else None for wanted in learn]
        again = run(*(Tensor(meter, x.shape, x.itemsize, x.storage, end) for x, end in zip(kept, ends, strict=True)))
        run_backward(again, _only(gradients))
        return [None if end is None else end.gradient for end in ends]

    # a layer's own parameters learn even where its inputs do not
    meter.operations += 1
    targets = [None if x.node is None else (x.node, x.output) for x in inputs]
    node = Node(meter.operations, targets, backward)
    return Tensor(meter, result.shape, result.itemsize, result.storage, node)
