"""The runs of a comparison and their order: each variant once for each of its seeds, after the variant that it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.config.recipe import Recipe
from loralab.errors import RecipeError, nearest
from loralab.runs.folder import OWN_FOLDERS, RECORD, REPLACED, changed_settings


@dataclass(frozen=True)
class PlannedRun:
    """One training, or one look at the base as it is."""

    variant: str
    seed: int
    folder: Path
    recipe: Recipe
    """Recipe of this variant and seed; what it starts from is a folder."""
    after: Path | None
    """The folder of the run that it starts from, where that is one of these."""

    @property
    def name(self) -> str:
        """For people: the variant, with its seed where it has several."""
        return self.variant if self.folder.name == self.variant else f"{self.variant}/{self.folder.name}"

    @property
    def state(self) -> str:
        """ "new", "stopped" (can be gone on with), "finished", or "changed": what is there is of another recipe."""
        if not self.folder.exists():
            return "new"
        if changed_settings(self.folder, self.recipe) != []:
            return "changed"
        return "finished" if (self.folder / RECORD).exists() else "stopped"


def states_of(runs: Sequence[PlannedRun]) -> dict[Path, str]:
    """The state of each run's folder; what starts from a run that has not finished is of other weights than it will have."""
    states: dict[Path, str] = {}
    for run in runs:
        renewed = run.after is not None and states[run.after] != "finished"
        states[run.folder] = "changed" if renewed and run.folder.exists() else run.state
    return states


def plan_runs(recipe: Recipe, out: Path) -> list[PlannedRun]:
    """Every run of a comparison, each after the one that it starts from, otherwise in the order of the recipe.

    Raises:
        RecipeError: a variant has a name that is taken, or starts from nothing that is there, from itself in a circle,
            or from a seed that is not run.
    """
    if taken := [name for name in recipe.variants if name in OWN_FOLDERS]:
        raise RecipeError(f"A variant cannot be called {taken[0]!r}: a comparison keeps a folder of that name.")
    variants = {name: recipe.variant(name) for name in recipe.variants}
    return [run for name in in_order_of_dependency(variants) for run in _runs_of(name, variants, out)]


def in_order_of_dependency(variants: dict[str, Recipe]) -> list[str]:
    """The variants' names, each after the one that it starts from."""
    order: list[str] = []
    while len(order) < len(variants):
        ready = [name for name in variants if name not in order and _ready(name, variants, order)]
        if not ready:
            circle = ", ".join(name for name in variants if name not in order)
            raise RecipeError(
                f"The variants {circle} start from one another in a circle; training.start_from cannot go round."
            )
        order.append(ready[0])
    return order


def _ready(name: str, variants: dict[str, Recipe], order: list[str]) -> bool:
    start = variants[name].training.start_from
    return start not in variants or start in order


def _runs_of(name: str, variants: dict[str, Recipe], out: Path) -> Iterator[PlannedRun]:
    recipe = variants[name]
    seeds = seeds_of(recipe)
    for seed in seeds:
        after = _start_of(name, seed, variants, out)
        training = recipe.training.model_copy(update={"seed": seed})
        if after is not None:
            training = training.model_copy(update={"start_from": str(after.resolve())})
        yield PlannedRun(
            name, seed, _folder(out, name, seed, seeds), recipe.model_copy(update={"training": training}), after
        )


def seeds_of(recipe: Recipe) -> tuple[int, ...]:
    """The seeds that make a difference: a base that is not trained has one."""
    return recipe.training.seeds[:1] if recipe.training.method == "none" else recipe.training.seeds


def _folder(out: Path, name: str, seed: int, seeds: tuple[int, ...]) -> Path:
    return out / name if len(seeds) == 1 else out / name / f"seed-{seed}"


def _start_of(name: str, seed: int, variants: dict[str, Recipe], out: Path) -> Path | None:
    start = variants[name].training.start_from
    if start is None:
        return None
    if start not in variants:
        if not Path(start).is_dir():
            raise RecipeError(
                f"{name} starts from {start!r}, which is neither a variant nor a folder. {nearest(start, variants)}"
            )
        return None
    seeds = seeds_of(variants[start])
    if len(seeds) > 1 and seed not in seeds:
        raise RecipeError(
            f"{name} with seed {seed} starts from {start}, which is run with the seeds {list(seeds)} only."
        )
    return _folder(out, start, seed if seed in seeds else seeds[0], seeds)


def set_aside(run: Path, out: Path) -> Path:
    """Moves a run's folder out of the way, so that nothing is lost; returns where it is now."""
    number = 1
    while (place := out / REPLACED / f"{run.relative_to(out).as_posix().replace('/', '-')}-{number}").exists():
        number += 1
    place.parent.mkdir(exist_ok=True)
    run.rename(place)
    return place
