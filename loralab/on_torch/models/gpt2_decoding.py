"""GPT-2 a token at a time: what it remembers of prompts and of what it has written, and one step of it.

With beams a prompt's keys and values stay single: the hypotheses are several queries of one prompt, [B, H, M, E] against
[B, H, P, E], beside their own few keys, and one softmax goes over both. Without beams both stand in one place.

Shapes:  B prompts   M hypotheses of each   N = B·M, all of them   P tokens of a prompt but its last
         R positions there is room for (kv_cache.py)   the rest as in models/gpt2.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.models.gpt2 import GPT2, beside_padding
from loralab.on_torch.models.kv_cache import KVCache, grow, hide_end, hypotheses_of
from loralab.on_torch.ops.attention import attention


class Cache:
    """Keys and values of each block: those of the prompts, and those of what was written, grown in place."""

    def __init__(self, model: GPT2, input_ids: Tensor, attention_mask: Tensor, beams: int) -> None:
        """Reads the prompts but for their last tokens, with which the first step begins."""
        real_BS = attention_mask.bool()
        self.model, self.beams = model, beams
        self.context = input_ids.where(real_BS, input_ids[:, -1:])
        self.positions_N = (real_BS.sum(1) - 1).repeat_interleave(beams)
        prompts = _read(model, input_ids[:, :-1], attention_mask[:, :-1])
        hides = not bool(real_BS.all())
        least = torch.finfo(model.dtype).min
        bias_B11P = torch.zeros_like(real_BS[:, :-1], dtype=model.dtype).masked_fill(~real_BS[:, :-1], least)
        self.bias: Tensor | None = bias_B11P[:, None, None] if hides else None
        """What hides padding: [B, 1, 1, P]."""
        self.shared: list[KVCache] = []
        self.own: list[KVCache] = []
        for k_BHPE, v_BHPE in prompts:
            if beams > 1:
                self.shared.append(KVCache(k_BHPE, v_BHPE, grows=False))
                k_BHPE, v_BHPE = _none(k_BHPE, beams), _none(v_BHPE, beams)
            self.own.append(KVCache(k_BHPE, v_BHPE))

    def next_logits(self, tokens_N: Tensor) -> Tensor:
        """Logits [N, V] in fp32 of the token after these."""
        transformer = self.model.transformer
        x_N1D = (transformer.wte(tokens_N) + transformer.wpe(self.positions_N))[:, None]
        bias = self._bias(x_N1D)
        for index, block in enumerate(transformer.blocks()):
            q, k, v = block.attn.queries_keys_values(block.ln_1(x_N1D))
            self.own[index].append(k, v)
            x_N1D = x_N1D + block.attn.out(self._mixed(index, q * block.attn.scale, bias))
            x_N1D = x_N1D + block.mlp(block.ln_2(x_N1D))
        self.positions_N = self.positions_N + 1
        return self.model.logits(transformer.ln_f(x_N1D[:, 0])).float()

    def _bias(self, x_N1D: Tensor) -> Tensor:
        """Hides the end of `own`, and padding where prompts stand there too, [B or 1, 1, 1, R]."""
        bias = x_N1D.new_zeros(1, 1, 1, self.own[0].length + 1)
        if self.bias is not None and not self.shared:
            bias = F.pad(self.bias, (0, bias.shape[-1] - self.bias.shape[-1]))
        return hide_end(bias)

    def _mixed(self, index: int, q_NH1E: Tensor, bias: Tensor) -> Tensor:
        """Returns what the next position takes from itself and all before it, [N, H, 1, E]."""
        if self.shared:
            return beside_prompt(q_NH1E, self.shared[index], self.own[index], self.bias, bias)
        return self.own[index].attend(q_NH1E, bias)

    def grow(self, tokens: int) -> object:
        """Becomes as large as if so many tokens had been written; returns one layer's cache, which is there twice while it is widened."""
        return grow(self.own, tokens)

    def keep(self, sources: Tensor) -> None:
        """Drops every prompt but these, with all its hypotheses."""
        hypotheses = hypotheses_of(sources, len(self.positions_N), self.beams)
        for each in self.own:
            each.keep(hypotheses)
        for each in self.shared:
            each.keep(sources)
        self.positions_N = self.positions_N[hypotheses]
        self.bias = None if self.bias is None else self.bias[sources]

    def reorder(self, hypotheses: Tensor) -> None:
        """Puts at each place the hypothesis of this number, [N]; they are of the same prompt."""
        for each in self.own:
            each.reorder(hypotheses)


def beside_prompt(q_NH1E: Tensor, prompt: KVCache, own: KVCache, bias_B11P: Tensor | None, bias_111R: Tensor) -> Tensor:
    """[N, H, 1, E]: attention of scaled queries over their prompt and what each wrote itself."""
    on_prompt_BHMP = prompt.scores(_by_prompt(q_NH1E, len(prompt.values)))
    if bias_B11P is not None:
        on_prompt_BHMP = on_prompt_BHMP + bias_B11P
    on_own_NH1R = own.scores(q_NH1E) + bias_111R
    weights = torch.softmax(torch.cat([_by_hypothesis(on_prompt_BHMP), on_own_NH1R], -1), -1)
    from_prompt_BHME = prompt.take(_by_prompt(weights[..., : prompt.length], len(prompt.values)))
    return _by_hypothesis(from_prompt_BHME) + own.take(weights[..., prompt.length :])


def _by_prompt(x_NH1X: Tensor, prompts: int) -> Tensor:
    """[N, H, 1, X] -> [B, H, M, X]."""
    return x_NH1X[:, :, 0].unflatten(0, (prompts, -1)).transpose(1, 2)


def _by_hypothesis(x_BHMX: Tensor) -> Tensor:
    """[B, H, M, X] -> [N, H, 1, X]."""
    return x_BHMX.transpose(1, 2).flatten(0, 1)[:, :, None]


def _read(model: GPT2, ids_BP: Tensor, mask_BP: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of every token of the prompts, block by block."""
    positions_BP, bias = beside_padding(ids_BP, mask_BP, model.dtype)
    x_BPD = model.transformer.wte(ids_BP) + model.transformer.wpe(positions_BP)
    for number, block in enumerate(model.transformer.blocks(), 1):
        q, k, v = block.attn.queries_keys_values(block.ln_1(x_BPD))
        yield k, v
        if number == model.config.n_layer:
            return  # what the last block makes of the prompts is read by nobody
        x_BPD = x_BPD + block.attn.out(attention(q, k, v, bias, 0.0, block.attn.scale, causal=bias is None))
        x_BPD = x_BPD + block.mlp(block.ln_2(x_BPD))


def _none(prompt_BHPE: Tensor, beams: int) -> Tensor:
    """Nothing written yet by any hypothesis, [N, H, 0, E]."""
    sources, heads, _, size = prompt_BHPE.shape
    return prompt_BHPE.new_empty(sources * beams, heads, 0, size)
