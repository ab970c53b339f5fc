"""Before the first step: what a recipe's method trains of a model, and what it starts from.

method   trained                              saved                start_from an adapter
lora     the updates, and a head that is      an adapter           goes on with its updates, or adds fresh ones where it
         fresh (training.head says otherwise)                      has none; its head stays
head     a classifier's head                  an adapter           keeps its updates as they are
full     every weight                         a model              merges it first
none     nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from loralab.adapters import files
from loralab.config.recipe import Recipe
from loralab.on_torch.adapters.adapter_io import continue_from, fill_from, load_adapter, read_compatible
from loralab.on_torch.adapters.attach import Adapter, attach, attachment_for, install
from loralab.on_torch.models.heads import head_modules, head_parameters
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.ops.dropout import set_dropout


def set_trainable(
    model: nn.Module, recipe: Recipe, trained: Path | None, start: Path | None, fresh: Sequence[str]
) -> tuple[nn.Module, Adapter | None]:
    """(the model, its adapter where the method has one), with exactly what is trained requiring gradients.

    Args:
        trained: an adapter to put on as it is; start: one to begin with.
        fresh: parameters of a classifier's head that the base lacks.
    """
    method = recipe.training.method
    if recipe.model.dropout is not None:
        set_dropout(model, recipe.model.dropout)
    if recipe.training.gradient_checkpointing:
        family_of(model).checkpoint_activations(model)
    model.requires_grad_(method == "full")
    if method == "full" and start is not None:
        model = load_adapter(model, start).merge()
    if method in ("full", "none"):
        return model, None
    if trained is not None:
        adapter = load_adapter(model, trained)
    elif method == "head":
        adapter = _with_head(model, recipe, start)
    else:
        adapter = _with_updates(model, recipe, start, fresh)
    _freeze(adapter, model, recipe, fresh)
    return model, adapter


def _with_head(model: nn.Module, recipe: Recipe, start: Path | None) -> Adapter:
    """The head, and the updates of the adapter that it starts from."""
    stored = None if start is None else read_compatible(model, start)
    spec = (recipe.spec() if stored is None else stored.spec).model_copy(
        update={"modules_to_save": head_modules(model)} | ({"rules": ()} if stored is None else {})
    )
    tuned = {*head_parameters(model), *(stored.tuned if stored else ())}
    names = [name for name, _ in model.named_parameters() if name in tuned]
    updates = list(stored.updates) if stored else []
    adapter = install(model, attachment_for(model, "default"), spec, "default", updates, names)
    if stored is not None:
        fill_from(adapter, stored)
    return adapter


def _with_updates(model: nn.Module, recipe: Recipe, start: Path | None, fresh: Sequence[str]) -> Adapter:
    """Updates, and the head where it must be saved: as it is trained, or as the base lacks it."""
    stored = None if start is None else files.read_adapter(start)
    head = set(head_parameters(model))
    spec = recipe.spec()
    if fresh or recipe.training.head == "trained" or (stored is not None and head & set(stored.tuned)):
        spec = spec.model_copy(update={"modules_to_save": (*spec.modules_to_save, *head_modules(model))})
    adapter = attach(model, spec)
    if start is not None:
        continue_from(adapter, model, start)
    return adapter


def _freeze(adapter: Adapter, model: nn.Module, recipe: Recipe, fresh: Sequence[str]) -> None:
    """Leaves a gradient to what the method trains."""
    head = set(head_parameters(model))
    method, asked = recipe.training.method, recipe.training.head
    trains_head = method == "head" or asked == "trained" or (asked is None and bool(fresh))
    for update in adapter.updates.values():
        update.requires_grad_(method == "lora")
    for name, parameter in adapter.tuned.items():
        parameter.requires_grad_(trains_head if name in head else method == "lora")
