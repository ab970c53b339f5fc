"""Every setting in every mode of work: refused where nothing reads it, taken everywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from workshop import loralab

from loralab.config.ineffective_settings import IDLE, SETTINGS, is_stored, without_effect
from loralab.config.loading import load_recipe, parse_tree, recipe_from_tree, shipped_recipes, to_yaml
from loralab.config.recipe import Recipe, Tree
from loralab.errors import RecipeError

TREE: Tree = {
    "name": "r",
    "model": {"name": "m"},
    "data": {"name": "d", "source": "s", "target": "t"},
}
# A value for each key that is no default, and what must stand beside it to be read where nothing else is said.
VALUES: dict[str, Any] = {
    "model.name": "other", "model.device": "cpu", "model.dtype": "float32", "model.quantize": "int8",
    "model.quantize_except": ["wo"], "model.dropout": 0.2, "model.engine": "torch", "model.init": "random",
    "model.sizes": {"layers": 2}, "model.tokenizer": "train", "model.vocabulary": 100,
    "data.name": "other", "data.source": "text", "data.target": "text", "data.messages": "m", "data.objective": "mixed",
    "data.packing": True, "data.label": "l", "data.labels": {"a": "x", "b": "y"}, "data.prompt": "{s}!",
    "data.max_source_length": 64, "data.max_target_length": 32, "data.max_train_rows": 5, "data.max_validation_rows": 5,
    "data.max_test_rows": 5, "data.pick_rows": "random", "data.expected.train_rows": 9, "data.expected.source_length": 9,
    "data.expected.target_length": 9, "data.empty_rows": "stop", "data.duplicate_rows": "skip", "data.long_rows": "skip",
    "data.html_breaks": "newline", "data.text_pair": "other", "data.problem_type": "regression",
    "lora.rank": 4, "lora.rules": ["q"], "lora.alpha": 8.0, "lora.dropout": 0.1, "lora.shared_dropout": False,
    "lora.tune_vectors": True, "lora.bias": "all", "lora.modules_to_save": ["x"], "lora.rank_pattern": {"q": 2},
    "lora.alpha_pattern": {"q": 2.0}, "lora.use_rslora": True, "lora.use_dora": True, "lora.init": "gaussian", "lora.seed": 3,
    "training.epochs": 2, "training.batch_size": 4, "training.tokens_per_batch": 64, "training.accumulate": 2,
    "training.label_smoothing": 0.1, "training.gradient_checkpointing": True, "training.save_every": 5,
    "training.trackers": ["wandb"], "training.start_from": "x", "training.seed": 3, "training.head": "trained",
    "training.frozen_dropout": True, "training.max_steps": 7, "training.max_minutes": 9.0,
    "optimizer.learning_rate": 0.1, "optimizer.scale_parameter": True, "optimizer.weight_decay": 0.1,
    "optimizer.lora_plus_ratio": 4.0, "optimizer.warmup_ratio": 0.1, "optimizer.warmup_steps": 3,
    "optimizer.schedule": "cosine", "optimizer.max_grad_norm": 2.0,
    "validation.every": 5, "validation.rows": 5, "validation.metrics": ["bleu"], "validation.metric": "rouge1",
    "validation.keep": "best", "validation.samples": 2, "validation.patience": 2,
    "evaluation.split": "train", "evaluation.max_new_tokens": 9, "evaluation.shots": 1, "evaluation.metrics": ["bleu"],
    "evaluation.beams": 2, "evaluation.length_penalty": 2.0, "evaluation.early_stopping": True, "evaluation.sample": True,
    "evaluation.temperature": 0.5, "evaluation.top_k": 5, "evaluation.top_p": 0.5, "evaluation.repetition_penalty": 1.2,
    "evaluation.stop": ["x"], "evaluation.seed": 3,
}  # fmt: skip
CLASSIFIES = {"data.label": "l", "data.target": None}
MODES: dict[str, dict[str, Any]] = {
    "lora": {"lora.alpha": 16, "lora.dropout": 0.2},
    "plain lora": {},
    "trained vectors": {"lora.tune_vectors": True},
    "none": {"training.method": "none"},
    "full": {"training.method": "full"},
    "labels": CLASSIFIES,
    "head": CLASSIFIES | {"training.method": "head"},
    "split validation": {"evaluation.split": "validation"},
    "split train": {"evaluation.split": "train"},
    "not validated": {"validation.every": None},
    "pilot alone": {"validation.every": None, "optimizer.learning_rate": "pilot"},
    "split validation, not validated": {"evaluation.split": "validation", "validation.every": None},
    "drawn": {"evaluation.sample": True},
    "shots": {"evaluation.shots": 1},
    "bounded": {"data.max_train_rows": 9},
    "percentiles": {"data.max_source_length": "p90", "data.max_target_length": "p90"},
}
LORA = {key for key in VALUES if key.startswith("lora.")}
TRAINING = {key for key in VALUES if key.startswith("training.")} - {"training.seed"}
OPTIMIZER, VALIDATION = (
    {key for key in VALUES if key.startswith(f"{block}.")} for block in ("optimizer", "validation")
)
LENGTHS = {"data.expected.source_length", "data.expected.target_length"}
DRAWS, PICKS, FROZEN = {"evaluation.seed"}, {"data.pick_rows"}, {"training.frozen_dropout"}
MEASURED = {f"validation.{key}" for key in ("rows", "metrics", "metric", "samples")}
USUAL = DRAWS | PICKS | LENGTHS | FROZEN
UNSCALED = {"lora.use_rslora", "lora.shared_dropout"}
SILENT = {"evaluation.max_new_tokens"}
PLUS = {"optimizer.lora_plus_ratio", "training.head"}
# What each mode has no use for; all else is read.
TABLE: dict[str, set[str]] = {
    "lora": USUAL,
    "plain lora": USUAL | UNSCALED,
    "trained vectors": USUAL | UNSCALED | {"lora.bias"},
    "none": USUAL | LORA | TRAINING | OPTIMIZER | VALIDATION | {"model.dropout", "data.max_validation_rows"},
    "full": USUAL | LORA | PLUS,
    "labels": USUAL | UNSCALED | SILENT,
    "head": USUAL - FROZEN | LORA | PLUS | SILENT,
    "split validation": USUAL | UNSCALED | {"data.max_test_rows"},
    "split train": USUAL | UNSCALED | {"data.max_test_rows"},
    "not validated": USUAL | UNSCALED | MEASURED | {"data.max_validation_rows"},
    "pilot alone": USUAL | UNSCALED,
    "split validation, not validated": USUAL | UNSCALED | MEASURED | {"data.max_test_rows"},
    "drawn": USUAL - DRAWS | UNSCALED,
    "shots": USUAL - DRAWS | UNSCALED,
    "bounded": USUAL - PICKS | UNSCALED,
    "percentiles": USUAL - LENGTHS | UNSCALED,
}


def mistakes_of(tree: Tree, *overrides: str) -> list[str]:
    """What is said of a recipe."""
    try:
        recipe_from_tree(tree, overrides, "r")
    except RecipeError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def refused(tree: Tree, *overrides: str) -> str:
    """What is said of settings without effect; "" where there are none. Other mistakes are told before these."""
    return "\n".join(line for line in mistakes_of(tree, *overrides) if " has no effect " in line)


def idle_of(tree: Tree, key: str) -> list[str] | None:
    """What is said of one of these settings; None where they do not go together by the rules of their blocks, which is as good."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError:
        return None
    return [line for line in without_effect({}, tree, recipe) if line.startswith(key)]


