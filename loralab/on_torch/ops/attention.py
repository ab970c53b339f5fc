"""softmax(scale · q kᵀ + bias) v, by the path that is fastest where it runs.

PyTorch's own kernel serves, except with dropout on a CPU, where it falls back to slow coins (dropout.py). Generation, a
query at a time, has its own way: models/written.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.ops.dropout import drop
from loralab.on_torch.ops.traced_device import device_kind


def attention(
    q_BHQE: Tensor,
    k_BHKE: Tensor,
    v_BHKE: Tensor,
    bias_BHQK: Tensor | None,
    rate: float,
    scale: float = 1.0,
    causal: bool = False,
) -> Tensor:
    """[B, H, Q, E]. `rate` of the weights are dropped. `causal`, in the place of a bias: no query sees the keys behind it."""
    assert not causal or (bias_BHQK is None and q_BHQE.shape[2] == k_BHKE.shape[2])
    if device_kind(q_BHQE) != "cpu" or not rate:
        return F.scaled_dot_product_attention(
            q_BHQE, k_BHKE, v_BHKE, bias_BHQK, dropout_p=rate, is_causal=causal, scale=scale
        )
    scores_BHQK = (q_BHQE if scale == 1.0 else q_BHQE * scale) @ k_BHKE.transpose(-1, -2)
    if bias_BHQK is not None:
        scores_BHQK = scores_BHQK + bias_BHQK
    if causal and q_BHQE.shape[2] > 1:
        later_QK = torch.ones(scores_BHQK.shape[-2:], dtype=torch.bool, device=q_BHQE.device).triu(1)
        scores_BHQK = scores_BHQK.masked_fill(later_QK, -torch.inf)
    weights_BHQK = torch.softmax(scores_BHQK, -1)  # in bf16 too it sums in fp32 and rounds once, at the end
    return drop(weights_BHQK, rate) @ v_BHKE
