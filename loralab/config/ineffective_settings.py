"""Settings without effect: a table of keys and of the combinations in which nothing reads them.

What is checked inside one block (a tokenizer without random weights, a temperature without draws) stands with the block. This table
is about blocks together, and about who has given a setting:

- an override, or a variant, that gives a setting without effect is an error;
- so is a file that gives a setting together with what makes it moot;
- a setting of the file that an override or a variant makes moot is none: `training.method=full` need not unset the rank.

A recipe that loralab has stored names every setting, and its file is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from loralab.config.lora import LoRASpec
from loralab.config.recipe import BESIDE_RESULTS, Recipe, Tree
from loralab.config.training import OptimizerSettings, TrainingSettings

SETTINGS = ("model", "data", "lora", "training", "optimizer", "validation", "evaluation")
OUTSIDE_VARIANTS = ("name", "description", "variants", *BESIDE_RESULTS, "published_source", "next_steps")
STORED = 0.7  # of a block's keys: more are given in a recipe that loralab has stored


@dataclass(frozen=True)
class Ineffective:
    """Keys that nothing reads where `holds`."""

    keys: tuple[str, ...]
    holds: Callable[[Recipe], bool]
    because: str
    """The rest of the sentence "KEY has no effect …"."""
    unless_file: Callable[[Recipe], bool] = lambda recipe: False
    """Tells where a file may give the keys all the same, for overrides that make use of them."""


def _of(block: str, model: type[BaseModel], but: tuple[str, ...] = ()) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in model.model_fields if name not in but)


def _method(*methods: str) -> Callable[[Recipe], bool]:
    return lambda recipe: recipe.training.method in methods


def _reads_validation(recipe: Recipe) -> bool:
    measures = recipe.validation.every is not None or recipe.chooses is not None
    return recipe.evaluation.split == "validation" or (measures and recipe.training.method != "none")


def _bounds_what_is_read(recipe: Recipe) -> bool:
    """Says whether the evaluated split is bounded: bounds of the others then wait for an override of evaluation.split."""
    return recipe.data.max_rows(recipe.evaluation.split) is not None


def _percentile(side: str) -> Callable[[Recipe], bool]:
    return lambda recipe: not isinstance(getattr(recipe.data, f"max_{side}_length"), str)


UPDATES = _of("lora", LoRASpec, but=("disabled",))
VALIDATION = tuple(f"validation.{key}" for key in ("rows", "metrics", "metric", "samples"))
IDLE = (
    Ineffective(
        (*UPDATES, *_of("training", TrainingSettings, but=("method", "seed")), *_of("optimizer", OptimizerSettings),
         "validation", "model.dropout"),
        _method("none"), "with training.method none, which trains nothing",
    ),
    Ineffective(UPDATES, _method("full"), "with training.method full, which trains every weight and has no adapter"),
    Ineffective(UPDATES, _method("head"), "with training.method head, which trains the head alone"),
    Ineffective(("optimizer.lora_plus_ratio",), _method("full", "head"), "without training.method lora: it is about LoRA's B"),
    Ineffective(("training.head",), _method("full", "head"), "without training.method lora: full and head train the head in any case"),
    Ineffective(
        ("training.epochs",), lambda recipe: recipe.training.max_steps is not None,
        "with training.max_steps, which counts steps instead", unless_file=lambda recipe: True,
    ),
    Ineffective(("training.frozen_dropout",), _method("lora", "full"), "without training.method head"),
    Ineffective(
        ("lora.use_rslora",), lambda recipe: recipe.lora.alpha is None and not recipe.lora.alpha_pattern,
        "where lora.alpha is null: the scale is then 1. Give lora.alpha",
    ),
    Ineffective(("lora.shared_dropout",), lambda recipe: recipe.lora.dropout == 0, "where lora.dropout is 0"),
    Ineffective(("lora.bias",), lambda recipe: recipe.lora.tune_vectors, "with lora.tune_vectors, which trains every bias"),
    Ineffective(
        ("data.max_test_rows",), lambda recipe: recipe.evaluation.split != "test",
        "where evaluation.split is not test: no row of that split is read",
        unless_file=_bounds_what_is_read,
    ),
    Ineffective(
        ("data.max_validation_rows",), lambda recipe: not _reads_validation(recipe),
        "where evaluation.split is not validation and nothing is measured while training (validation.every is null, or "
        "training.method none): no row of that split is read",
        unless_file=_bounds_what_is_read,
    ),
    Ineffective(
        ("data.pick_rows",), lambda recipe: all(recipe.data.max_rows(split) is None for split in ("train", "validation", "test")),
        "without data.max_train_rows, data.max_validation_rows or data.max_test_rows: all rows are used",
    ),
    Ineffective(("data.expected.source_length",), _percentile("source"), "where data.max_source_length is a number of tokens"),
    Ineffective(("data.expected.target_length",), _percentile("target"), "where data.max_target_length is a number of tokens"),
    Ineffective(
        VALIDATION, lambda recipe: recipe.validation.every is None and recipe.chooses is None,
        "where validation.every is null: nothing is measured while training",
    ),
    Ineffective(
        ("evaluation.seed",), lambda recipe: not (recipe.evaluation.sample or recipe.evaluation.shots),
        "without evaluation.sample or evaluation.shots: nothing is drawn",
    ),
    Ineffective(
        ("evaluation.max_new_tokens",), lambda recipe: recipe.data.has_head,
        "with data.label: a classifier writes nothing",
    ),
    Ineffective(
        ("published_source",), lambda recipe: not (recipe.published or recipe.published_epochs),
        "without published figures",
    ),
)  # fmt: skip


def without_effect(file: Tree, given: Tree, recipe: Recipe) -> list[str]:
    """The settings that were given and have no effect, each with the reason.

    Args:
        file: the settings before overrides.
        given: those of the overrides alone.
        recipe: what both make.
    """
    after = _with_variants(recipe)
    mistakes = _idle_of(given, after, explicit=True)
    if not is_stored(file) and (before := _recipes(file)) is not None:
        earlier = _idle_of(file, before, explicit=False)
        mistakes |= {key: why for key, why in _idle_of(file, after, explicit=False).items() if key in earlier}
    return [f"{key} has no effect {why}. Remove it." for key, why in mistakes.items()]


def is_stored(tree: Tree) -> bool:
    """Says whether a tree names so many settings that loralab must have written it."""
    for name in SETTINGS:
        block, model = tree.get(name), Recipe.model_fields[name].annotation
        if not isinstance(block, dict) or len(block) < STORED * len(getattr(model, "model_fields", ())):
            return False
    return True


def _recipes(tree: Tree) -> dict[str | None, Recipe] | None:
    """A tree's recipe and its variants; None where it is no recipe without overrides."""
    try:
        return _with_variants(Recipe.model_validate(tree))
    except ValueError:  # pydantic's, or a RecipeError
        return None


