"""Decoder-only models: a row's source and target as one sequence, of which the target alone is learnt.

    source  <s> S S S         ids   <s> S S S T T </s> .
    target  T T </s>          next   .  . . T T </s> . .      what each position must say; a dot counts for nothing

Padding stands on the right, where no real token looks, so that positions count themselves. The output head is called
with the predicting states alone, through a hook on it: whatever class the model is, no logits of the source are made.

    L  source and target of the longest row        N  target tokens of a batch        D  width of the states
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralab.on_torch.models.family import ModelFamily
from loralab.on_torch.models.output import IGNORED
from loralab.on_torch.ops.onednn_linear import Linear
from loralab.on_torch.training import loss

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class CausalFamily(ModelFamily):
    """Behaviour shared by decoder-only models: rows are joined, and a row may hold several texts."""

    causal = True

    @abstractmethod
    def joined_inputs(
        self, model: nn.Module, ids: Tensor, mask: Tensor | None, documents: Tensor | None = None
    ) -> dict[str, Any]:
        """Returns what the model's forward takes to give logits for joined rows, without remembering keys and values.

        Args:
            ids, mask: [B, L], padded on the right.
            documents: [B, L], of rows of several texts the number of each token's text, negative in the padding; in the place of a mask.
        """

    @abstractmethod
    def joined_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        following: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Returns the cross-entropy in nats of what follows each place, [N], row by row.

        Args:
            following: [B, L], the token that each place predicts; -100 where that counts for nothing.
            ids, mask, documents: as in `joined_inputs`.
        """

    def check_packing(self, model: nn.Module, length: int) -> None:
        """Raises ModelError where a text's logits depend on what stands before it in a row of `length` tokens."""

    def inputs(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Any]:
        if documents is not None:
            return self.joined_inputs(model, ids, None, _of_several_texts(documents))
        ids, mask, _ = join(ids, mask, labels)
        return self.joined_inputs(model, ids, mask)

    def token_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        if documents is not None:
            return self.joined_losses(model, ids, None, labels, smoothing, _of_several_texts(documents))
        ids, mask, following = join(ids, mask, labels)
        return self.joined_losses(model, ids, mask, following, smoothing)


def _of_several_texts(documents: Tensor) -> Tensor | None:
    """Returns the same, or None where each row is one text: padding stands on the right, where no token looks."""
    return documents if bool((documents > 0).any()) else None


def join(source_ids: Tensor, source_mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, L], their mask, and the token that each position predicts (-100 where that is none of the target's).

    Args:
        source_ids, source_mask: [B, S], padded on the right; no source is empty.
        labels: [B, T], -100 in the padding.
    """
    target_mask = labels != IGNORED
    tokens = torch.cat([source_ids, labels], 1)
    real = torch.cat([source_mask.bool(), target_mask], 1)
    learnt = torch.cat([torch.zeros_like(source_mask, dtype=torch.bool), target_mask], 1)
    order = torch.argsort(~real, dim=1, stable=True)[:, : int(real.sum(1).max())]
    tokens, real, learnt = (x.gather(1, order) for x in (tokens, real, learnt))
    following = torch.full_like(tokens, IGNORED)
    following[:, :-1] = tokens[:, 1:].masked_fill(~learnt[:, 1:], IGNORED)
    return tokens.masked_fill(~real, 0), real.long(), following


def losses_at(model: nn.Module, following: Tensor, smoothing: float, **inputs: Any) -> Tensor:
    """Cross-entropy in nats of what follows each place, [N], row by row; -100 in `following` [B, L] counts for nothing.

    Args:
        inputs: what the model's forward takes.
    """
    predicts = following != IGNORED
    head = model.get_output_embeddings()  # type: ignore[operator]

    def run(choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return _through_head(model, head, choose, **inputs)

    if head_is_last(model):
        states_BLD, _ = run(lambda states: states[:, :0])
        return loss.token_losses(states_BLD[predicts], head, _frozen(head), following[predicts], smoothing)
    _, logits_1NV = run(lambda states: states[predicts][None])
    return loss.smoothed(loss.log_probabilities(logits_1NV[0]), following[predicts], smoothing)


def head_is_last(model: nn.Module) -> bool:
    """Tells whether logits are what the head gives. Some families scale them afterwards (Cohere), others cap them (Gemma 2).

    Tried once a model: a known output of the head must come out as it is.
    """
    if model not in _PLAIN:
        _PLAIN[model] = _try_head(model)
    return _PLAIN[model]


@torch.no_grad()
def _try_head(model: nn.Module) -> bool:
    known: list[Tensor] = []

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        known.append(torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output))
        return known[0]

    hook = model.get_output_embeddings().register_forward_hook(replace)  # type: ignore[operator]
    was_training = model.training
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    return torch.equal(logits.float(), known[0].float())


def _through_head(
    model: nn.Module, head: nn.Module, choose: Callable[[Tensor], Tensor], **inputs: Any
) -> tuple[Tensor, Tensor]:
    """(all states that would meet the head, the model's logits of those that `choose` lets through)."""
    caught: list[Tensor] = []

    def only_chosen(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(args[0])
        return (choose(args[0]),)

    hook: RemovableHandle = head.register_forward_pre_hook(only_chosen)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return caught[0], logits


def _frozen(head: nn.Module) -> Tensor | None:
    """The head's matrix where it is one frozen product and nothing more."""
    plain = type(head) in (nn.Linear, Linear) and getattr(head, "bias", None) is None
    weight = head.weight if plain else None
    return weight if isinstance(weight, Tensor) and not weight.requires_grad else None
