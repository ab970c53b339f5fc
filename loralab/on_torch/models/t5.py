"""T5 and FLAN-T5: an encoder-decoder transformer with relative position biases, RMS norms and no other bias.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683; module names are those of Hugging Face's checkpoints, so that
files, LoRA rules and PEFT's adapters fit as they are. Weights and products are in the compute dtype; norm statistics,
softmax, logits and loss in fp32.

Shapes:  B batch   S source length   T target length   Q, K lengths of queries and keys   N real target tokens of a batch
         D d_model   H heads   E d_kv (size of a head)   F d_ff   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.models.t5 import T5Config
from loralab.on_torch.models.output import IGNORED, Output
from loralab.on_torch.models.t5_layers import (
    CrossAttentionLayer,
    FeedForwardLayer,
    RMSNorm,
    SelfAttentionLayer,
    embedding,
    relative_buckets,
)
from loralab.on_torch.ops.dropout import Dropout
from loralab.on_torch.ops.onednn_linear import Linear, times
from loralab.on_torch.ops.random_streams import checkpointed
from loralab.on_torch.training.loss import token_losses


class Block(nn.Module):
    """One layer of a stack: [self-attention, feed-forward], with cross-attention between them in the decoder."""

    def __init__(self, config: T5Config, decoder: bool, first: bool) -> None:
        super().__init__()
        cross = [CrossAttentionLayer(config)] if decoder else []
        self.layer = nn.ModuleList([SelfAttentionLayer(config, first), *cross, FeedForwardLayer(config)])

    def forward(
        self,
        add: Callable[..., Tensor],
        stream: list[Tensor],
        bias: Tensor,
        encoded_BSD: Tensor | None = None,
        cross_bias_B11S: Tensor | None = None,
    ) -> Tensor:
        """Returns the stream after the block, [B, Q, D].

        Args:
            add: of the stack: the stream after a layer.
            stream: the stream before the block alone, which is taken out: in inference nothing then holds it longer than its layer.
            bias: of self-attention.
            encoded_BSD, cross_bias_B11S: of a decoder's block, the source and what hides its padding.
        """
        self_attention, *cross_attention, feed_forward = self.layer
        x_BQD = add(self_attention, stream.pop(), bias)
        for cross in cross_attention:
            keys_values = cross.EncDecAttention.keys_values(encoded_BSD)  # type: ignore[operator, union-attr]
            x_BQD = add(cross, x_BQD, keys_values, cross_bias_B11S)
        return add(feed_forward, x_BQD)


class Stack(nn.Module):
    """The common part of encoder and decoder: blocks, a final norm, dropout, and the position biases that live in the first block."""

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
            return checkpointed(self._add, layer, x_BQD, *arguments)
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
        stream = [self.dropout(x_BSD)]
        for block in self.block:
            stream = [block(self.add, stream, bias_BHSS)]
        return self.dropout(self.final_layer_norm(stream[0]))


class Decoder(Stack):
    """Target embeddings -> target states, in one pass over the whole target; t5_decoding.py goes a token at a time."""

    def forward(self, x_BTD: Tensor, encoded_BSD: Tensor, cross_bias_B11S: Tensor | None) -> Tensor:
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        future_TT = positions_T[None, :] > positions_T[:, None]
        bias_1HTT = self.position_bias(positions_T, positions_T)
        bias_1HTT = bias_1HTT.masked_fill(future_TT, torch.finfo(bias_1HTT.dtype).min)
        stream = [self.dropout(x_BTD)]
        for block in self.block:
            stream = [block(self.add, stream, bias_1HTT, encoded_BSD, cross_bias_B11S)]
        return self.dropout(self.final_layer_norm(stream[0]))


class T5(nn.Module):
    """T5ForConditionalGeneration. `forward` is Hugging Face's; training uses `token_losses`, generation t5_decoding.py."""

    def __init__(self, config: T5Config, own_head: bool | None = None) -> None:
        """`own_head`: a separate output matrix; by default where the config unties it (a checkpoint's file decides when loading)."""
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config, config.num_layers, decoder=False)
        self.decoder = Decoder(config, config.num_decoder_layers, decoder=True)
        own_head = not config.tie_word_embeddings if own_head is None else own_head
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False) if own_head else None
        self.name_or_path = ""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return (self.config.eos_token_id,)

    @property
    def shared_parameters(self) -> tuple[str, ...]:
        """Parameters with a second use: the embedding, which Transformers holds for encoder and decoder each."""
        return ("shared.weight",)

    @property
    def tied_head(self) -> nn.Embedding | None:
        """The embedding, if it is the output head too."""
        return self.shared if self.lm_head is None else None

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

    def logits(self, states_D: Tensor) -> Tensor:
        return self._head(self._scaled(states_D))

    def _scaled(self, states_D: Tensor) -> Tensor:
        return states_D * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else states_D

    def _head(self, states_D: Tensor) -> Tensor:
        return times(states_D, self.shared) if self.lm_head is None else self.lm_head(states_D)

    def _frozen_head(self) -> Tensor | None:
        """The output matrix, if it is nothing but a frozen product."""
        head = self.shared if self.lm_head is None else self.lm_head
        plain = type(head) in (nn.Embedding, Linear) and not head.weight.requires_grad
        return head.weight if plain else None

    def shift_right(self, labels_BT: Tensor) -> Tensor:
        """The decoder's input for these labels: the start token, then each label but the last."""
        start = labels_BT.new_full((len(labels_BT), 1), self.config.decoder_start_token_id)
        shifted_BT = torch.cat([start, labels_BT[:, :-1]], dim=1)
        return shifted_BT.masked_fill(shifted_BT == IGNORED, self.config.pad_token_id)

    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor) -> Tensor:
        encoded_BSD, bias_B11S = self.encode(input_ids, attention_mask)
        return self.decoder(self.shared(decoder_input_ids), encoded_BSD, bias_B11S)
