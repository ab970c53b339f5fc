"""Overrides, KEY=VALUE on the command line, applied to a tree of settings."""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from ruamel.yaml.error import YAMLError

from loralab.config.mistakes import annotation_of
from loralab.config.recipe import BESIDE_RESULTS, Tree, set_key
from loralab.config.yaml_tree import load_yaml, shortened, shown
from loralab.errors import nearest

TEXT = {str, type(None)}  # kinds of a field that holds a text
NULLS = ("null", "Null", "NULL", "~")
QUOTED = re.compile(r"""\s*(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")\s*""", re.DOTALL)


def apply_override(tree: Tree, override: str) -> str | None:
    """Applies one override in place; returns the mistake where there is one."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{shown(override)}: an override is written key=value, such as lora.rank=32"
    if key != key.strip():
        return f"{shown(override)}: blanks stand around the =; write {key.strip()}={text.strip()}"
    path, variants = key.split("."), tree.get("variants")
    kinds = _kinds(path)
    if "," in text and text.lstrip()[:1] not in ("[", "{", '"', "'") and str not in kinds and _takes_list(kinds):
        return f"{key}: a list is written in brackets: {key}=[{text}]"
    try:
        value = _value(text, kinds)
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
    """Returns what the field of a dotted key may hold, such as {str, None's type}; nothing where there is no such field."""
    held = annotation_of(path[2:] if path[0] == "variants" else path)
    return set(get_args(held)) if get_origin(held) in (Union, UnionType) else {held}


def _takes_list(kinds: set[Any]) -> bool:
    """Tells whether a field of these kinds holds a list."""
    inner = {get_origin(get_args(kind)[0]) if get_origin(kind) is Annotated else get_origin(kind) for kind in kinds}
    return bool(inner & {tuple, list})


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
