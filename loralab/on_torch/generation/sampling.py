"""From logits to tokens: the repetition penalty, temperature, top-k and top-p, and the draw itself.

The penalty is of Keskar et al. 2019, https://arxiv.org/abs/1909.05858; top-p of Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751. Order and meanings are those of Transformers.

Each row of a call draws from a stream of its own, made of the seed and the row's place in the call: what it writes
depends neither on the rows that share its batch nor on their order within.

Shapes:  N rows   V vocabulary   L tokens so far
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loralab.config.generation import Decoding, uniforms


def penalised(scores_NV: Tensor, written_NL: Tensor, penalty: float) -> Tensor:
    """The scores, with those of tokens that were written already made smaller (for a penalty above 1), once each."""
    if penalty == 1.0:
        return scores_NV
    scores_NL = scores_NV.gather(1, written_NL)
    return scores_NV.scatter(1, written_NL, torch.where(scores_NL < 0, scores_NL * penalty, scores_NL / penalty))


def sharpened(logits_NV: Tensor, decoding: Decoding) -> Tensor:
    """The logits after temperature, top-k and top-p; those of tokens that may not be drawn are -inf."""
    logits_NV = logits_NV / decoding.temperature
    if decoding.top_k is not None:
        smallest_N1 = logits_NV.topk(min(decoding.top_k, logits_NV.shape[-1])).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < smallest_N1, -torch.inf)
    if decoding.top_p is not None and decoding.top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(descending=True)
        probabilities_NV = sorted_NV.softmax(-1)
        likelier_NV = probabilities_NV.cumsum(-1) - probabilities_NV
        beyond_NV = likelier_NV >= decoding.top_p
        logits_NV = logits_NV.masked_fill(beyond_NV.scatter(1, order_NV, beyond_NV), -torch.inf)
    return logits_NV


def draw(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One token [N] of each row's softmax, by inverting its cumulated sum at numbers from (0, 1]."""
    cumulated_NV = logits_NV.softmax(-1).cumsum(-1)
    # The first whose sum reaches a number above zero: never one with a probability of zero, whatever is rounded.
    reached_N1 = uniform_N[:, None].to(cumulated_NV.dtype) * cumulated_NV[:, -1:]
    return torch.searchsorted(cumulated_NV, reached_N1)[:, 0]


class Draws:
    """The draws of a batch: one number for each row and step."""

    def __init__(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """`rows`: the places of the batch's rows in the call."""
        self.decoding = decoding
        self.uniforms = torch.from_numpy(uniforms(decoding.seed, rows, decoding.max_new_tokens)).float()

    def __call__(self, logits_NV: Tensor, rows_N: Tensor, step: int) -> Tensor:
        """Tokens [N] for these rows of the batch."""
        return draw(sharpened(logits_NV, self.decoding), self.uniforms[rows_N.cpu(), step].to(logits_NV.device))
