"""Command-line arguments -> a recipe and the folder to work in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from loralab.config.loading import read_tree, shipped_recipes
from loralab.config.recipe import Recipe
from loralab.data.own_data import DEFAULTS, announced, recipe_for
from loralab.data.readers import READERS, suffix_of
from loralab.errors import RecipeError
from loralab.runs.folder import RECIPE, is_comparison, resume_command


def recipe_and_folder(
    command: str, name: str | None, overrides: Sequence[str], data: str | None, out: Path | None, resume: bool
) -> tuple[Recipe, Path | None]:
    """The recipe of a file, a shipped name, somebody's own data or, to go on with it, a run's folder; and the folder to work in.

    Args:
        command: "train", "compare" or "plan".
        name: the recipe; where it is missing, the first override has taken its place.
        data: somebody's own, with which no recipe is needed.
    """
    if name is not None and "=" in name and not Path(name).exists():
        overrides, name = [name, *overrides], None
    if data is not None:
        return recipe_for(data, name, overrides, command), out
    if name is None:
        raise RecipeError(
            f"Which recipe? `loralab {command} RECIPE` takes a file or a shipped one: {', '.join(shipped_recipes())}. "
            f"For data of your own: {_with_own_data(command, 'my.csv')}."
        )
    if resume and (Path(name) / RECIPE).exists():
        name, out = str(Path(name) / RECIPE), out or Path(name)
        return announced(read_tree(name), overrides, name, command), out
    if _is_data(Path(name)):
        raise RecipeError(f"{name} is no recipe but data. Use it so: {_with_own_data(command, name)}.")
    if (Path(name) / RECIPE).exists():
        again = f"`loralab {command} {quote(f'{name}/{RECIPE}')}`"
        further = (
            f"Plan it: {again}"
            if command == "plan"
            else f"Go on with it: `{resume_command(Path(name))}`; do it again: {again}"
        )
        raise RecipeError(f"{name} is a {'comparison' if is_comparison(Path(name)) else 'run'}. {further}.")
    return announced(read_tree(name), overrides, name, command), out


def _is_data(path: Path) -> bool:
    """Tells whether rows stand in the file, by its name; one JSON object may be a recipe."""
    suffix = suffix_of(path)
    if suffix == ".json" and path.is_file():
        return path.read_bytes()[:100].lstrip()[:1] == b"["
    return suffix in READERS


def _with_own_data(command: str, data: str) -> str:
    """Returns what to type; a plan takes the recipe of which `--data` chooses the columns."""
    if command == "plan":
        columns = "data.source=COLUMN data.target=COLUMN"
        return f"`loralab plan {DEFAULTS} {quote(f'data.name={data}')} {columns}`"
    return f"`loralab {command} --data {quote(data)}`"
