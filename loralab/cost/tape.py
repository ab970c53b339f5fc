"""Tensors without numbers: shape and bytes, what is there at one time, and what the backward pass goes back over.

A storage is counted from its making until nothing holds it any more, as PyTorch frees tensors: both count references. The
backward pass runs from the last operation to the first, each once all gradients of its output are there, as PyTorch's
engine does.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

GPU_BLOCK = 512  # PyTorch's allocator gives whole blocks of so many bytes there


class Storage:
    """Bytes that are there as long as something holds this."""

    __slots__ = ("__weakref__", "meter", "size")

    def __init__(self, meter: Meter, size: int) -> None:
        self.meter, self.size = meter, -(-size // meter.block) * meter.block
        meter.taken(self.size)

    def __del__(self) -> None:
        self.meter.live -= self.size


@dataclass
class Meter:
    """What has been computed and held so far."""

    block: int = 1
    """Bytes are counted in whole blocks of this size."""
    flops: int = 0
    """Operations of matrix products: a multiplication and an addition are two."""
    live: int = 0
    peak: int = 0
    """Bytes."""
    recording: bool = True
    """Whether operations are written down for a backward pass."""
    operations: int = 0
    """How many have been written down; each node's number says how late it is."""

    def taken(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def new(self, shape: Sequence[int], itemsize: int, node: Node | Leaf | None = None, output: int = 0) -> Tensor:
        """A tensor that is not there yet."""
        shape = tuple(shape)
        return Tensor(self, shape, itemsize, Storage(self, math.prod(shape) * itemsize), node, output)

    @contextmanager
    def not_recording(self) -> Iterator[None]:
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape, size of an element, the storage (which views share), and what computed it, where a gradient goes back there."""

    meter: Meter
    shape: tuple[int, ...]
    itemsize: int
    storage: Storage
    node: Node | Leaf | None = None
    output: int = 0

    @property
    def learns(self) -> bool:
        """Whether a gradient is wanted."""
        return self.node is not None and self.meter.recording

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, *shape: int) -> Tensor:
        """The same bytes in another shape, and the same place in the backward pass."""
        return Tensor(self.meter, shape, self.itemsize, self.storage, self.node, self.output)

    def detached(self) -> Tensor:
        """The same bytes without a past: what an operation keeps of itself."""
        return Tensor(self.meter, self.shape, self.itemsize, self.storage)

    def like(self, itemsize: int | None = None) -> Tensor:
        """New bytes of this shape."""
        return self.meter.new(self.shape, itemsize or self.itemsize)


@dataclass(slots=True)
class Leaf:
    """A parameter's end of the backward pass: its gradient gathers here."""

    gradient: Tensor | None = None


Gradients = list[Tensor | None]


@dataclass(slots=True, eq=False)
class Node:
    """One operation: where its inputs' gradients go, and how they are computed from those of its outputs."""

    number: int
    targets: list[tuple[Node | Leaf, int] | None]
    backward: Callable[[Gradients], Gradients] | None
    kept: Sequence[Tensor | None] = ()
    """What the backward pass will read."""
    outputs: int = 1
    arrived: Gradients = field(default_factory=list)


def operation(
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
    backward: Callable[[Gradients], Gradients],
    kept: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """The results, with their place in the backward pass.

    Args:
        backward: gradients of the results -> those of the inputs, None where there is none. It empties the list it is
            given, so that gradients can go as soon as they are used.
        kept: what it reads, held until it has run.
    """
    if not any(x.learns for x in inputs):
        return list(results)
    meter = results[0].meter
    meter.operations += 1
    targets = [(x.node, x.output) if x.node is not None else None for x in inputs]
    node = Node(meter.operations, targets, backward, [x and x.detached() for x in kept], len(results))
    return [Tensor(meter, y.shape, y.itemsize, y.storage, node, place) for place, y in enumerate(results)]


def run_backward(start: Tensor, gradient: Tensor) -> None:
    """Takes the gradient of `start` back to every leaf."""
    queue: list[tuple[int, Node]] = []
    _arrive(start.node, start.output, gradient, queue)
    del gradient
    while queue:
        _, node = heapq.heappop(queue)
        gradients, node.arrived = node.arrived, []
        assert node.backward is not None, "each operation goes back once"
        sent = node.backward(gradients)
        node.backward, node.kept = None, ()
        targets, node.targets = node.targets, []
        for target, place in zip(targets, range(len(sent)), strict=True):
            found, sent[place] = sent[place], None
            if target is not None and found is not None:
                _arrive(target[0], target[1], found, queue)
            del found


def _arrive(to: Node | Leaf | None, place: int, gradient: Tensor, queue: list[tuple[int, Node]]) -> None:
    """Adds a gradient to those that are there; the sum is a new tensor."""
    if isinstance(to, Leaf):
        to.gradient = gradient if to.gradient is None else to.gradient.like()
    elif to is not None:
        if not to.arrived:
            to.arrived = [None] * to.outputs
            heapq.heappush(queue, (-to.number, to))
        earlier = to.arrived[place]
        to.arrived[place] = gradient if earlier is None else earlier.like()
