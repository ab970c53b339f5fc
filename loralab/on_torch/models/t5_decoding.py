"""T5 a token at a time: what the decoder remembers between tokens, and one step of it.

A source may have several hypotheses (beams). Its keys and values stay single: in cross-attention the hypotheses are
further queries of one source, [B, H, M, E] against [B, H, S, E]. Only the decoder's own keys and values are per
hypothesis.

Shapes:  B sources   M hypotheses of each   N = B·M, all of them   L positions so far   R positions there is room for
         (kv_cache.py)   the rest as in models/t5.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from loralab.on_torch.models.kv_cache import KVCache, grow, hide_end, hypotheses_of
from loralab.on_torch.models.t5 import T5


class Cache:
    """The source's keys and values (fixed), and the decoder's own (grown in place), for each block."""

    def __init__(
        self,
        model: T5,
        cross: list[KVCache],
        cross_bias_B11S: Tensor | None,
        bias_1H1L: Tensor,
        beams: int,
    ) -> None:
        """`bias_1H1L`: the position biases of the last of all positions towards those before it."""
        self.model = model
        self.context = torch.full(
            (len(cross[0].values), 1), model.config.decoder_start_token_id, device=bias_1H1L.device
        )
        sources, heads, _, size = cross[0].values.shape
        self.cross, self.cross_bias_B11S, self.bias_1H1L, self.beams = cross, cross_bias_B11S, bias_1H1L, beams
        nothing = cross[0].values.new_empty(sources * beams, heads, 0, size)
        self.own = [KVCache(nothing, nothing) for _ in cross]

    def next_logits(self, tokens_N: Tensor) -> Tensor:
        """Logits [N, V] in fp32 of the token after these."""
        states_N1D = _step(self.model, self.model.shared(tokens_N)[:, None], self)
        return self.model.logits(states_N1D[:, 0]).float()

    def position_bias(self) -> Tensor:
        """Returns the bias of the next position towards itself and those before it, [1, H, 1, R]."""
        return hide_end(self.bias_1H1L[..., -self.own[0].length - 1 :])

    def grow(self, tokens: int) -> object:
        """Becomes as large as if so many tokens had been written; returns one layer's cache, which is there twice while it is widened."""
        return grow(self.own, tokens)

    def keep(self, sources: Tensor) -> None:
        """Drops every source but these, with all its hypotheses."""
        for each in self.cross:
            each.keep(sources)
        if self.cross_bias_B11S is not None:
            self.cross_bias_B11S = self.cross_bias_B11S[sources]
        hypotheses = hypotheses_of(sources, len(self.own[0].values), self.beams)
        for each in self.own:
            each.keep(hypotheses)

    def reorder(self, hypotheses: Tensor) -> None:
        """Puts at each place the hypothesis of this number, [N]."""
        for each in self.own:
            each.reorder(hypotheses)


def start(model: T5, input_ids: Tensor, attention_mask: Tensor | None, max_length: int, beams: int = 1) -> Cache:
    """Reads the source once and returns the cache from which up to `max_length` tokens can be generated."""
    encoded_BSD, bias_B11S = model.encode(input_ids, attention_mask)
    pairs = (layer.EncDecAttention.keys_values(encoded_BSD) for _, layer, _ in model.decoder.layers())
    cross = [KVCache(k_BHSE, v_BHSE, grows=False) for k_BHSE, v_BHSE in pairs]
    positions = torch.arange(max_length, device=input_ids.device)
    return Cache(model, cross, bias_B11S, model.decoder.position_bias(positions[-1:], positions), beams)


def _step(model: T5, x_N1D: Tensor, cache: Cache) -> Tensor:
    """The states of the next target position."""
    bias_1H1R = cache.position_bias()
    for index, (self_attention, cross_attention, feed_forward) in enumerate(model.decoder.layers()):
        q, k, v = self_attention.SelfAttention.queries_keys_values(self_attention.layer_norm(x_N1D))
        cache.own[index].append(k, v)
        x_N1D = x_N1D + self_attention.SelfAttention.out(cache.own[index].attend(q, bias_1H1R))
        x_BMD = x_N1D.view(-1, cache.beams, x_N1D.shape[-1])
        q_BHME = cross_attention.EncDecAttention.queries(cross_attention.layer_norm(x_BMD))
        mixed_BHME = cache.cross[index].attend(q_BHME, cache.cross_bias_B11S)
        x_BMD = x_BMD + cross_attention.EncDecAttention.out(mixed_BHME)
        x_N1D = x_BMD.view(x_N1D.shape)
        x_N1D = x_N1D + feed_forward(x_N1D)
    return model.decoder.final_layer_norm(x_N1D)
