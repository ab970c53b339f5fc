"""From a recipe's file and its overrides to a Recipe, or to all the mistakes in them at once.

YAML 1.2: `1e-3` is a number and a repeated key is an error. Overrides are dotted: `lora.rank=32`,
`variants.full.optimizer.learning_rate=1e-4`, `variants=[zero-shot, full]` (of the recipe's variants, these).
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from loralab.config.ineffective_settings import without_effect
from loralab.config.recipe import BESIDE_RESULTS, Recipe, Tree, set_key, with_overrides
from loralab.config.yaml_tree import LINE, load_yaml, out_of_bounds, shortened, shown
from loralab.errors import RecipeError, nearest, nearest_file

TEXT = {str, type(None)}  # kinds of a field that holds a text
NULLS = ("null", "Null", "NULL", "~")
MOST_LINES = 20  # mistakes that are told
BLOCK = re.compile(r"a valid dictionary( or instance of \w+)?")
QUOTED = re.compile(r"""\s*(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a shipped name, with overrides such as "lora.rank=32" applied.

    Raises:
        RecipeError: all mistakes of the file, of the overrides and of every variant, at once.
    """
    return recipe_from_tree(read_tree(name_or_path), overrides, str(name_or_path))


def read_tree(name_or_path: str | Path) -> Tree:
    """The settings of a file, or of a shipped name, unchecked. Raises RecipeError where there is none."""
    text, name = _read(str(name_or_path))
    return {"name": name} | parse_tree(text, str(name_or_path))


def settings_of(overrides: Sequence[str]) -> Tree:
    """The settings that overrides alone make; their mistakes are for `recipe_from_tree` to tell."""
    tree: Tree = {}
    for override in overrides:
        _apply(tree, override)
    return tree


def recipe_from_tree(tree: Tree, overrides: Sequence[str], where: str, lenient: bool = False) -> Recipe:
    """The recipe of settings that were read already, with overrides applied; raises RecipeError as `load_recipe` does.

    Args:
        lenient: settings without effect are no mistakes, as where a command reads more than a run of the recipe would.
    """
    _refuse(out_of_bounds(tree), where)
    file, tree = tree, copy.deepcopy(tree)
    mistakes = [mistake for override in overrides if (mistake := _apply(tree, override))]
    _refuse([*mistakes, *(out_of_bounds(tree) or _check(tree))], where)
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


# Overrides


def _apply(tree: Tree, override: str) -> str | None:
    """Applies one override in place; returns the mistake where there is one."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{shown(override)}: an override is written key=value, such as lora.rank=32"
    path, variants = key.split("."), tree.get("variants")
    try:
        value = _value(text, _kinds(path))
    except YAMLError:
        quotes = "single quotes" if QUOTED.fullmatch(text) else "quotes"
        return f"{key}: {shown(text)} is not a YAML value; put it in {quotes}"
    if key == "variants" and isinstance(value, list):
        return _choose_variants(tree, value)
    if path[0] == "variants" and len(path) > 2 and isinstance(variants, dict) and path[1] not in variants:
        whole = f"'variants.{path[1]}={{{'.'.join(path[2:])}: {text}}}'"
        return f"{key}: there is no variant {path[1]!r}. {nearest(path[1], variants)} A new one is given whole: {whole}"
    return set_key(tree, path, value, key)


def _value(text: str, kinds: set[Any]) -> Any:
    """A YAML value, where that is a number, null, or a list or a mapping in brackets; any other text stands as it is given.

    A field that is of the kind text is never anything else, so that `data.prompt=[x] {text} # y` is what it looks like. What
    stands in quotes as a whole is YAML's everywhere.
    """
    if kinds <= TEXT and str in kinds and not QUOTED.fullmatch(text):
        return None if not text or (text in NULLS and type(None) in kinds) else text
    brackets = text.lstrip()[:1] in ("{", "[")
    try:
        value = load_yaml(text)
    except YAMLError:
        if brackets or QUOTED.fullmatch(text):
            raise
        return text
    literal = isinstance(value, str) and not QUOTED.fullmatch(text)
    return text if literal or (isinstance(value, (dict, list)) and not brackets) else value


def _kinds(path: list[str]) -> set[Any]:
    """What the field of a dotted key may hold, such as {str, None's type}; nothing where there is no such field."""
    held = _annotation(path[2:] if path[0] == "variants" else path)
    return set(get_args(held)) if get_origin(held) in (Union, UnionType) else {held}


def _choose_variants(tree: Tree, names: list[Any]) -> str | None:
    """`variants=[zero-shot, lora-8]` keeps these of the recipe's variants, in this order."""
    known = tree.get("variants") or {}
    if not isinstance(known, dict):
        return f"variants: names of variants can be chosen where the recipe has some; it has {shown(known)}"
    for name in names:
        if not isinstance(name, str) or name not in known:
            return f"variants: there is no variant {shown(name)}. {nearest(shortened(str(name)), known)}"
    tree["variants"] = {name: known[name] for name in names}
    for block in BESIDE_RESULTS:
        if isinstance(figures := tree.get(block), dict):
            tree[block] = {name: each for name, each in figures.items() if name in names}
    return None


# Checking


def _check(tree: Tree) -> list[str]:
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
    """What does not fit a variant of the recipe as it is stored, with its defaults: a variant that changes the task, for one, names
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
    """What several kinds of value could have been expected of one key, in one line."""
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
    model = _annotation(path)
    return list((model if hasattr(model, "model_fields") else Recipe).model_fields)


def _annotation(path: Iterable[str]) -> Any:
    """What stands at a dotted place of the recipe: a block of settings, or what a field may hold; None where there is no such place."""
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
