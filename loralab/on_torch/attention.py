"""softmax(scale · q kᵀ + bias) v, by the path that is fastest where it runs.

PyTorch's own kernel serves, but for two cases on a CPU: with dropout it falls back to slow coins (dropout.py), and for
few queries (a step of generation: one of each beam) in bf16 it takes two to five times as long as two plain products.
Those take half the time in fp32, as long as keys and values fit into a processor's cache (`held`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.dropout import drop

FEW = 8  # queries; in fp32 both ways take the same time up to there
IN_CACHE = 2**19  # elements of one layer's keys


def attention(
    q_BHQE: Tensor,
    k_BHKE: Tensor,
    v_BHKE: Tensor,
    bias_BHQK: Tensor | None,
    rate: float,
    scale: float = 1.0,
    causal: bool = False,
) -> Tensor:
    """[B, H, Q, E] in the dtype of q. `rate` of the weights are dropped. `causal`, in the place of a bias: no query sees the
    keys behind it."""
    assert not causal or (bias_BHQK is None and q_BHQE.shape[2] == k_BHKE.shape[2])
    on_cpu = q_BHQE.device.type == "cpu"
    few = q_BHQE.shape[2] <= FEW or q_BHQE.dtype != k_BHKE.dtype  # PyTorch's kernel takes no keys that are `held`
    if not (on_cpu and (rate or few)):
        return F.scaled_dot_product_attention(
            q_BHQE, k_BHKE, v_BHKE, bias_BHQK, dropout_p=rate, is_causal=causal, scale=scale
        )
    scores_BHQK = (q_BHQE if scale == 1.0 else q_BHQE * scale).to(k_BHKE.dtype) @ k_BHKE.transpose(-1, -2)
    if bias_BHQK is not None:
        scores_BHQK = scores_BHQK + bias_BHQK
    if causal and q_BHQE.shape[2] > 1:
        later_QK = torch.ones(scores_BHQK.shape[-2:], dtype=torch.bool, device=q_BHQE.device).triu(1)
        scores_BHQK = scores_BHQK.masked_fill(later_QK, -torch.inf)
    weights_BHQK = torch.softmax(scores_BHQK, -1)  # in bf16 too it sums in fp32 and rounds once, at the end
    return (drop(weights_BHQK, rate) @ v_BHKE).to(q_BHQE.dtype)


def held(keys_BHKE: Tensor) -> Tensor:
    """Keys or values in the dtype in which single queries meet them fastest: on a CPU fp32, as long as they are few."""
    few = keys_BHKE.device.type == "cpu" and keys_BHKE.numel() <= IN_CACHE
    return keys_BHKE.to(torch.promote_types(keys_BHKE.dtype, torch.float32)) if few else keys_BHKE
