"""Results without numbers, against those that PyTorch gives on a CPU: shape, dtype, and order in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from loralab.on_torch.profiling.meta_kernels import KERNELS, like

aten = torch.ops.aten
X = torch.rand(2, 3, 4, 5)
TURNED = X.transpose(1, 2)
ROW, COLUMN, NARROW = torch.rand(5), torch.rand(4, 1), torch.rand(2, 3, 4, 5).bfloat16()
MASK = torch.ones(2, 1, 4, 5, dtype=torch.bool)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *((operation, (x, y), {}) for operation in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
      for x, y in ((X, X), (X, ROW), (COLUMN, X), (ROW, COLUMN), (NARROW, X), (NARROW, ROW), (TURNED, TURNED))),
    *((operation, (x, 2.0), {}) for operation in (aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar) for x in (X, NARROW, TURNED)),
    *((operation, (x,), {}) for operation in (aten.gelu.default, aten.rsqrt.default, aten.relu.default, aten.tanh.default,
      aten.log.default, aten.abs.default, aten.neg.default) for x in (X, NARROW, TURNED)),
    *((operation, (x, 0), {}) for operation in (aten.eq.Scalar, aten.gt.Scalar) for x in (X, TURNED)),
    (aten.ne.Tensor, (ROW, COLUMN), {}), (aten.bitwise_and.Tensor, (MASK, MASK[:1]), {}), (aten.bitwise_not.default, (MASK,), {}),
    (aten.masked_fill.Scalar, (X, MASK, 0.0), {}), (aten.where.self, (MASK, X, torch.tensor(0.0)), {}),
    (aten.gelu_backward.default, (X, X), {}), (aten._softmax.default, (X, -1, False), {}),
    (aten._log_softmax.default, (X[0, 0], -1, False), {}), (aten._softmax_backward_data.default, (X, X, -1, torch.float32), {}),
    (aten.mean.dim, (X, [-1], True), {}), (aten.sum.dim_IntList, (X, [0, 2]), {}), (aten.sum.dim_IntList, (X, [0, 1], True), {}),
    (aten.cat.default, ([X[0, 0], X[0, 1]], 1), {}), (aten.stack.default, ([ROW, ROW], -1), {}), (aten.tril.default, (X,), {}),
    (aten.mm.default, (X[0, 0], X[0, 0].T), {}), (aten.bmm.default, (X[0], X[0].transpose(1, 2)), {}),
    (aten.addmm.default, (torch.rand(4), X[0, 0], X[0, 0].T), {}), (aten.embedding.default, (X[0, 0], torch.tensor([[0, 1]])), {}),
    (aten.native_layer_norm.default, (X, [5], ROW, ROW, 1e-5), {}),
    (aten.native_layer_norm_backward.default, (X, X, [5], X[..., :1], X[..., :1], ROW, ROW, [True, False, True]), {}),
    (aten.nll_loss_forward.default, (X[0, 0], torch.zeros(4, dtype=torch.long), None, 0, -100), {}),
    (aten.empty_like.default, (TURNED,), {}), (aten.clone.default, (TURNED,), {}),
    (aten.clone.default, (TURNED,), {"memory_format": torch.contiguous_format}), (aten.new_empty.default, (NARROW, [2, 3]), {}),
]  # fmt: skip


def about(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (tuple(x.shape), x.dtype, x.stride())


@pytest.mark.parametrize("place", range(len(CASES)))
def test_each_result_is_as_pytorch_makes_it(place: int) -> None:
    operation, given, named = CASES[place]
    empty = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)
    found = KERNELS[operation](*empty, **named)
    wanted = operation(*given, **named)
    assert [about(x) for x in tree_leaves(found)] == [about(x) for x in tree_leaves(wanted)]


@pytest.mark.parametrize("x", [X, TURNED, X.permute(3, 0, 2, 1), X[:, :1].expand(2, 3, 4, 5), X[..., ::2]])
def test_like_keeps_the_order_of_axes(x: Tensor) -> None:
    assert about(like(x.to("meta"))) == about(torch.empty_like(x))