def _with_variants(recipe: Recipe) -> dict[str | None, Recipe]:
    """The recipe itself, by None, and those of its variants."""
    found: dict[str | None, Recipe] = {None: recipe}
    return found | {name: recipe.variant(name) for name in recipe.variants}


def _idle_of(tree: Tree, recipes: Mapping[str | None, Recipe], explicit: bool) -> dict[str, str]:
    """Given key -> why it has no effect in any of the recipes that take it."""
    found: dict[str, str] = {}
    for key, value in _leaves({name: value for name, value in tree.items() if name != "variants"}):
        takers = [each for name, each in recipes.items() if name is None or not _has(tree, name, key)]
        if not _is_default(key, value, explicit) and (why := _reason(key, takers, explicit)):
            found[key] = why
    variants = tree.get("variants")
    for name, overrides in variants.items() if isinstance(variants, dict) else ():
        for key, value in _leaves(overrides) if name in recipes else ():
            if key.split(".")[0] in OUTSIDE_VARIANTS:
                found[f"variants.{name}.{key}"] = "in a variant: it is of the recipe as a whole"
            elif not _is_default(key, value, True) and (why := _reason(key, [recipes[name]], True)):
                found[f"variants.{name}.{key}"] = why
    return found


def _reason(key: str, recipes: list[Recipe], explicit: bool) -> str | None:
    """Why a key has no effect, told of the first recipe; None where one of them reads it."""
    rules = [rule for rule in IDLE if _about(rule, key)]
    reasons = [next((rule.because for rule in rules if _holds(rule, each, explicit)), None) for each in recipes]
    return None if None in reasons else reasons[0]


def _holds(rule: Ineffective, recipe: Recipe, explicit: bool) -> bool:
    return rule.holds(recipe) and (explicit or not rule.unless_file(recipe))


def _about(rule: Ineffective, key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in rule.keys)


def _has(tree: Tree, variant: str, key: str) -> bool:
    overrides = (tree.get("variants") or {}).get(variant)
    return isinstance(overrides, dict) and any(key == given for given, _ in _leaves(overrides))


def _leaves(tree: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting in a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _is_default(key: str, value: Any, explicit: bool) -> bool:
    """Says whether a value asks for nothing: null, false, zero, empty; or, in a file, what would be so without it."""
    block, _, name = key.partition(".")
    fields = getattr(Recipe.model_fields[block].annotation, "model_fields", {})
    default = fields[name].default if name in fields else None
    if not value:
        return default is not True  # which false switches off
    return not explicit and bool((list(default) if isinstance(default, tuple) else default) == value)
