"""T5 and FLAN-T5 as functions of a dictionary of weights: an encoder-decoder transformer with relative position biases, RMS
norms and no other bias.

Raffel et al. 2020, https://arxiv.org/abs/1910.10683. The dictionary is nested by the components of Hugging Face's names; the
last one says how the array lies:

    encoder.block.0.layer.0.SelfAttention.q.kernel      [in, out], the transpose of Hugging Face's `weight`
    shared.embedding                                    [V, D], a row for each token
    encoder.block.0.layer.0.layer_norm.weight           [D]

Rules of LoRA and PEFT's names of modules do not see that last component, so they fit as they are. Weights and products are
in the weights' dtype; norm statistics, softmax and loss in fp32.

Shapes:  B batch   S source length   T target length   L any of them   Q, K lengths of queries and keys
         D d_model   H heads   E d_kv (size of a head)   I = H·E   F d_ff   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from loralab.models.t5 import T5Config
from loralab.on_jax.models.t5_layers import (
    HIDDEN,
    Dropout,
    Params,
    cross_attention_layer,
    feed_forward_layer,
    keys_values,
    relative_buckets,
    rms_norm,
    self_attention_layer,
)
from loralab.on_jax.training.loss import IGNORED, token_losses


class Output(NamedTuple):
    """Output of the forward pass, as Hugging Face's: mean loss per target token (None without labels) and logits [B, T, V]."""

    loss: Array | None
    logits: Array


