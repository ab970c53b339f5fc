"""YAML text -> a tree of settings, and the bounds of such a tree: its depth, its size, its keys and its whole numbers.

Files and overrides come from anywhere. What is beyond these bounds is told in a line, before anything else looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

DEEPEST, MOST, LARGEST = 20, 100_000, 2**63 - 1
UNREADABLE = (ValueError, OverflowError, LookupError, TypeError, AttributeError)  # of ruamel.yaml, beside its own
SHOWN, LINE = 120, 1000  # characters of a value, and of a whole mistake
LABELS = re.compile(
    r"(.*\.)?labels"
)  # the block of data whose keys are a column's values, numbers or true and false too


def load_yaml(text: str) -> Any:
    """The value of a YAML 1.2 text. Raises YAMLError where it is none, or none that Python can hold."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise YAMLError(
            f"its brackets or blocks are nested too deeply; at most {DEEPEST} levels are allowed"
        ) from error
    except UNREADABLE as error:  # such as a number of 5,000 digits, a date that does not exist, `!!bool x`
        raise YAMLError(f"it holds a value that cannot be read ({shortened(str(error))})") from error


def out_of_bounds(tree: Any) -> list[str]:
    """Returns what makes a tree unfit to be looked at as a recipe; nothing where it is fit. Stops at the first place that is too deep."""
    mistakes: list[str] = []
    for count, (path, value) in enumerate(_places(tree)):
        key = shortened(".".join(map(_name, path)))
        if len(path) > DEEPEST:
            return [*mistakes, f"{key}: nested too deeply; at most {DEEPEST} levels are allowed"]
        if count > MOST:
            return [*mistakes, f"there are more than {MOST:,} values; a recipe has a few hundred"]
        parent = ".".join(map(str, path[:-1]))
        if path and isinstance(path[-1], _Other) and not LABELS.fullmatch(parent):
            mistakes.append(f"{key}: expected a name as key; got {path[-1]}. Write it as a text, in quotes")
        if isinstance(value, int) and abs(value) > LARGEST:
            mistakes.append(f"{key}: expected a number below 2^63; got one of {value.bit_length()} bits")
    return mistakes


class _Other(str):
    """A key that is no text, as it is shown."""


def _places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with its path, containers before what they hold. One that holds itself is endless."""
    yield path, tree
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _places(value, (*path, key if isinstance(key, str) else _Other(shown(key))))
    elif isinstance(tree, (list, tuple, set)):
        for place, value in enumerate(tree):
            yield from _places(value, (*path, str(place)))


def _name(part: str) -> str:
    return shortened(part, 40)


def shown(value: Any) -> str:
    """A value as it stands in a message: never long, however long it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a number of {value.bit_length()} bits"
    return shortened(repr(value[: SHOWN + 1] if isinstance(value, str) else value))


def shortened(text: str, length: int = SHOWN) -> str:
    """The text, with its middle left out where it is longer."""
    if len(text) <= length:
        return text
    end = length // 4
    return f"{text[: length - end]} … {text[-end:]}"
