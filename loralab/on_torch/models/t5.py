"""T5 and FLAN-T5: an encoder-decoder transformer with relative position biases, RMS norms and no other bias.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683; module names are those of Hugging Face's checkpoints, so that
files, LoRA rules and PEFT's adapters fit as they are. Weights and products are in the compute dtype; norm statistics,
softmax, logits and loss in fp32.

Shapes:  B batch   S source length   T target length   Q, K lengths of queries and keys   N real target tokens of a batch
         D d_model   H heads   E d_kv (size of a head)   F d_ff   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loralab.families.t5 import T5Config
from loralab.on_torch.attention import attention
from loralab.on_torch.dropout import Dropout
from loralab.on_torch.linear import project
from loralab.on_torch.loss import token_losses

IGNORED = -100  # a label that stands for padding


class RMSNorm(nn.Module):
    """x / rms(x) · weight, statistics in fp32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x_D: Tensor) -> Tensor:
        normed_D = F.rms_norm(x_D.float(), x_D.shape[-1:], eps=self.epsilon)
        return self.weight * normed_D.to(x_D.dtype)


class Attention(nn.Module):
    """Multi-head attention without the 1/√E scale: T5's initialisation absorbs it."""

    def __init__(self, config: T5Config, position_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.dropout = config.num_heads, Dropout(config.dropout_rate)
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if position_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

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
        mixed_BHQE = attention(q_BHQE, k_BHKE, v_BHKE, bias_BHQK, rate)
        return self.o(mixed_BHQE.transpose(1, 2).flatten(2))

    def _split(self, x_BQHE: Tensor) -> Tensor:
        return x_BQHE.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ReluFeedForward(nn.Module):
    """v1.0: relu(x wi) wo."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x_BQD: Tensor) -> Tensor:
        hidden_BQF = self.dropout(F.relu(self.wi(x_BQD)))
        return self.wo(hidden_BQF)


class GatedFeedForward(nn.Module):
    """v1.1 and FLAN: (gelu(x wi_0) · x wi_1) wo."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
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


class Block(nn.Module):
    """One layer of a stack: [self-attention, feed-forward], with cross-attention between them in the decoder."""

    def __init__(self, config: T5Config, decoder: bool, first: bool) -> None:
        super().__init__()
        cross = [CrossAttentionLayer(config)] if decoder else []
        self.layer = nn.ModuleList([SelfAttentionLayer(config, first), *cross, FeedForwardLayer(config)])


class Stack(nn.Module):
    """What encoder and decoder share: blocks, a final norm, dropout, and the position biases that live in the first block."""

    def __init__(self, config: T5Config, layers: int, decoder: bool) -> None:
        super().__init__()
        self.config, self.bidirectional = config, not decoder
        self.block = nn.ModuleList([Block(config, decoder, first=index == 0) for index in range(layers)])
        self.final_layer_norm = RMSNorm(config)
        self.dropout = Dropout(config.dropout_rate)
        self.checkpointing = False
        """Keep only the stream between layers for the backward pass, and compute the rest again there."""

    def add(self, layer: nn.Module, x_BQD: Tensor, *arguments: Any) -> Tensor:
        """The stream after a layer."""
        if self.checkpointing and self.training:
            return checkpoint(self._add, layer, x_BQD, *arguments, use_reentrant=False)
        return self._add(layer, x_BQD, *arguments)

    def _add(self, layer: nn.Module, x_BQD: Tensor, *arguments: Any) -> Tensor:
        return x_BQD + self.dropout(layer(x_BQD, *arguments))

    def layers(self) -> Iterator[Any]:
        """The layers of each block in turn."""
        return (block.layer for block in self.block)

    def position_bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[1, H, Q, K] from the positions of queries [Q] and keys [K]."""
        distance_QK = keys[None, :] - queries[:, None]
        buckets_QK = relative_buckets(distance_QK, self.bidirectional, self.config)
        first, *_ = next(self.layers())
        bias_QKH = first.SelfAttention.relative_attention_bias(buckets_QK)
        return bias_QKH.permute(2, 0, 1)[None]


class Encoder(Stack):
    """Source embeddings -> source states."""

    def forward(self, x_BSD: Tensor, bias_B11S: Tensor | None) -> Tensor:
        positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        bias = self.position_bias(positions_S, positions_S)
        bias_BHSS = bias if bias_B11S is None else bias + bias_B11S
        x_BSD = self.dropout(x_BSD)
        for self_attention, feed_forward in self.layers():
            x_BSD = self.add(self_attention, x_BSD, bias_BHSS)
            x_BSD = self.add(feed_forward, x_BSD)
        return self.dropout(self.final_layer_norm(x_BSD))


class Decoder(Stack):
    """Target embeddings -> target states; as one pass over the whole target, or a token at a time with a cache."""

    def forward(self, x_BTD: Tensor, encoded_BSD: Tensor, cross_bias_B11S: Tensor | None) -> Tensor:
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        future_TT = positions_T[None, :] > positions_T[:, None]
        bias_1HTT = self.position_bias(positions_T, positions_T)
        bias_1HTT = bias_1HTT.masked_fill(future_TT, torch.finfo(bias_1HTT.dtype).min)
        x_BTD = self.dropout(x_BTD)
        for self_attention, cross_attention, feed_forward in self.layers():
            x_BTD = self.add(self_attention, x_BTD, bias_1HTT)
            keys_values = cross_attention.EncDecAttention.keys_values(encoded_BSD)
            x_BTD = self.add(cross_attention, x_BTD, keys_values, cross_bias_B11S)
            x_BTD = self.add(feed_forward, x_BTD)
        return self.dropout(self.final_layer_norm(x_BTD))

    def cross_keys_values(self, encoded_BSD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, S, E] of the source, for each block, laid out for the many steps that will read them."""
        pairs = (cross_attention.EncDecAttention.keys_values(encoded_BSD) for _, cross_attention, _ in self.layers())
        return [(k_BHSE.contiguous(), v_BHSE.contiguous()) for k_BHSE, v_BHSE in pairs]

    def step(self, x_B1D: Tensor, cache: Cache) -> Tensor:
        """The states of the next target position; appends its keys and values to the cache."""
        position = cache.length
        positions_K = torch.arange(position + 1, device=x_B1D.device)
        bias_1H1K = self.position_bias(positions_K[-1:], positions_K)
        for index, (self_attention, cross_attention, feed_forward) in enumerate(self.layers()):
            q, k, v = self_attention.SelfAttention.queries_keys_values(self_attention.layer_norm(x_B1D))
            k_BHKE, v_BHKE = cache.append(index, k, v)
            x_B1D = x_B1D + self_attention.SelfAttention.attend(q, k_BHKE, v_BHKE, bias_1H1K)
            x_B1D = x_B1D + cross_attention(x_B1D, cache.cross[index], cache.cross_bias_B11S)
            x_B1D = x_B1D + feed_forward(x_B1D)
        cache.length += 1
        return self.final_layer_norm(x_B1D)


class Cache:
    """What a decoder remembers between tokens: its own keys and values (grown in place), and those of the source (fixed)."""

    def __init__(self, cross: list[tuple[Tensor, Tensor]], cross_bias_B11S: Tensor | None, max_length: int) -> None:
        batch, heads, _, size = cross[0][0].shape
        self.cross, self.cross_bias_B11S, self.length = cross, cross_bias_B11S, 0
        self.own = [tuple(k.new_empty(batch, heads, max_length, size) for _ in "kv") for k, _ in cross]

    def append(self, block: int, k_BH1E: Tensor, v_BH1E: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one position and returns all so far, [B, H, K, E]."""
        keys, values = self.own[block]
        keys[:, :, self.length], values[:, :, self.length] = k_BH1E[:, :, 0], v_BH1E[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]

    def keep(self, rows: Tensor) -> None:
        """Drops every row of the batch but these."""
        self.own = [tuple(tensor[rows] for tensor in pair) for pair in self.own]
        self.cross = [(k[rows], v[rows]) for k, v in self.cross]
        if self.cross_bias_B11S is not None:
            self.cross_bias_B11S = self.cross_bias_B11S[rows]


@dataclass
class Output:
    """What Hugging Face's forward returns: mean loss per target token (None without labels) and logits [B, T, V]."""

    loss: Tensor | None
    logits: Tensor


class T5(nn.Module):
    """T5ForConditionalGeneration. `forward` is Hugging Face's; training uses `token_losses`, generation `start` and `next_logits`."""

    def __init__(self, config: T5Config, own_head: bool | None = None) -> None:
        """`own_head`: a separate output matrix; by default where the config unties it (a checkpoint's file decides when loading)."""
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config, config.num_layers, decoder=False)
        self.decoder = Decoder(config, config.num_decoder_layers, decoder=True)
        own_head = not config.tie_word_embeddings if own_head is None else own_head
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if own_head else None
        self.name_or_path = ""

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Modules whose weight serves a second purpose: the embedding that is also the output head."""
        return () if self.lm_head is not None else ("shared",)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("T5's forward needs labels or decoder_input_ids beside input_ids.")
            decoder_input_ids = self.shift_right(labels)
        states_BTD = self._decode(input_ids, attention_mask, decoder_input_ids)
        logits_BTV = self.logits(states_BTD)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return Output(loss, logits_BTV)

    def token_losses(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """Cross-entropy in nats of each real target token, [N], row by row; padding never meets the vocabulary product."""
        states_BTD = self._decode(input_ids, attention_mask, self.shift_right(labels))
        real_BT = labels != IGNORED
        states_ND = self._scaled(states_BTD[real_BT])
        return token_losses(states_ND, self._head, self._frozen_head(), labels[real_BT], smoothing)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Source states [B, S, D] and the bias that hides padding, [B, 1, 1, S] (None where nothing is padded)."""
        x_BSD = self.shared(input_ids)
        bias_B11S = None
        if attention_mask is not None and not bool(attention_mask.all()):
            hidden_B11S = attention_mask[:, None, None, :] == 0
            bias_B11S = torch.zeros_like(hidden_B11S, dtype=x_BSD.dtype).masked_fill(
                hidden_B11S, torch.finfo(x_BSD.dtype).min
            )
        return self.encoder(x_BSD, bias_B11S), bias_B11S

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, max_length: int) -> Cache:
        """Reads the source once and returns the cache from which up to `max_length` tokens can be generated."""
        encoded_BSD, bias_B11S = self.encode(input_ids, attention_mask)
        return Cache(self.decoder.cross_keys_values(encoded_BSD), bias_B11S, max_length)

    def next_logits(self, tokens_B: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] of the token after these; extends the cache."""
        return self.logits(self.decoder.step(self.shared(tokens_B)[:, None], cache)[:, 0])

    def logits(self, states_D: Tensor) -> Tensor:
        return self._head(self._scaled(states_D))

    def _scaled(self, states_D: Tensor) -> Tensor:
        return states_D * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else states_D

    def _head(self, states_D: Tensor) -> Tensor:
        return F.linear(states_D, self.shared.weight) if self.lm_head is None else self.lm_head(states_D)

    def _frozen_head(self) -> Tensor | None:
        """The output matrix, if it is nothing but a frozen product."""
        head = self.shared if self.lm_head is None else self.lm_head
        plain = type(head) in (nn.Embedding, nn.Linear) and not head.weight.requires_grad
        return head.weight if plain else None

    def shift_right(self, labels_BT: Tensor) -> Tensor:
        """The decoder's input for these labels: the start token, then each label but the last."""
        start = labels_BT.new_full((len(labels_BT), 1), self.config.decoder_start_token_id)
        shifted_BT = torch.cat([start, labels_BT[:, :-1]], dim=1)
        return shifted_BT.masked_fill(shifted_BT == IGNORED, self.config.pad_token_id)

    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        encoded_BSD, bias_B11S = self.encode(input_ids, attention_mask)
        return self.decoder(self.shared(decoder_input_ids), encoded_BSD, bias_B11S)


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
