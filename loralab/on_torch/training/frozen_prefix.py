"""Finds the frozen prefix of a classifier, which no training changes, and runs the rest from its states.

    method head                    ids [S] ── encoder ──> state [1, D] of the first token ──> head ──> logits [C]
    LoRA on the layers from k on   ids [S] ── embeddings, layers below k ──> states [S, D] ──> layers from k on, head ──> logits [C]

The frozen part is stood in for by modules that give stored states. That this gives the model's logits depends on how a
class of Transformers is written (a head must read the first token alone; layers must hand on a plain tensor), so it is
tried on rows, not assumed. It also needs a frozen part in which nothing is dropped out: feature_cache.py stores the states.

B  rows    S  tokens    D  width    C  labels
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loralab.on_torch.models.heads import POOLER, head_parameters
from loralab.on_torch.ops.dropout import rates_of


class FrozenPrefix(Protocol):
    """The end of a frozen part."""

    model: nn.Module
    name: str
    most_tokens: int
    """Most tokens of a row whose states are kept: its first ones."""

    @property
    def width(self) -> int:
        """D."""

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, S, D]; or [B, 1, D] where the rest reads the first token only."""

    def logits(self, states_BSD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, C] in fp32, of these states of rows with these ids and mask, [B, S]."""


def encoder_of(model: nn.Module) -> nn.Module:
    """A classifier without what stands beside its encoder."""
    encoder: nn.Module = getattr(model, str(model.base_model_prefix))
    return encoder


class FrozenEncoder:
    """All of the encoder is frozen."""

    name, most_tokens = "head", 1

    def __init__(self, model: nn.Module) -> None:
        self.model, self.width = model, _width(model)

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 1, D]: the first token's."""
        found: Tensor = encoder_of(self.model)(input_ids=ids, attention_mask=mask)[0][:, :1]
        return found

    def logits(self, states_BSD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """See Cut."""
        with _in_place_of(encoder_of(self.model), self._encoded(states_BSD)):
            return _logits(self.model, ids[:, :1], mask[:, :1])

    def _encoded(self, states_BSD: Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooler = getattr(encoder_of(self.model), POOLER, None)
        return lambda *_, **__: BaseModelOutputWithPooling(states_BSD, None if pooler is None else pooler(states_BSD))


class FrozenLowerLayers:
    """The embeddings are frozen, and the layers below one."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, lowest: int) -> None:
        assert lowest > 0
        self.model, self.width, self.layers, self.lowest = model, _width(model), layers, lowest
        self.name, self.most_tokens = f"layer {lowest}", sys.maxsize

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, S, D]: what layer `lowest` is given."""
        found: list[Tensor] = []
        hook = self.layers[self.lowest].register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            self.model(input_ids=ids, attention_mask=mask)
        finally:
            hook.remove()
        return found[0]

    def logits(self, states_BSD: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """See Cut."""
        with ExitStack() as stand_ins:
            for layer in self.layers[: self.lowest]:
                stand_ins.enter_context(_in_place_of(layer, lambda *_, **__: states_BSD))
            return _logits(self.model, ids, mask)


def find_frozen_prefix(model: nn.Module, ids: Tensor, mask: Tensor) -> FrozenPrefix | None:
    """Returns where the frozen part of a model ends; None where it has none, or where stored states do not give these rows' logits."""
    cut = _candidate(model)
    if cut is None:
        return None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = _logits(model, ids, mask)
            alike = torch.allclose(cut.logits(cut.states(ids, mask), ids, mask), whole, rtol=1e-4, atol=1e-5)
        return cut if alike else None
    except Exception:  # a class that is written otherwise fails in its own way
        return None
    finally:
        model.train(was_training)


def _candidate(model: nn.Module) -> FrozenPrefix | None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inside = trained - set(head_parameters(model))
    if not inside:
        return FrozenEncoder(model)
    path, layers = _layers(model)
    places = [name.removeprefix(path).split(".")[0] for name in inside if path and name.startswith(path)]
    if layers is None or len(places) < len(inside) or min(map(int, places)) == 0:
        return None
    lowest = min(map(int, places))
    return None if _drops_out(model, layers, lowest) else FrozenLowerLayers(model, layers, lowest)


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList | None]:
    """The encoder's stack of layers, and how the names of its parameters begin."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", module
    return "", None


def _drops_out(model: nn.Module, layers: nn.ModuleList, lowest: int) -> bool:
    """Tells whether training drops anything out below a layer."""
    above = {id(part) for layer in layers[lowest:] for part in layer.modules()}
    return any(rate for module in encoder_of(model).modules() if id(module) not in above for rate in rates_of(module))


def _width(model: nn.Module) -> int:
    return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found.float()


@contextmanager
def _in_place_of(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
