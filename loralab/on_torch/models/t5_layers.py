"""The layers of T5: norm, attention, feed-forward, each behind its norm; and the buckets of its relative positions.

`forward` of the three at the end returns what is added to the stream. Shapes as in models/t5.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.models.t5 import T5Config
from loralab.on_torch.ops.attention import attention
from loralab.on_torch.ops.dropout import Dropout
from loralab.on_torch.ops.linear import project
from loralab.on_torch.ops.onednn_linear import Linear


def embedding(rows: int, width: int) -> nn.Embedding:
    """Without values yet. Those that nn.Embedding begins with take PyTorch's compiler on the meta device, whose import takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, statistics in fp32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x_D: Tensor) -> Tensor:
        normed_D = F.rms_norm(x_D.to(torch.promote_types(x_D.dtype, torch.float32)), x_D.shape[-1:], eps=self.epsilon)
        return self.weight * normed_D.to(x_D.dtype)


class Attention(nn.Module):
    """Multi-head attention without the 1/√E scale: T5's initialisation absorbs it."""

    def __init__(self, config: T5Config, position_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout = config.num_heads, Dropout(config.dropout_rate)
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if position_bias:
            self.relative_attention_bias = embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x_BQD: Tensor, bias_BHQQ: Tensor | None) -> Tensor:
        """Self-attention."""
        q_BHQE, k_BHQE, v_BHQE = self.queries_keys_values(x_BQD)
        return self.attend(q_BHQE, k_BHQE, v_BHQE, bias_BHQQ)

    def queries_keys_values(self, x_BQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BQHE, k_BQHE, v_BQHE = (self._split(y) for y in project(x_BQD, (self.q, self.k, self.v)))
        return q_BQHE, k_BQHE, v_BQHE

    def queries(self, x_BQD: Tensor) -> Tensor:
        return self._split(self.q(x_BQD))

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        k_BHSE, v_BHSE = (self._split(y) for y in project(x_BSD, (self.k, self.v)))
        return k_BHSE, v_BHSE

    def attend(self, q_BHQE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, bias_BHQK: Tensor | None) -> Tensor:
        rate = self.dropout.rate if self.training else 0.0
        return self.out(attention(q_BHQE, k_BHKE, v_BHKE, bias_BHQK, rate))

    def out(self, mixed_BHQE: Tensor) -> Tensor:
        """The heads' findings as one, [B, Q, D]."""
        return self.o(mixed_BHQE.transpose(1, 2).flatten(2))

    def _split(self, x_BQHE: Tensor) -> Tensor:
        return x_BQHE.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ReluFeedForward(nn.Module):
    """v1.0: relu(x wi) wo."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x_BQD: Tensor) -> Tensor:
        hidden_BQF = self.dropout(F.relu(self.wi(x_BQD)))
        return self.wo(hidden_BQF)


class GatedFeedForward(nn.Module):
    """v1.1 and FLAN: (gelu(x wi_0) · x wi_1) wo."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x_BQD: Tensor) -> Tensor:
        gate_BQF, value_BQF = project(x_BQD, (self.wi_0, self.wi_1))
        hidden_BQF = self.dropout(F.gelu(gate_BQF, approximate="tanh") * value_BQF)
        return self.wo(hidden_BQF)


class SelfAttentionLayer(nn.Module):
    """Self-attention behind its norm; `forward` returns what is added to the stream."""

    def __init__(self, config: T5Config, position_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(config, position_bias)
        self.layer_norm = RMSNorm(config)

    def forward(self, x_BQD: Tensor, bias_BHQQ: Tensor) -> Tensor:
        return self.SelfAttention(self.layer_norm(x_BQD), bias_BHQQ)


class CrossAttentionLayer(nn.Module):
    """Attention from the target to the encoded source, whose keys and values the caller computes once."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.EncDecAttention = Attention(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x_BTD: Tensor, keys_values: tuple[Tensor, Tensor], bias_B11S: Tensor | None) -> Tensor:
        q_BHTE = self.EncDecAttention.queries(self.layer_norm(x_BTD))
        return self.EncDecAttention.attend(q_BHTE, *keys_values, bias_B11S)


class FeedForwardLayer(nn.Module):
    """The feed-forward layer behind its norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedFeedForward(config) if config.gated else ReluFeedForward(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x_BQD: Tensor) -> Tensor:
        return self.DenseReluDense(self.layer_norm(x_BQD))


def relative_buckets(distance: Tensor, bidirectional: bool, config: T5Config) -> Tensor:
    """The bucket of each signed distance (key − query): exact when near, logarithmic when far, one for all beyond the maximum."""
    buckets = config.relative_attention_num_buckets
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    spread = math.log(config.relative_attention_max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) / spread * (buckets - exact)).long()
    return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
