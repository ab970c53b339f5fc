"""LoRA in PyTorch: the update of one frozen linear map, and the module that adds it.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ                      Hu et al. 2021, https://arxiv.org/abs/2106.09685
    y = m/‖W + sBA‖ · (x Wᵀ + s · drop(x) Aᵀ Bᵀ)      DoRA; row norms, held constant in backward. Liu et al. 2024, https://arxiv.org/abs/2402.09353

A [r, in] and B [out, r] are kept in fp32 and cast to the input's dtype, not the other way round: a cast of x would be a
full-width copy. (The few rows of a step of generation are cast instead: A and B are larger.) The scale and dropout's
1/(1−p) act on the rank-sized product for the same reason. No forward changes a weight.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.config.lora import LoRASpec
from loralab.on_torch.ops.dropout import keep_mask
from loralab.on_torch.ops.linear import dense_shape, dense_weight, is_linear
from loralab.on_torch.ops.onednn_linear import linear

FEW = 32
"""Rows that are cast to the factors' fp32 on a CPU. Such small products are PyTorch's own: to start oneDNN takes longer."""


class LoRAWeights(nn.Module):
    """One adapter's part in one linear map: A, B, DoRA's magnitudes, and how they are scaled."""

    def __init__(self, spec: LoRASpec, name: str, base: nn.Module) -> None:
        super().__init__()
        rank, (outputs, inputs), like = spec.rank_of(name), dense_shape(base), _held(base)
        dtype = torch.promote_types(like.dtype, torch.float32)
        start_A, start_B = initial_factors(spec, name, rank, outputs, inputs, isinstance(base, nn.Embedding))
        self.A = nn.Parameter(start_A.to(like.device, dtype))
        self.B = nn.Parameter(start_B.to(like.device, dtype))
        self.scale, self.dropout, self.shared_dropout = spec.scale_of(name), spec.dropout, spec.shared_dropout
        self.magnitude = nn.Parameter(dense_weight(base).to(dtype).norm(dim=1)) if spec.use_dora else None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """s · B A, [out, in]."""
        return self.scale * (self.B @ self.A)

    def merged(self, weight_OI: Tensor) -> Tensor:
        """The one matrix that does what the base and this update do together, [out, in]."""
        total_OI = weight_OI.to(self.A.dtype) + self.delta()
        return total_OI if self.magnitude is None else self._stretch(total_OI)[:, None] * total_OI

    def stretch(self, weight_OI: Tensor) -> Tensor:
        """DoRA's factor on each output, [out]."""
        with torch.no_grad():
            total_OI = weight_OI.to(self.A.dtype) + self.delta()
        return self._stretch(total_OI)

    def _stretch(self, total_OI: Tensor) -> Tensor:
        """1 for an output whose weights are all zero: it has no direction yet."""
        assert self.magnitude is not None, "only DoRA stretches"
        norms_O = total_OI.detach().norm(dim=1)
        return torch.where(norms_O > 0, self.magnitude / norms_O.where(norms_O > 0, 1.0), 1.0)


def _held(base: nn.Module) -> Tensor:
    """A tensor that the module holds."""
    return next(itertools.chain(base.parameters(), base.buffers()))


