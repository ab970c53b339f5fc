"""A file of one's own -> a whole recipe: `loralab train --data my.csv`.

The columns are looked at and chosen (data/column_detection.py); all else is what the shipped recipe `own-data` says, or, where a
recipe is named too, that recipe with this data block in the place of its own. Overrides come last, as always.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loralab.config.data import DataSettings
from loralab.config.loading import read_tree, recipe_from_tree, settings_of
from loralab.config.lora_scale import changed_scales
from loralab.config.recipe import Recipe, Tree
from loralab.console.progress import say
from loralab.data.column_detection import AS_GIVEN, Choices, Table, choose, look_at
from loralab.data.columns import row_columns, with_columns
from loralab.data.readers import READERS, stem_of, suffix_of
from loralab.data.rows import Findings, checked_rows, policies_of
from loralab.data.sources import open_place, split_files, splits_of
from loralab.errors import RecipeError

DEFAULTS = "own-data"
OF_OTHER_DATA = ("published", "published_source", "description", "next_steps")  # what a recipe says of its own data
METRICS = ("evaluation", "metrics")
LENGTHS = (("data", "max_source_length"), ("data", "max_target_length"))  # percentiles
BYTES_A_TOKEN = 2  # at least, in most languages and vocabularies: an answer gets room for that
SHORTEST, LONGEST = 16, 256  # answers, in tokens


def recipe_for(data: str, name: str | None, overrides: Sequence[str], command: str) -> Recipe:
    """The recipe that trains on `data`, and what was found there, said.

    Args:
        data: what `data.name` may be; of a folder with one file of any name, that file.
        name: a recipe whose data block gives way; None for the shipped defaults.
        command: "train" or "compare", for advice.

    Raises:
        DataError: the data cannot be read, or it is not clear which columns are meant.
        RecipeError: as `load_recipe`; or the overrides name other data.
    """
    given = given_data(data, overrides)
    place = the_file(data)
    words = ["loralab", command, *([name] if name else []), "--data", data]
    table = look_at(place, open_place(place, "train").records())
    choices = {} if {"messages", "objective", "label"} & given.keys() else chosen(table, given, shlex.join(words))
    tree = tree_for(place, name, table, choices)
    for block, key in not_for(given) if name is None else not_for(given) & {*LENGTHS}:
        del tree[block][key]
    recipe = announced(tree, overrides, name or place, command)
    say(found(table, recipe.data, choices))
    return recipe


def announced(tree: Tree, overrides: Sequence[str], where: str, command: str) -> Recipe:
    """The recipe of settings and overrides, as `recipe_from_tree` makes it; how a rank alone changes the scale is said."""
    recipe = recipe_from_tree(tree, overrides, where)
    for line in changed_scales(tree, settings_of(overrides), recipe, variants=command != "train"):
        say(line)
    return recipe


def given_data(data: str, overrides: Sequence[str]) -> Tree:
    """Returns what the overrides say of the data block; raises RecipeError where that cannot go with `data`."""
    given = settings_of(overrides).get("data")
    if not isinstance(given, (dict, type(None))):
        raise RecipeError(f"data: expected settings, such as data.source=COLUMN; got {given!r}")
    given = given or {}
    if "name" in given:
        raise RecipeError(
            f"--data {data} and data.name={given['name']} are both given. Give one: with --data a recipe's data is that file."
        )
    for role in ("source", "target"):
        if not isinstance(given.get(role), (str, type(None))):
            raise RecipeError(f"data.{role}: expected the name of a column; got {given[role]!r}")
    return given


def not_for(given: Tree) -> set[tuple[str, str]]:
    """The shipped defaults that mean nothing where labels, or whole texts, are learnt: a block and a key each."""
    if given.get("label") is not None:
        return {LENGTHS[1], METRICS}
    return {*LENGTHS, METRICS} if given.get("objective") or given.get("packing") else set()


def chosen(table: Table, given: Tree, command: str) -> Choices:
    """The columns, where the user has not named both."""
    return choose(table, {role: given[role] for role in ("source", "target") if role in given}, command)


def tree_for(place: str, name: str | None, table: Table, choices: Choices) -> Tree:
    """The recipe's settings, before overrides."""
    defaults = read_tree(DEFAULTS)
    columns = {key: choice.column for key, choice in choices.items()}
    template = {key: value for key, value in defaults["data"].items() if key not in ("source", "target")}
    tree = {key: value for key, value in read_tree(name or DEFAULTS).items() if key not in OF_OTHER_DATA}
    tree |= {"name": name_of(place), "data": template | columns | {"name": place}}
    if name is None:
        tree["evaluation"] |= {"split": "test" if "test" in splits_of(place) else "validation"}
        if target := columns.get("target") or columns.get("messages"):
            tree["evaluation"]["max_new_tokens"] = room_for(table, target)
    return tree


def room_for(table: Table, target: str) -> int:
    """Tokens of an answer: room for 19 of 20 targets, in steps of 16."""
    size = float(np.percentile(table.columns[target].lengths, 95)) / BYTES_A_TOKEN
    return min(LONGEST, max(SHORTEST, 16 * int(np.ceil(size / 16))))


def the_file(data: str) -> str:
    """The only file of a folder, whatever its name; anything else as it is."""
    folder = Path(data).expanduser()
    files = split_files(folder) if folder.is_dir() else {}
    if len(files) == 1:
        return str(*files.values())
    return data


def name_of(place: str) -> str:
    """Returns what runs are called: the file's name without its suffix, or the last part of a folder or an id."""
    path = Path(place)
    stem = stem_of(path) if suffix_of(path) in READERS else path.name
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or DEFAULTS


def found(table: Table, data: DataSettings, choices: Choices) -> str:
    """Returns what stands in the data, which columns were taken and why, and what is done about bad rows."""
    lines = [f"{table.title}: {table.rows:,} rows, {len(table.columns)} columns", *table.in_words()]
    verbs = {"source": "It is read", "target": "It is written", "messages": "Its answers are learnt"}
    lines += [f"{verbs[key]}: {choice.column!r}, {choice.reason}" for key, choice in choices.items()]
    if any(choice.reason != AS_GIVEN for choice in choices.values()):
        lines.append(f"For others add: {' '.join(f'data.{key}=COLUMN' for key in choices)}")
    place, findings = open_place(data.name, "train"), Findings()
    if place.single_file:  # of a folder each split is told by itself
        columns = row_columns(data)
        rows = checked_rows(place.title, with_columns(place.records(), columns, place.uneven), columns, findings, None)
        lines.append(f"{sum(1 for _ in rows):,} of the rows can be used.")
        lines += [f"  {line}" for line in findings.lines(policies_of(data))]
    return "\n".join(lines)
