"""Checking a tree of settings: every mistake of a recipe at once, explained with the nearest names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from loralab.config.other_names import suggestion
from loralab.config.recipe import BESIDE_RESULTS, Recipe, Tree, with_overrides
from loralab.config.yaml_tree import shortened, shown
from loralab.errors import RecipeError, nearest

BLOCK = re.compile(r"a valid dictionary( or instance of \w+)?")


def find_mistakes(tree: Tree) -> list[str]:
    """Every mistake of the recipe, and those that only a variant has."""
    mistakes = _mistakes(tree)
    variants = tree.get("variants")
    if not isinstance(variants, dict):
        return mistakes
    plain = {key: value for key, value in tree.items() if key not in ("variants", *BESIDE_RESULTS)}
    for name, overrides in variants.items():
        if isinstance(overrides, dict):
            found = _variant_mistakes(plain, overrides)
            mistakes += [f"variants.{name}: {mistake}" for mistake in found if mistake not in mistakes]
    return mistakes or _unfit_variants(Recipe.model_validate(tree))


def _unfit_variants(recipe: Recipe) -> list[str]:
    """Returns what does not fit a variant of the recipe as it is stored, with its defaults: a variant that changes the task, for one, names
    its metrics too."""
    mistakes: list[str] = []
    for name in recipe.variants:
        try:
            recipe.variant(name)
        except ValidationError as error:
            mistakes += [f"variants.{name}: {mistake}" for mistake in _explained(error)]
    return mistakes


def _variant_mistakes(plain: Tree, overrides: Tree) -> list[str]:
    try:
        return _mistakes(with_overrides(plain, overrides))
    except RecipeError as error:
        return [] if _mistakes(plain) else [str(error)]  # a broken block is told once


def _mistakes(tree: Tree) -> list[str]:
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        return _explained(error)
    return []


def _explained(error: ValidationError) -> list[str]:
    found: dict[str, None] = {}
    for mistake in error.errors():
        found[_explain(mistake["type"], mistake["loc"], mistake["msg"], mistake["input"])] = None
    return _joined(list(found))


def _joined(mistakes: list[str]) -> list[str]:
    """Returns what several kinds of value could have been expected of one key, in one line."""
    lines: list[str] = []
    for mistake in mistakes:
        key, expected, what = mistake.partition(": expected ")
        before = lines[-1].partition(": expected ") if lines else ("", "", "")
        wanted, comma, got = before[2].rpartition("; got ")
        if expected and comma and before[0] == key and what.endswith(f"; got {got}"):
            lines[-1] = f"{key}: expected {wanted} or {what}"
        else:
            lines.append(mistake)
    return lines


def _explain(kind: str, location: Iterable[int | str], message: str, got: Any) -> str:
    # Pydantic adds the name of each branch of a union to the location; only keys of the recipe mean something to the user.
    path = [str(part) for part in location]
    key = shortened(".".join(_real(path)))
    if kind == "extra_forbidden":
        if (instead := suggestion(path[-1])) is not None:
            return f"{key}: unknown key. Did you mean {instead!r}?"
        return f"{key}: unknown key. {nearest(shortened(path[-1]), _keys(path[:-1]))}"
    if kind == "missing":
        return f"{key}: missing; the recipe must give it"
    text = message.removeprefix("Value error, ")
    if kind == "value_error" and (got is None or isinstance(got, dict)):
        return f"{key}: {text}" if key else text
    return f"{key}: {_sentence(kind, text)}" + ("" if text.endswith("?") else f"; got {shown(got)}")


def _sentence(kind: str, message: str) -> str:
    return (
        BLOCK.sub("a block of settings", message)
        .replace("Input should be", "expected")
        .replace("a valid tuple", "a list")
        .replace("a valid boolean", "true or false")
        .replace("String should match pattern '^p\\d\\d$'", "expected a percentile such as p85")
    )


def _real(path: list[str]) -> list[str]:
    """The leading parts of a location that are keys of the recipe."""
    model: Any = Recipe
    kept: list[str] = []
    for part in path:
        if (entry := _entry(model)) is not None:
            model = entry
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _block(model.model_fields[part].annotation)
        elif kept and (model is None or kept[-1] not in ("variants", *BESIDE_RESULTS)) and not isinstance(model, type):
            break
        kept.append(part)
    return kept


def _keys(path: list[str]) -> list[str]:
    """The keys that a block of the recipe has."""
    model = annotation_of(path)
    return list((model if hasattr(model, "model_fields") else Recipe).model_fields)


def annotation_of(path: Iterable[str]) -> Any:
    """Returns the type at a dotted place of the recipe: a block of settings, or that of a field; None where there is no such place."""
    model: Any = Recipe
    for part in path:
        if get_origin(model) is dict:
            model = get_args(model)[1]
        elif part in (fields := getattr(model, "model_fields", {})):
            model = _block(fields[part].annotation)
        else:
            return None
    return model


def _entry(annotation: Any) -> Any:
    """The block that each entry of a mapping has, as `forgetting`; None of any other annotation."""
    blocks = get_args(annotation)[1:] if get_origin(annotation) is dict else ()
    return next((each for each in blocks if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _block(annotation: Any) -> Any:
    """The block of settings in an annotation such as `ModelSizes | None`; another annotation as it is."""
    options = (annotation, *(() if get_origin(annotation) is dict else get_args(annotation)))
    return next((each for each in options if isinstance(each, type) and issubclass(each, BaseModel)), annotation)
