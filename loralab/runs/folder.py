"""A run's folder: everything that is needed to know what was done, to use it, and to do it again.

    recipe.yaml          the whole recipe, defaults included; `loralab train recipe.yaml` does the run again
    first_step.json      what the first step computed and held (planning/predicted.py holds it against the prediction)
    pilot.json           the learning rates that were tried, where the recipe asks for that
    metrics.jsonl        one line a step
    validation.jsonl     one line a validation
    samples.jsonl        what the model wrote at each, where the recipe asks for it (training/text_samples.py)
    curves.png           both, drawn (reports/run_plots.py)
    tensorboard/ wandb/  the same for these, where the recipe asks for it (training/trackers.py)
    adapter/ or model/   what was trained (adapters/files.py)
    confusion.png        of a classifier: which label was given to which (evaluation/confusion_matrix.py)
    predictions.jsonl    one line an evaluated row: source, references, prediction, loss, scores
    forgetting.jsonl     one line a row of other data, where the recipe asks for it: the loss before and after
    record.json          results, proof, counts, versions, hardware; written last: a run with it has finished

Every file is whole or not there (atomic_files.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from loralab.atomic_files import write_text
from loralab.config.loading import recipe_from_tree, stored_tree, to_yaml
from loralab.config.recipe import BESIDE_RESULTS, Recipe
from loralab.errors import RunError

RECIPE, METRICS, PREDICTIONS, RECORD = "recipe.yaml", "metrics.jsonl", "predictions.jsonl", "record.json"
VALIDATION, CURVES, CONFUSION = "validation.jsonl", "curves.png", "confusion.png"
SAMPLES = "samples.jsonl"
PILOT, FORGETTING, FIRST_STEP = "pilot.json", "forgetting.jsonl", "first_step.json"
SAVED = ("adapter", "model")
RECIPES, REPLACED, RESULTS = "recipes", "replaced", "results.json"  # of a comparison; the last is written last
OWN_FOLDERS = (RECIPES, REPLACED)  # of a comparison, beside those of its variants
NAMES = ("name", "description")  # of a recipe, which change nothing in a run
TIME = "training.max_minutes"  # changes nothing but where a run stops
HOME = Path("runs")


def new_folder(out: Path | None, name: str) -> Path:
    """The folder for a new run: `out`, which must be empty or not there yet, or the next free runs/NAME, runs/NAME-2, …"""
    check_free(out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        return out
    taken = 1
    while (folder := HOME / (name if taken == 1 else f"{name}-{taken}")).exists():
        taken += 1
    folder.mkdir(parents=True)
    return folder


def is_comparison(folder: Path) -> bool:
    """Tells whether it is that of a comparison (experiments/compare.py) and not of a run."""
    return (folder / RECIPES).is_dir() or (folder / RESULTS).exists()


def resume_command(folder: Path) -> str:
    """The command that goes on with a run or a comparison, to be copied."""
    return f"loralab {'compare' if is_comparison(folder) else 'train'} {quote(str(folder))} --resume"


def check_free(out: Path | None) -> None:
    """Raises RunError where a folder cannot become a new run's."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        holds = f" What it holds goes on with `{resume_command(out)}`." if (out / RECIPE).exists() else ""
        raise RunError(f"{out} is there already and not empty.{holds} Give another --out, or remove it.")


def check_resumable(out: Path | None, recipe: Recipe) -> None:
    """Raises RunError where the folder's run cannot be gone on with, by this recipe."""
    if out is None or not (out / RECIPE).exists():
        raise RunError("There is nothing to resume: give the run's folder, as in `loralab train runs/NAME --resume`.")
    if is_comparison(out):
        raise RunError(f"{out} is a comparison, not a run. Go on with it: {resume_command(out)}")
    if changed := [key for key in changed_settings(out, recipe) if key != TIME]:
        raise RunError(
            f"The run in {out} was started with another recipe: {', '.join(changed)} changed. Start a new run with another --out."
        )


def changed_settings(folder: Path, recipe: Recipe) -> list[str]:
    """The settings by which a recipe differs from the one stored in a folder; all of them where none is stored."""
    given = recipe_tree(recipe)
    file = folder / RECIPE
    stored = recipe_tree(recipe_from_tree(stored_tree(file), [], str(folder))) if file.exists() else {}
    return [key for key in stored | given if stored.get(key) != given.get(key) and key not in NAMES]


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe by its dotted key."""
    tree = recipe.model_dump(mode="json")
    by_variant = ("variants", *BESIDE_RESULTS)
    blocks = {key: value for key, value in tree.items() if isinstance(value, dict) and key not in by_variant}
    flat = {f"{block}.{key}": value for block, settings in blocks.items() for key, value in settings.items()}
    return flat | {key: value for key, value in tree.items() if key not in blocks}


def check_whole(folder: Path, lost: Sequence[str]) -> None:
    """Raises RunError where a finished run has lost files."""
    if lost:
        raise RunError(
            f"The run in {folder} has finished, but these are there no more: {', '.join(lost)}. "
            "Put them back, or move what is left away and do the run again."
        )


def missing_results(folder: Path, recipe: Recipe) -> list[str]:
    """Returns what a comparison's table is made of and the run's folder lacks; trained weights may have been removed to save room."""
    wanted = [RECORD, PREDICTIONS, *([FORGETTING] if recipe.forgetting else [])]
    return [name for name in wanted if not (folder / name).exists()]


def missing_files(folder: Path, recipe: Recipe) -> list[str]:
    """Returns what a finished run of this recipe has left and its folder lacks."""
    lost, method = missing_results(folder, recipe), recipe.training.method
    saved = None if method == "none" else "model" if method == "full" else "adapter"
    return lost if saved is None or size_on_disk(folder / saved) else [*lost, saved]


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Stores the recipe with the run."""
    write_text(folder / RECIPE, to_yaml(recipe))


# Finding what to evaluate, to generate from, or to merge


def size_on_disk(path: Path) -> int:
    """Bytes of the weight files of an adapter or a model."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
