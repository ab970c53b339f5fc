"""LoRA's scale is alpha / rank: a rank that is given alone changes it too. Said before a run, a comparison or a plan begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from loralab.config.lora import LoRASpec
from loralab.config.recipe import Recipe, Tree, with_overrides
from loralab.errors import RecipeError

RANK, ALPHA = "lora.rank", "lora.alpha"


def changed_scales(file: Tree, given: Tree, recipe: Recipe, variants: bool) -> list[str]:
    """A line for each rank that an override or a variant gives without an alpha, where the scale is another by that.

    Args:
        file: the settings before overrides.
        given: those of the overrides alone.
        recipe: what both make.
        variants: whether the variants are asked for, as in a comparison.
    """
    lines = [_line("", _spec(file), recipe)] if _rank_alone(given) else []
    for name in recipe.variants if variants else ():
        lines += [
            _line(f"variants.{name}: ", before, recipe.variant(name)) for before in _before(name, file, given, recipe)
        ]
    return [line for line in lines if line]


def _before(name: str, file: Tree, given: Tree, recipe: Recipe) -> Iterator[LoRASpec | None]:
    """Returns what a variant's rank alone is compared with: the recipe's LoRA, or that which the variant had before overrides."""
    if _rank_alone(recipe.variants[name]):
        yield recipe.lora
    elif _rank_alone((given.get("variants") or {}).get(name)):
        overrides = (file.get("variants") or {}).get(name) or {}
        try:
            yield _spec(with_overrides(file, overrides))
        except RecipeError:
            yield None


def _rank_alone(settings: Any) -> bool:
    """Says whether settings, dotted or in blocks, give a rank and no alpha."""
    if not isinstance(settings, Mapping):
        return False
    block = settings.get("lora")
    keys = {*settings, *(f"lora.{key}" for key in (block if isinstance(block, Mapping) else ()))}
    return RANK in keys and ALPHA not in keys


def _spec(tree: Tree) -> LoRASpec | None:
    """The LoRA block of a tree that may be no recipe yet."""
    block = tree.get("lora")
    try:
        return LoRASpec(**block) if isinstance(block, dict) else None
    except (ValidationError, TypeError):
        return None


def _line(where: str, before: LoRASpec | None, recipe: Recipe) -> str:
    """The change of the scale, in words; "" where there is none."""
    now = recipe.lora
    if before is None or before.alpha is None or recipe.training.method != "lora":
        return ""
    scales = scale_of(before), scale_of(now)
    if math.isclose(*scales):
        return ""
    kept = scales[0] * (math.sqrt(now.rank) if now.use_rslora else now.rank)
    alpha = "without an alpha" if now.alpha is None else f"alpha stays {now.alpha:g}"
    return (
        f"{where}lora.rank is {now.rank} instead of {before.rank}, and {alpha}: LoRA's scale is {scales[1]:g} instead of "
        f"{scales[0]:g}. To keep it, add lora.alpha={kept:g}."
    )


def scale_of(spec: LoRASpec) -> float:
    """The scale of modules for which no pattern says another rank or alpha."""
    return spec.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}}).scale_of("")