def with_key(tree: Tree, key: str, value: Any) -> Tree:
    """A copy of the settings with one more."""
    changed: Tree = json.loads(json.dumps(tree))
    *blocks, name = key.split(".")
    place = changed
    for block in blocks:
        place = place.setdefault(block, {})
    place[name] = value
    return changed


def test_the_values_are_of_every_key() -> None:
    """A new key of a recipe needs a value here, and a thought about when nothing reads it."""
    keys = set()
    for block in SETTINGS:
        fields: dict[str, Any] = getattr(Recipe.model_fields[block].annotation, "model_fields", {})
        keys |= {f"{block}.{name}" for name in fields}
    assert keys - set(VALUES) == {"data.expected", "lora.disabled", "training.method"}
    assert {key for rule in IDLE for key in rule.keys} <= {*VALUES, "validation", "published_source"}


@pytest.mark.parametrize("mode", MODES)
def test_every_key_in_every_mode(mode: str) -> None:
    tree = TREE
    for key, value in MODES[mode].items():
        tree = with_key(tree, key, value)
    found = set()
    for key, value in VALUES.items():
        said = None if key in MODES[mode] else idle_of(with_key(tree, key, value), key)
        if said or (said is None and key in TABLE[mode]):
            found.add(key)
    assert found == TABLE[mode]


