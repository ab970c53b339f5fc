"""Attention on tensors without numbers, by the paths that the real one takes (on_torch/ops/attention.py, PyTorch's kernels)."""

from __future__ import annotations

from collections.abc import Sequence

from loralab.cost import operations as ops
from loralab.cost.layers import Weights, coins
from loralab.cost.operations import FLOAT
from loralab.cost.tape import Gradients, Tensor, operation


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Q, H·E] -> [B, H, Q, E], a view."""
    rows, length, width = x.shape
    return ops.view_back_copied(x, (rows, heads, length, width // heads))


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, Q, E] -> [B, Q, H·E]: a copy."""
    rows, heads, length, size = x.shape
    return ops.copy(x, (rows, length, heads * size))


def attention(
    model: Weights,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rate: float,
    own_path: bool,
    scaled: bool = False,
) -> Tensor:
    """softmax(q kᵀ + bias) v of [B, H, Q, E], by the path that the real one takes.

    Args:
        own_path: with dropout on a CPU two plain products with our dropout (on_torch/ops/attention.py), else
            PyTorch's kernel, which on a CPU falls back to products of its own where there is dropout or the bias learns.
        scaled: scores are, and without a bias what is behind each query is hidden.
    """
    if model.on_cpu and own_path and rate:
        return _plain_attention(model, q, k, v, bias, rate, scaled)
    if model.on_cpu and (rate or (bias is not None and bias.learns)):
        return _composed_attention(model, q, k, v, bias, rate)
    return _fused_attention(model, q, k, v, bias)


def _plain_attention(
    model: Weights, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: float, scaled: bool
) -> Tensor:
    rows, heads, queries, size = q.shape
    keys, number = k.shape[2], rows * heads
    if scaled:
        q = ops.elementwise(q)
    scores = ops.batched_product(_contiguous(q, (number, queries, size)), _contiguous(k, (number, size, keys)))
    scores = scores.view(rows, heads, queries, keys)
    if bias is not None:
        scores = ops.add(scores, bias)
    if scaled and bias is None:
        scores = ops.elementwise(scores, [model.meter.new((queries, keys), ops.BOOL)])
    weights = ops.activation(scores, keeps_input=False)
    del scores
    weights = ops.multiply(weights, coins(model, weights))
    mixed = ops.batched_product(weights.view(number, queries, keys), _contiguous(v, (number, keys, size)))
    return mixed.view(rows, heads, queries, size)


def _contiguous(x: Tensor, shape: Sequence[int]) -> Tensor:
    return ops.copy(x, shape)


def _composed_attention(model: Weights, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: float) -> Tensor:
    """PyTorch's own fall-back: in fp32, q and k scaled before the product, dropout by its own means."""
    rows, heads, queries, size = q.shape
    keys, number = k.shape[2], rows * heads
    q, k, v = (ops.cast(each, FLOAT) for each in (q, k, v))
    q, k = ops.elementwise(q), ops.elementwise(k)
    scores = ops.batched_product(_contiguous(q, (number, queries, size)), _contiguous(k, (number, size, keys)))
    del q, k
    scores = scores.view(rows, heads, queries, keys)
    if bias is not None:
        scores = ops.add(scores, ops.cast(bias, FLOAT))
    weights = ops.activation(scores, keeps_input=False)
    del scores
    if rate:
        weights = ops.multiply(weights, weights.like().detached())
    mixed = ops.batched_product(weights.view(number, queries, keys), _contiguous(v, (number, keys, size)))
    return ops.cast(mixed.view(rows, heads, queries, size), model.itemsize)


def _fused_attention(model: Weights, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """One kernel: it keeps what it was given and what it gave, and computes the weights again in the backward pass."""
    meter = model.meter
    rows, heads, queries, size = q.shape
    flops = 2 * rows * heads * queries * k.shape[2] * size
    result = q.like()
    kept = [q, k, v, result, meter.new((rows, heads, queries), FLOAT), bias]
    wanted = [(x.shape, x.itemsize) if x.learns else None for x in (q, k, v)]

    def backward(gradients: Gradients) -> Gradients:
        gradient = gradients.pop()
        assert gradient is not None
        meter.flops += 5 * flops
        return [meter.new(*each) if each else None for each in wanted]

    meter.flops += 2 * flops
    return operation([q, k, v], [result], backward, kept)[0]
