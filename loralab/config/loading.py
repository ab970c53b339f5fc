"""From a recipe's file and its overrides to a Recipe, or to all the mistakes in them at once.

YAML 1.2: `1e-3` is a number and a repeated key is an error. Overrides are dotted: `lora.rank=32`,
`variants.full.optimizer.learning_rate=1e-4`, `variants=[zero-shot, full]` (of the recipe's variants, these).
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from loralab.config.ineffective_settings import without_effect
from loralab.config.mistakes import find_mistakes
from loralab.config.overrides import apply_override
from loralab.config.recipe import BESIDE_RESULTS, Recipe, Tree
from loralab.config.yaml_tree import LINE, load_yaml, out_of_bounds, shortened
from loralab.errors import RecipeError, nearest, nearest_file

MOST_LINES = 20  # mistakes that are told


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a shipped name, with overrides such as "lora.rank=32" applied.

    Raises:
        RecipeError: all mistakes of the file, of the overrides and of every variant, at once.
    """
    return recipe_from_tree(read_tree(name_or_path), overrides, str(name_or_path))


def recipe_of(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | Sequence[str]) -> Recipe:
    """Returns the recipe of a shipped name, a file, settings, or a recipe, with overrides applied.

    Args:
        overrides: {"lora.rank": 32}, {"lora": {"rank": 32}} or ["lora.rank=32"].

    Raises:
        RecipeError: as `load_recipe`.
    """
    if isinstance(recipe, Recipe):
        return recipe_from_tree(recipe.model_dump(mode="json"), spelt(overrides), recipe.name) if overrides else recipe
    if isinstance(recipe, Mapping):
        return recipe_from_tree({"name": "recipe", **recipe}, spelt(overrides), "that was given")
    return load_recipe(recipe, spelt(overrides))


def spelt(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Returns overrides as they are typed: "lora.rank=32"."""
    if not isinstance(overrides, Mapping):
        return [overrides] if isinstance(overrides, str) else list(overrides)
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        block = isinstance(value, Mapping) and key in Recipe.model_fields and key not in ("variants", *BESIDE_RESULTS)
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if block else {key: value}
    return [f"{key}={json.dumps(value, default=str)}" for key, value in flat.items()]


def read_tree(name_or_path: str | Path) -> Tree:
    """The settings of a file, or of a shipped name, unchecked. Raises RecipeError where there is none."""
    text, name = _read(str(name_or_path))
    return {"name": name} | parse_tree(text, str(name_or_path))


def settings_of(overrides: Sequence[str]) -> Tree:
    """The settings that overrides alone make; their mistakes are for `recipe_from_tree` to tell."""
    tree: Tree = {}
    for override in overrides:
        apply_override(tree, override)
    return tree


def recipe_from_tree(tree: Tree, overrides: Sequence[str], where: str, lenient: bool = False) -> Recipe:
    """The recipe of settings that were read already, with overrides applied; raises RecipeError as `load_recipe` does.

    Args:
        lenient: settings without effect are no mistakes, as where a command reads more than a run of the recipe would.
    """
    _refuse(out_of_bounds(tree), where)
    file, tree = tree, copy.deepcopy(tree)
    mistakes = [mistake for override in overrides if (mistake := apply_override(tree, override))]
    _refuse([*mistakes, *(out_of_bounds(tree) or find_mistakes(tree))], where)
    recipe = Recipe.model_validate(tree)
    if not lenient:
        _refuse(without_effect(file, settings_of(overrides), recipe), where)
    return recipe


def _refuse(mistakes: Sequence[str], where: str) -> None:
    """Raises RecipeError where there are mistakes."""
    if not mistakes:
        return
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    lines = [f"  {shortened(mistake, LINE)}" for mistake in mistakes[:MOST_LINES]]
    if len(mistakes) > MOST_LINES:
        lines.append(f"  and {len(mistakes) - MOST_LINES} more")
    raise RecipeError(f"{count} in the recipe {where}:\n" + "\n".join(lines))


def shipped_recipes() -> dict[str, str]:
    """Name -> text of every recipe that comes with loralab."""
    folder = resources.files("loralab") / "recipes"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included; it can be fed back."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.is_file():
        return _text(path), path.stem
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path], name_or_path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        beside = nearest_file(path) or (f" Did you mean {path.stem!r}?" if path.stem in shipped else "")
        raise RecipeError(f"There is no recipe file {name_or_path}.{beside}")
    raise RecipeError(
        f"There is no recipe {name_or_path!r}, neither a file nor a shipped one. {nearest(name_or_path, shipped)}"
    )


def stored_tree(path: Path) -> Tree:
    """The settings in a file, unchecked."""
    return parse_tree(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8: {error}. Save it in UTF-8.") from error


def parse_tree(text: str, where: str) -> Tree:
    """The settings in a YAML text, unchecked."""
    try:
        tree = load_yaml(text)
    except YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{where} holds {type(tree).__name__}, not a mapping of settings.")
    return tree