@pytest.mark.parametrize(
    ("key", "value", "cause", "makes"),
    [
        ("lora.rank", 4, "training.method", "full"),
        ("lora.dropout", 0.1, "training.method", "none"),
        ("training.epochs", 3, "training.method", "none"),
        ("optimizer.weight_decay", 0.1, "training.method", "none"),
        ("model.dropout", 0.1, "training.method", "none"),
        ("data.max_test_rows", 5, "evaluation.split", "validation"),
        ("validation.rows", 5, "validation.every", None),
    ],
)
def test_who_has_given_a_setting_decides(key: str, value: Any, cause: str, makes: Any) -> None:
    given, reason = f"{key}={json.dumps(value)}", f"{cause}={json.dumps(makes)}"
    with_one, with_both = with_key(TREE, key, value), with_key(with_key(TREE, key, value), cause, makes)
    assert refused(with_both), "both stand in the file"
    assert refused(TREE, given, reason), "both are overrides"
    assert refused(with_key(TREE, cause, makes), given), "an override gives what the file has no use for"
    assert refused(TREE | {"variants": {"v": {cause: makes, key: value}}}), "both stand in a variant"
    assert refused(with_key(TREE, cause, makes) | {"variants": {"v": {key: value}}}).startswith(f"variants.v.{key} ")
    assert not refused(with_one, reason), "an override makes moot what the file says"
    assert not refused(with_one | {"variants": {"v": {cause: makes}}}), "so does a variant"
    ordinary = None if cause == "training.method" else {"evaluation.split": "test", "validation.every": "epoch"}[cause]
    if ordinary is not None:
        assert not refused(with_both, f"{cause}={ordinary}"), "an override puts a file right"


def test_a_setting_of_the_whole_recipe_that_one_variant_reads_has_an_effect() -> None:
    tree = TREE | {"training": {"method": "full"}, "lora": {"rank": 4}}
    assert refused(tree).startswith("lora.rank has no effect")
    assert not refused(tree | {"variants": {"lora": {"training.method": "lora"}}})
    own = {"lora": {"training.method": "lora", "lora.rank": 2}, "full": {}}
    assert refused(tree | {"variants": own}), "a variant with its own reads that"


def test_a_variant_has_no_name_and_no_variants() -> None:
    for key, value in (
        ("name", "x"),
        ("description", "x"),
        ("published_source", "x"),
        ("next_steps", ["x"]),
    ):
        said = refused(TREE | {"variants": {"v": {key: value}}})
        assert "in a variant: it is of the recipe as a whole" in said and said.startswith(f"variants.v.{key}"), said


def test_bounds_of_all_splits_wait_in_a_file_for_the_one_that_is_evaluated() -> None:
    bounds = {"max_validation_rows": 5, "max_test_rows": 5}
    both = TREE | {"data": TREE["data"] | bounds, "validation": {"every": None}}
    assert not refused(both) and not refused(both, "evaluation.split=validation")
    assert refused(both, "data.max_validation_rows=3"), "an override has its effect now or never"


def test_what_asks_for_nothing_is_no_mistake() -> None:
    empty = [
        "lora.rules=null",
        "lora.use_dora=false",
        "lora.dropout=0",
        "optimizer.warmup_steps=0",
        "training.trackers=[]",
    ]
    assert not refused(TREE, "training.method=none", *empty)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_and_what_runs_store_are_taken(name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(name, ["evaluation.split=validation"]).evaluation.split == "validation"
    for each in (recipe, *map(recipe.variant, recipe.variants)):
        stored = parse_tree(to_yaml(each), "stored")
        assert is_stored(stored) and recipe_from_tree(stored, [], "stored") == each
    assert not is_stored(parse_tree(shipped_recipes()[name], name))


def test_the_command_says_it_and_trains_nothing(workshop: Path) -> None:
    given = ["training.method=full", "lora.rank=2", "--out", "idle"]
    done = loralab(workshop, "train", "tiny.yaml", *given, code=2)
    assert "lora.rank has no effect with training.method full" in done.stderr and not (workshop / "idle").exists()
