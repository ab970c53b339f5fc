"""x Wᵀ + b on a CPU, by oneDNN (https://github.com/uxlfoundation/oneDNN).

PyTorch gives products in fp32 to MKL, which takes two to three times as long as oneDNN on AMD's processors; so here oneDNN
has them, forwards and backwards. Products in bf16 go to oneDNN in any case, but their weights are laid out
anew every time: a loss for the few rows of a step of generation, before which they are laid out once (`prepacked_weights`). On GPUs,
in other dtypes, under autocast and with torch.backends.mkldnn off all is as in PyTorch.

Both operations are private to PyTorch, and oneDNN's bf16 needs a processor with AVX-512 or newer: they are tried before
their first use (probe.py), and where they fail PyTorch's own products serve.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from loralab.on_torch.ops.probe import Probe, trial_numbers

HAS_ONEDNN = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
SMALL = 2**20
"""Multiplications from which on oneDNN is faster: it needs 15 µs to begin with, where MKL needs 2."""
TWICE_AT_MOST = 2 * 2**30
"""Bytes of weights that are laid out a second time for generation."""


class Linear(nn.Linear):
    """nn.Linear, multiplying by `linear`."""

    layout: Tensor | None = None
    """The weight as oneDNN reads it fastest, while `prepacked_weights` holds; of use where nothing is differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        return times(x, self, self.bias)


def times(x: Tensor, module: nn.Module, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, [.., out], of a module that holds W [out, in]: a linear one, or the embedding that is also the output head."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    layout = getattr(module, "layout", None)
    if layout is not None and not torch.is_grad_enabled() and x.dtype == weight.dtype:
        return _onednn(x, layout, bias)
    return linear(x, weight, bias)


def times_gelu(x: Tensor, module: nn.Module) -> Tensor:
    """gelu(x Wᵀ + b) of a module that maps so, with tanh's approximation; at once where the weight is laid out."""
    if type(module) is Linear and module.layout is not None and not torch.is_grad_enabled():
        return _onednn(x, module.layout, module.bias, "gelu", "tanh")
    return F.gelu(module(x), approximate="tanh")


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, [.., out]: what F.linear gives."""
    if not _is_onednns(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_OI, bias_O)):
        return OneDNNProduct.apply(x, weight_OI, bias_O)
    return _onednn(x, weight_OI, bias_O)


class OneDNNProduct(torch.autograd.Function):
    """`linear`, differentiated once. Keeps x only where W learns, and W only where x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        towards_x, towards_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if towards_weight else None, weight_OI if towards_x else None)
        return _onednn(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        towards_x, towards_weight, towards_bias = ctx.needs_input_grad
        grad = grads[0].contiguous()
        rows_NO = grad.flatten(0, -2)
        return (
            _onednn(grad, weight_OI.T) if towards_x else None,
            _onednn(rows_NO.T, x.flatten(0, -2).contiguous().T) if towards_weight else None,
            rows_NO.sum(0) if towards_bias else None,
        )


def _is_onednns(x: Tensor, weight_OI: Tensor) -> bool:
    """Tells whether this product is in fp32 on a CPU, and nobody asks for another."""
    return (
        _enabled()
        and x.device.type == weight_OI.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and x.numel() * len(weight_OI) >= SMALL
        and x.dim() > 1
        and not torch.is_autocast_enabled("cpu")
        and PRODUCT.works(x.dtype)
    )


def _enabled() -> bool:
    return HAS_ONEDNN and bool(torch.backends.mkldnn.enabled)


def _onednn(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, after: str = "none", how: str = "") -> Tensor:
    """By the operation that PyTorch's compiler uses too; W plain or laid out. `after`: what is done to each element then."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight_OI, bias_O, after, [], how)
    return product


def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    rows: int = torch.Size(x_shape[:-1]).numel()
    return 2 * rows * weight_shape[0] * weight_shape[1]


if HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # so that PyTorch's counter sees these products
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def _layout(weight_OI: Tensor) -> Tensor:
    """The weight as oneDNN reads it fastest."""
    layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI)
    return layout


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [3, 40], W [24, 40] and b [24] for a trial."""
    return trial_numbers(3, 40, dtype=dtype), trial_numbers(24, 40, dtype=dtype), trial_numbers(24, dtype=dtype)


def _try_product(dtype: torch.dtype, _: torch.device) -> tuple[Tensor, Tensor]:
    """Tries the product of W, and of a turned W, as in the backward pass."""
    x, weight, bias = _operands(dtype)
    turned = weight.T.contiguous().T
    return (
        torch.stack([_onednn(x, weight, bias), _onednn(x, turned)]),
        torch.stack([F.linear(x, weight, bias), F.linear(x, weight)]),
    )


def _try_layout(dtype: torch.dtype, _: torch.device) -> tuple[Tensor, Tensor]:
    """Tries the product of a W that is laid out, with and without an activation."""
    x, weight, bias = _operands(dtype)
    layout, plain = _layout(weight), F.linear(x.float(), weight.float(), bias.float())
    found = torch.stack([_onednn(x, layout, bias), _onednn(x, layout, bias, "gelu", "tanh")])
    return found, torch.stack([plain, F.gelu(plain, approximate="tanh")])


INSTEAD = "PyTorch's own product takes its place: the result is the same up to rounding, and it may be slower"
PRODUCT = Probe("oneDNN's product (mkldnn._linear_pointwise)", INSTEAD, _try_product)
LAID_OUT = Probe("oneDNN's product with weights laid out once (mkldnn._reorder_linear_weight)", INSTEAD, _try_layout)


# Weights laid out once


@contextmanager
def prepacked_weights(model: nn.Module) -> Iterator[None]:
    """Lays out the weights of every Linear, and of the embedding that is also the output head, while it holds.

    They are there twice meanwhile, and must not change. Nothing happens to models of more than TWICE_AT_MOST bytes, nor
    off the CPU, nor a second time inside.
    """
    head = getattr(model, "tied_head", None)
    modules = [m for m in model.modules() if type(m) is Linear or (type(m) is nn.Embedding and m is head)]
    fitting = [m for m in modules if getattr(m, "layout", None) is None and _can_be_laid_out(m.weight)]
    if sum(module.weight.nbytes for module in fitting) > TWICE_AT_MOST:
        fitting = []
    try:
        for module in fitting:
            module.layout = _layout(module.weight.detach())
        yield
    finally:
        for module in fitting:
            vars(module).pop("layout", None)


def _can_be_laid_out(weight: Tensor) -> bool:
    fitting = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return _enabled() and fitting and LAID_OUT.works(weight.dtype)


def by_onednn(model: nn.Module) -> nn.Module:
    """The model, each nn.Linear made ours, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model