def initial_factors(
    spec: LoRASpec, name: str, rank: int, outputs: int, inputs: int, embedding: bool
) -> tuple[Tensor, Tensor]:
    """A and B at the start, fp32 on the CPU, drawn from the spec's seed and the module's name, so that neither the order of modules
    nor the device matters. Their product is zero: B is, or, as in PEFT, A is for an embedding, where only few rows of A are ever hit."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{spec.seed or 0}:{name}".encode()))
    A, B = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    if embedding:
        return A, B.normal_(generator=generator)
    if spec.init == "kaiming":
        return A.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator), B
    deviation = {"gaussian": 1 / rank, "normal": 1.0, "kaiming_normal": (2 / inputs) ** 0.5}[spec.init]
    return A.normal_(std=deviation, generator=generator), B


class MaskedProduct(torch.autograd.Function):
    """(x ⊙ mask) Aᵀ. Keeps x, which its neighbours keep anyway, and the mask they share; not the masked copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask, A)
        return linear(x * mask, A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (grad,), (x, mask, A) = grads, ctx.saved_tensors
        grad_x = linear(grad, A.T).mul_(mask) if ctx.needs_input_grad[0] else None
        return grad_x, None, linear(grad.flatten(0, -2).T, (x * mask).flatten(0, -2).T)


class DropoutMasks:
    """Dropout masks that are shared by the wrapped modules of one parent as long as they are given the same input."""

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._rate, self._mask, self._takers = 0.0, torch.empty(0), set[int]()

    def draw(self, x: Tensor, updates: Sequence[LoRAWeights]) -> Tensor:
        """Ones and zeros like x. Each update takes one mask once: a second pass over the same input draws anew."""
        rate, takers = updates[0].dropout, {id(update) for update in updates}
        known = self._input is not None and self._input() is x and self._rate == rate
        if not (known and updates[0].shared_dropout and not takers & self._takers):
            self._input, self._rate, self._takers = weakref.ref(x), rate, set()
            self._mask = keep_mask(x, rate)
        self._takers |= takers
        return self._mask

    def __reduce__(self) -> tuple[type[DropoutMasks], tuple[()]]:
        return DropoutMasks, ()  # a copy starts empty: masks belong to one forward pass


class AdaptedModule(nn.Module):
    """A frozen module with the updates of several named adapters, of which one or none is active."""

    base: nn.Module

    def __init__(self, base: nn.Module, masks: DropoutMasks) -> None:
        super().__init__()
        self.base, self.masks = base, masks
        self.updates = nn.ModuleDict()
        self.active: str | None = None

    @property
    def weight(self) -> Tensor:
        """The base's own weight: some models look at its dtype."""
        weight = self.base.weight  # a packed one unpacks it
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias."""
        return getattr(self.base, "bias", None)

    def update(self) -> LoRAWeights | None:
        """The active update."""
        if self.active is None:
            return None
        update = self.updates[self.active]
        assert isinstance(update, LoRAWeights)
        return update


class AdaptedLinear(AdaptedModule):
    """Linear or Conv1D with LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.update()
        if update is None:
            return self.base(x)
        return self._add(x, update, project_down(x, [update], self.masks, self.training))

    def project_together(self, x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
        """Returns what each of the modules gives for x; those of them that are adapted meet x in one low-rank product."""
        adapted = [each for each in linears if isinstance(each, AdaptedLinear)]
        updates = [update for each in adapted if (update := each.update()) is not None]
        if len(updates) < 2 or (self.training and updates[0].dropout and not updates[0].shared_dropout):
            return [each(x) for each in linears]
        small = project_down(x, updates, self.masks, self.training)
        parts = dict(zip(updates, small.split([update.rank for update in updates], dim=-1), strict=True))
        outputs: list[Tensor] = []
        for each in linears:
            if isinstance(each, AdaptedLinear) and (update := each.update()) is not None:
                outputs.append(each._add(x, update, parts[update]))
            else:
                outputs.append(each(x))
        return outputs

    def _add(self, x: Tensor, update: LoRAWeights, small: Tensor) -> Tensor:
        """The base's product and the update's, from its rank-sized half."""
        y = self.base(x)
        y = y + linear(small, update.B.to(small.dtype)).to(y.dtype)
        if update.magnitude is None:
            return y
        stretch = update.stretch(dense_weight(self.base)).to(y.dtype)
        return y * stretch if self.bias is None else (y - self.bias) * stretch + self.bias


def project_down(x: Tensor, updates: Sequence[LoRAWeights], masks: DropoutMasks, training: bool) -> Tensor:
    """s · drop(x) Aᵀ for one update, or for several side by side, [..., sum of their ranks]; of few rows in fp32."""
    rate = updates[0].dropout if training else 0.0
    if not rate and _few(x):
        parts = [linear(x.to(update.A.dtype), update.A) * update.scale for update in updates]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    A = torch.cat([update.A * (update.scale / (1 - rate)) for update in updates]).to(x.dtype)
    if not rate:
        return linear(x, A)
    return MaskedProduct.apply(x, masks.draw(x, updates), A)


def _few(x: Tensor) -> bool:
    """Tells whether these are the rows of a step of generation on a CPU."""
    return not torch.is_grad_enabled() and x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1]


class AdaptedEmbedding(AdaptedModule):
    """Embedding with LoRA: a row of A per token, no dropout."""

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        update = self.update()
        if update is None:
            return y
        scale = update.scale * getattr(self.base, "embed_scale", 1.0)  # Gemma's and BART's scale what they give
        y = y + linear(F.embedding(ids, update.A.T).to(y.dtype) * scale, update.B.to(y.dtype))
        return y if update.magnitude is None else y * update.stretch(dense_weight(self.base)).to(y.dtype)


def wrap(base: nn.Module, masks: DropoutMasks) -> AdaptedModule:
    """The adapted module that fits this base."""
    return AdaptedLinear(base, masks) if is_linear(base) else AdaptedEmbedding(base, masks)
