"""Cross-entropy of each token without the whole matrix of logits.

Tokens meet the vocabulary in chunks. Where the output head is frozen, as under LoRA, its gradient towards the states is
computed in the same sweep, so that no logits are kept and none are computed twice; a trained head computes each chunk's
logits again in the backward pass.

Label smoothing ε as in Szegedy et al. 2016 (https://arxiv.org/abs/1512.00567): (1 − ε) · −log p(label) + ε · mean over
the vocabulary of −log p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.ops.onednn_linear import linear
from loralab.on_torch.ops.random_streams import checkpointed

CHUNK = 512  # tokens whose logits are there at one time


def token_losses(
    states_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    frozen_VD: Tensor | None,
    labels_N: Tensor,
    smoothing: float = 0.0,
) -> Tensor:
    """[N], in nats, fp32.

    Args:
        head: states -> logits [.., V].
        frozen_VD: the head's matrix where it is a plain frozen product; None where it is trained or adapted.
    """
    if frozen_VD is not None and torch.is_grad_enabled():
        return FrozenHead.apply(states_ND, frozen_VD, labels_N, smoothing)

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return smoothed(log_probabilities(head(states)), labels, smoothing)

    chunks = zip(states_ND.split(CHUNK), labels_N.split(CHUNK), strict=True)
    if not torch.is_grad_enabled() or len(labels_N) <= CHUNK:
        return torch.cat([losses(states, labels) for states, labels in chunks])
    return torch.cat([checkpointed(losses, states, labels) for states, labels in chunks])


def log_probabilities(logits_V: Tensor) -> Tensor:
    """log softmax, in fp32 or better."""
    return torch.log_softmax(logits_V, -1, dtype=torch.promote_types(logits_V.dtype, torch.float32))


def smoothed(log_p_NV: Tensor, labels_N: Tensor, smoothing: float) -> Tensor:
    """[N]: cross-entropy against the smoothed label."""
    plain_N = F.nll_loss(log_p_NV, labels_N, reduction="none")
    return plain_N if smoothing == 0 else (1 - smoothing) * plain_N - smoothing * log_p_NV.mean(-1)


class FrozenHead(torch.autograd.Function):
    """Losses [N] of states [N, D] under a frozen head [V, D]; keeps dloss/dstates, [N, D], and nothing of the vocabulary's width."""

    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, head_VD: Tensor, labels_N: Tensor, smoothing: float) -> Tensor:
        losses, grads = [], []
        for states, labels in zip(states_ND.split(CHUNK), labels_N.split(CHUNK), strict=True):
            log_p_NV = log_probabilities(linear(states, head_VD))
            losses.append(smoothed(log_p_NV, labels, smoothing))
            grad_NV = log_p_NV.exp_().sub_(smoothing / len(head_VD))
            grad_NV.scatter_add_(1, labels[:, None], grad_NV.new_full((len(labels), 1), smoothing - 1))
            grads.append(linear(grad_NV.to(states.dtype), head_VD.T))
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_N,), (grad_ND,) = grads, ctx.saved_tensors
        return grad_N[:, None].to(grad_ND.dtype) * grad_ND, None, None, None
