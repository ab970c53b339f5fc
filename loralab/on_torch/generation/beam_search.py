"""Beam search with our own models: Transformers' scores, stopping rules and order of ties (its version 5).

A hypothesis is scored by the sum of its tokens' log-probabilities; once it has ended, by that sum / length^penalty.
At each step the 2M best continuations of a source's M open hypotheses are looked at (with k > 1 tokens that may end a
text (1 + k) M of them). Those among the first M that end become finished ones, of which the M best are kept; the best M
that go on stay open. Equal scores are ordered as `torch.topk` orders them over the same candidates, in all three
choices.

Shapes:  B sources   M beams   V vocabulary   C tokens before the answer
"""

from __future__ import annotations

import torch
from torch import Tensor

from loralab.config.generation import Decoding, until
from loralab.data.stop_sequences import Stops
from loralab.on_torch.generation.decode import LEAVING, DecoderState
from loralab.on_torch.generation.sampling import penalised

NEVER = -1e9  # the score of what must not be chosen; Transformers' number, as sums with it may be compared


@torch.inference_mode()
def beam_search(
    memory: DecoderState, ends: tuple[int, ...], decoding: Decoding, stops: Stops | None = None
) -> list[list[int]]:
    """The best finished hypothesis of each source, as ids without the end token.

    Args:
        memory: of the sources, which have been read, with `decoding.beams` hypotheses of each.
        ends: tokens that end a text.
        stops: texts with which a hypothesis ends too; it keeps the token that completes one.
    """
    sources, device = len(memory.context), memory.context.device
    beams = Beams(memory.context, ends, decoding, stops)
    answers = memory.context.new_full((sources, decoding.max_new_tokens), ends[0])
    rows = torch.arange(sources, device=device)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    while True:
        logits = memory.next_logits(beams.last().flatten())
        memory.reorder(beams.extend(logits))
        just = beams.ended() & ~ended
        answers[rows[just]] = beams.finished[just, 0, beams.begun :]
        ended |= just
        if (count := int(ended.sum())) == len(ended):
            return [until(answer, ends) for answer in answers.tolist()]
        if count * LEAVING >= len(ended):
            memory.keep(~ended)
            beams.keep(~ended)
            rows, ended = rows[~ended], ended[~ended]


class Beams:
    """The open and the finished hypotheses of each source of a batch, each best first."""

    def __init__(self, context_BC: Tensor, ends: tuple[int, ...], decoding: Decoding, stops: Stops | None) -> None:
        shape = (len(context_BC), decoding.beams)
        self.decoding, self.stops, self.length, self.begun = decoding, stops, 0, context_BC.shape[1]
        self.ends = torch.tensor(ends, device=context_BC.device)
        self.written = context_BC.new_full((*shape, self.begun + decoding.max_new_tokens), ends[0])
        self.written[:, :, : self.begun] = context_BC[:, None]
        self.scores = torch.zeros(shape, device=context_BC.device)
        self.scores[:, 1:] = NEVER  # all begin alike: only the first has continuations of worth
        self.finished = self.written.clone()
        self.finished_scores = torch.full_like(self.scores, NEVER)
        self.is_finished = torch.zeros_like(self.scores, dtype=torch.bool)

    def last(self) -> Tensor:
        """The last token of each open hypothesis, [B, M]."""
        return self.written[:, :, self.begun + self.length - 1]

    def extend(self, logits_NV: Tensor) -> Tensor:
        """Goes on by one token; returns which hypotheses the open ones continue, [B·M], for the cache."""
        sources, beams, _ = self.written.shape
        so_far = self.written[:, :, : self.begun + self.length].flatten(0, 1)
        log_probabilities = penalised(logits_NV.log_softmax(-1), so_far, self.decoding.repetition_penalty)
        totals = log_probabilities.view(sources, beams, -1) + self.scores[:, :, None]
        scores, places = totals.flatten(1).topk(max(2, 1 + len(self.ends)) * beams)
        parents, tokens = places // logits_NV.shape[-1], places % logits_NV.shape[-1]
        self.length += 1
        written = _pick(self.written, parents)
        written[:, :, self.begun + self.length - 1] = tokens
        ends = torch.isin(tokens, self.ends) | (self.length == self.decoding.max_new_tokens) | self._stopped(written)
        self._finish(written, scores, ends)
        self.scores, chosen = (scores + NEVER * ends).topk(beams)
        self.written = _pick(written, chosen)
        first = torch.arange(sources, device=scores.device)[:, None] * beams
        return (first + _pick(parents, chosen)).flatten()

    def _stopped(self, written: Tensor) -> Tensor:
        """Returns which candidates, [B, 2M], have just completed a stop text."""
        if self.stops is None:
            return torch.zeros_like(written[:, :, 0], dtype=torch.bool)
        end = self.begun + self.length
        tails = written[:, :, max(self.begun, end - self.stops.window) : end].flatten(0, 1)
        return torch.tensor(self.stops.met(tails.tolist()), device=written.device).view(written.shape[:2])

    def _finish(self, written: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Takes up the candidates that end, [B, 2M], where they are better than the finished ones."""
        just = ends & (torch.arange(scores.shape[1], device=scores.device) < self.decoding.beams)
        scores = scores / self._power(self.length) + NEVER * ~just
        self.finished_scores, chosen = torch.cat([self.finished_scores, scores], 1).topk(self.decoding.beams)
        self.finished = _pick(torch.cat([self.finished, written], 1), chosen)
        self.is_finished = _pick(torch.cat([self.is_finished, just], 1), chosen)

    def ended(self) -> Tensor:
        """[B]: whose best finished hypothesis stands."""
        decoding = self.decoding
        if self.length == decoding.max_new_tokens:
            return torch.ones_like(self.is_finished[:, 0])
        if decoding.early_stopping is True:
            return self.is_finished.all(1) | ~self._may_improve(self.length)
        longer_is_better = decoding.early_stopping == "never" and decoding.length_penalty > 0
        return ~self._may_improve(decoding.max_new_tokens if longer_is_better else self.length)

    def _may_improve(self, length: int) -> Tensor:
        """[B]: whether the best open hypothesis, ended at this length without further loss, would beat the worst finished one."""
        worst = self.finished_scores.min(1).values.where(self.is_finished.all(1), NEVER)
        return self.scores[:, 0] / self._power(length) > worst

    def _power(self, length: int) -> float:
        return float(length**self.decoding.length_penalty)

    def keep(self, sources: Tensor) -> None:
        """Drops every source but these."""
        for name in ("written", "scores", "finished", "finished_scores", "is_finished"):
            setattr(self, name, getattr(self, name)[sources])


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """Returns the entries of [B, X, ...] at the places [B, Y]: [B, Y, ...]."""
    return values[torch.arange(len(values), device=values.device)[:, None], places]