@dataclass(frozen=True)
class T5:
    """A T5's settings, and its functions: each takes the weights first and gives the same for the same arguments.

    `dropout_key` switches dropout on, at the config's `dropout_rate`.
    """

    config: T5Config

    @property
    def shared_parameters(self) -> tuple[str, ...]:
        """Parameters with a second use, by their names on disk: the embedding, which Transformers holds for encoder and decoder each."""
        return ("shared.weight",)

    def forward(
        self,
        params: Params,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        labels: Array | None = None,
        dropout_key: Array | None = None,
    ) -> Output:
        """Hugging Face's forward. Ids [B, S], mask [B, S] of ones and zeros, decoder's ids or labels [B, T]."""
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("T5's forward needs labels or decoder_input_ids beside input_ids.")
            decoder_input_ids = self.shift_right(labels)
        states_BTD = self._decode(params, input_ids, attention_mask, decoder_input_ids, dropout_key)
        logits_BTV = self.logits(params, states_BTD)
        if labels is None:
            return Output(None, logits_BTV)
        losses_BT = token_losses(logits_BTV, labels)
        return Output(losses_BT.sum() / (labels != IGNORED).sum(), logits_BTV)

    def token_losses(
        self,
        params: Params,
        input_ids: Array,
        attention_mask: Array | None,
        labels: Array,
        smoothing: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """Cross-entropy in nats of each target token, [B, T] in fp32; zero where the label is −100.

        Their sum over the number of real labels is the mean loss: over several batches, add both first.
        """
        states_BTD = self._decode(params, input_ids, attention_mask, self.shift_right(labels), dropout_key)
        return token_losses(self.logits(params, states_BTD), labels, smoothing)

    def encode(
        self, params: Params, input_ids: Array, attention_mask: Array | None, dropout: Dropout | None = None
    ) -> tuple[Array, Array | None]:
        """Source states [B, S, D] and the bias that hides padding, [B, 1, 1, S] (None without a mask)."""
        bias_B11S = None
        if attention_mask is not None:
            bias_B11S = jnp.where(attention_mask[:, None, None, :] == 0, HIDDEN, 0.0)
        x_BSD = params["shared"]["embedding"][input_ids]
        return self._encoder(params["encoder"], x_BSD, bias_B11S, dropout or Dropout(0.0, None)), bias_B11S

    def logits(self, params: Params, states_D: Array) -> Array:
        """[.., V], from the decoder's states [.., D]."""
        return self.logits_of(states_D, head(params))

    def logits_of(self, states_D: Array, head_DV: Array) -> Array:
        scale = self.config.d_model**-0.5 if self.config.scale_decoder_outputs else 1.0
        return (states_D * scale) @ head_DV

    def shift_right(self, labels_BT: Array) -> Array:
        """The decoder's input for these labels: the start token, then each label but the last."""
        start_B1 = jnp.full_like(labels_BT[:, :1], self.config.decoder_start_token_id)
        shifted_BT = jnp.concatenate([start_B1, labels_BT[:, :-1]], axis=1)
        return jnp.where(shifted_BT == IGNORED, self.config.pad_token_id, shifted_BT)

    def position_bias(self, stack: Params, bidirectional: bool, length: int) -> Array:
        """[1, H, L, L] in fp32 or better, from each of so many positions to each; the first block holds the table for all."""
        buckets = relative_buckets(np.arange(1 - length, length), bidirectional, self.config)
        table = stack["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]["embedding"]
        by_distance = table[buckets]
        positions_L = jnp.arange(length)
        bias_LLH = by_distance[positions_L[None, :] - positions_L[:, None] + length - 1]
        return jnp.moveaxis(bias_LLH, -1, 0)[None].astype(jnp.promote_types(table.dtype, jnp.float32))

    def causal_bias(self, stack: Params, length: int) -> Array:
        """[1, H, L, L]: the decoder's position biases, with the future hidden."""
        positions_L = jnp.arange(length)
        future_LL = positions_L[None, :] > positions_L[:, None]
        return jnp.where(future_LL, HIDDEN, self.position_bias(stack, False, length))

    def shapes(self, own_head: bool) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each weight, under Hugging Face's names."""
        c, inner = self.config, self.config.num_heads * self.config.d_kv
        attention = {"q": (inner, c.d_model), "k": (inner, c.d_model), "v": (inner, c.d_model), "o": (c.d_model, inner)}
        inputs = ("wi_0", "wi_1") if c.gated else ("wi",)
        feed_forward = {**dict.fromkeys(inputs, (c.d_ff, c.d_model)), "wo": (c.d_model, c.d_ff)}
        found: dict[str, tuple[int, ...]] = {"shared.weight": (c.vocab_size, c.d_model)}
        for stack, count, names in (
            ("encoder", c.num_layers, ("SelfAttention", "DenseReluDense")),
            ("decoder", c.num_decoder_layers, ("SelfAttention", "EncDecAttention", "DenseReluDense")),
        ):
            for block, (place, name) in product(range(count), enumerate(names)):
                layer = f"{stack}.block.{block}.layer.{place}"
                maps = feed_forward if name == "DenseReluDense" else attention
                found |= {f"{layer}.{name}.{each}.weight": shape for each, shape in maps.items()}
                found[f"{layer}.layer_norm.weight"] = (c.d_model,)
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            found[table] = (c.relative_attention_num_buckets, c.num_heads)
            found[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        return {**found, "lm_head.weight": (c.vocab_size, c.d_model)} if own_head else found

    def _decode(
        self,
        params: Params,
        input_ids: Array,
        attention_mask: Array | None,
        decoder_input_ids: Array,
        key: Array | None,
    ) -> Array:
        dropout = Dropout(self.config.dropout_rate, key)
        encoded_BSD, bias_B11S = self.encode(params, input_ids, attention_mask, dropout)
        x_BTD = params["shared"]["embedding"][decoder_input_ids]
        return self._decoder(params["decoder"], x_BTD, encoded_BSD, bias_B11S, dropout)

    def _encoder(self, stack: Params, x_BSD: Array, bias_B11S: Array | None, dropout: Dropout) -> Array:
        bias_BHSS = self.position_bias(stack, True, x_BSD.shape[1])
        bias_BHSS = bias_BHSS if bias_B11S is None else bias_BHSS + bias_B11S
        x_BSD = dropout(x_BSD)
        for self_attention, feed_forward in layers(stack):
            x_BSD = x_BSD + dropout(self_attention_layer(self_attention, x_BSD, bias_BHSS, self.config, dropout))
            x_BSD = x_BSD + dropout(feed_forward_layer(feed_forward, x_BSD, self.config, dropout))
        return dropout(rms_norm(stack["final_layer_norm"], x_BSD, self.config.layer_norm_epsilon))

    def _decoder(
        self, stack: Params, x_BTD: Array, encoded_BSD: Array, bias_B11S: Array | None, dropout: Dropout
    ) -> Array:
        """In one pass over the whole target; t5_decoding.py goes a token at a time."""
        config, bias_1HTT = self.config, self.causal_bias(stack, x_BTD.shape[1])
        x_BTD = dropout(x_BTD)
        for self_attention, cross, feed_forward in layers(stack):
            x_BTD = x_BTD + dropout(self_attention_layer(self_attention, x_BTD, bias_1HTT, config, dropout))
            k_v_BHSE = keys_values(cross["EncDecAttention"], encoded_BSD, config.num_heads)
            x_BTD = x_BTD + dropout(cross_attention_layer(cross, x_BTD, k_v_BHSE, bias_B11S, config, dropout))
            x_BTD = x_BTD + dropout(feed_forward_layer(feed_forward, x_BTD, config, dropout))
        return dropout(rms_norm(stack["final_layer_norm"], x_BTD, config.layer_norm_epsilon))


def layers(stack: Params) -> Iterator[list[Params]]:
    """The layers of each block in turn: [self-attention, feed-forward], with cross-attention between them in the decoder."""
    for index in range(len(stack["block"])):
        block = stack["block"][str(index)]["layer"]
        yield [block[str(place)] for place in range(len(block))]


def head(params: Params) -> Array:
    """The output matrix [D, V]: the model's own, where it has one, or its embedding."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["shared"]["embedding"].T
