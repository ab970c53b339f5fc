"""All families, and which one a model or a config is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from loralab.errors import ModelError, RecipeError, nearest
from loralab.on_torch.models.family import ModelFamily
from loralab.on_torch.models.gpt2_family import GPT2Family
from loralab.on_torch.models.own_family import OwnFamily
from loralab.on_torch.models.t5_family import T5Family
from loralab.on_torch.models.transformers_families import (
    TransformersCausal,
    TransformersClassifier,
    TransformersSeq2Seq,
)

# The first that takes a config, or owns a model, is its family.
FAMILIES: list[ModelFamily] = [
    T5Family(),
    GPT2Family(),
    TransformersClassifier(),
    TransformersSeq2Seq(),
    TransformersCausal(),
]


def family_for(config: Mapping[str, Any], classifies: bool) -> ModelFamily:
    """Returns the family of a config.json.

    Args:
        classifies: the model is to choose among labels; otherwise it writes text.

    Raises:
        ModelError: no family takes it.
    """
    if found := next((family for family in FAMILIES if family.takes(config, classifies)), None):
        return found
    raise ModelError(f"No family of models takes a config with model_type {config.get('model_type')!r}.")


def find_family(model: nn.Module) -> ModelFamily | None:
    """Returns the family of a model; None for a module of somebody's own, on which LoRA works all the same."""
    return next((family for family in FAMILIES if family.owns(model)), None)


def family_of(model: nn.Module) -> ModelFamily:
    """Returns the family of a model.

    Raises:
        ModelError: it is of none.
    """
    if found := find_family(model):
        return found
    own = ", ".join(family.module.__name__ for family in own_families())
    raise ModelError(
        f"loralab can train and ask models of Transformers' classes and of its own ({own}); {type(model).__name__} is neither. "
        "For a loop of your own, loralab.attach puts LoRA on any PyTorch model."
    )


def own_families() -> list[OwnFamily]:
    """Returns the families whose modules are loralab's own, of which there can be new models."""
    return [family for family in FAMILIES if isinstance(family, OwnFamily)]


def family_named(name: str) -> OwnFamily:
    """Returns the family of a new model, by its `model.name`.

    Raises:
        RecipeError: no family has sizes of this name.
    """
    if found := next((family for family in own_families() if family.architecture.has_sizes_of(name)), None):
        return found
    known = [each for family in own_families() for each in (*family.architecture.sizes, family.architecture.model_type)]
    raise RecipeError(
        f"model.name {name!r} has no sizes to begin with at random. {nearest(name.rpartition('/')[2], dict.fromkeys(known))}"
    )


def family_with(config: Any) -> OwnFamily:
    """Returns the family whose settings these are, by their `model_type`."""
    return next(family for family in own_families() if family.architecture.model_type == config.model_type)
