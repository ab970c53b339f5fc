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

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from loralab.atomic_files import write_text
from loralab.config.loading import read_tree, recipe_from_tree, shipped_recipes, stored_tree, to_yaml
from loralab.config.lora import LoRASpec
from loralab.config.recipe import BESIDE_RESULTS, Recipe
from loralab.data.own_data import DEFAULTS, announced, recipe_for
from loralab.data.readers import READERS, suffix_of
from loralab.errors import RecipeError, RunError, nearest_file
from loralab.models.checkpoint_files import is_model_name, model_folder

RECIPE, METRICS, PREDICTIONS, RECORD = "recipe.yaml", "metrics.jsonl", "predictions.jsonl", "record.json"
VALIDATION, CURVES, CONFUSION = "validation.jsonl", "curves.png", "confusion.png"
SAMPLES = "samples.jsonl"
PILOT, FORGETTING, FIRST_STEP = "pilot.json", "forgetting.jsonl", "first_step.json"
SAVED = ("adapter", "model")
RECIPES, REPLACED, RESULTS = "recipes", "replaced", "results.json"  # of a comparison; the last is written last
OWN_FOLDERS = (RECIPES, REPLACED)  # of a comparison, beside those of its variants
NAMES = ("name", "description")  # of a recipe, which change nothing in a run
HOME = Path("runs")
NO_ROWS = "none"  # the name of the data where there are no rows
# What a base, or an adapter made elsewhere, is asked with where nothing is said: the text as it is.
NO_DATA = {"name": NO_ROWS, "source": "source", "target": "target"}


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
    """Whether it is that of a comparison (experiments/compare.py) and not of a run."""
    return (folder / RECIPES).is_dir() or (folder / RESULTS).exists()


def resume_command(folder: Path) -> str:
    """The command that goes on with a run or a comparison, to be copied."""
    return f"loralab {'compare' if is_comparison(folder) else 'train'} {quote(str(folder))} --resume"


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
    """Whether rows stand in the file, by its name; one JSON object may be a recipe."""
    suffix = suffix_of(path)
    if suffix == ".json" and path.is_file():
        return path.read_bytes()[:100].lstrip()[:1] == b"["
    return suffix in READERS


def _with_own_data(command: str, data: str) -> str:
    """What to type; a plan takes the recipe of which `--data` chooses the columns."""
    if command == "plan":
        columns = "data.source=COLUMN data.target=COLUMN"
        return f"`loralab plan {DEFAULTS} {quote(f'data.name={data}')} {columns}`"
    return f"`loralab {command} --data {quote(data)}`"


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
    if changed := changed_settings(out, recipe):
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line."""
    with _damage_told(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(path: Path) -> Any:
    """Reads one JSON object."""
    with _damage_told(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # no JSON, or no UTF-8
        raise RunError(f"{path} is damaged: {error}. Put a whole copy back, or make it anew.") from error


def check_whole(folder: Path, lost: Sequence[str]) -> None:
    """Raises RunError where a finished run has lost files."""
    if lost:
        raise RunError(
            f"The run in {folder} has finished, but these are there no more: {', '.join(lost)}. "
            "Put them back, or move what is left away and do the run again."
        )


def missing_results(folder: Path, recipe: Recipe) -> list[str]:
    """What a comparison's table is made of and the run's folder lacks; trained weights may have been removed to save room."""
    wanted = [RECORD, PREDICTIONS, *([FORGETTING] if recipe.forgetting else [])]
    return [name for name in wanted if not (folder / name).exists()]


def missing_files(folder: Path, recipe: Recipe) -> list[str]:
    """What a finished run of this recipe has left and its folder lacks."""
    lost, method = missing_results(folder, recipe), recipe.training.method
    saved = None if method == "none" else "model" if method == "full" else "adapter"
    return lost if saved is None or size_on_disk(folder / saved) else [*lost, saved]


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Stores the recipe with the run."""
    write_text(folder / RECIPE, to_yaml(recipe))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    if not (folder / RECORD).exists():
        raise RunError(f"{folder} holds no {RECORD}: the run there has not finished.")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or "metrics" not in record:
        raise RunError(f"{folder / RECORD} is damaged: it holds no metrics. Put a whole copy back, or make it anew.")
    return record


# Finding what to evaluate, to generate from, or to merge


def find_saved_model(
    path: Path,
    overrides: list[str],
    base: str | None,
    data: dict[str, Any] | None = None,
    lenient: bool = False,
) -> tuple[Recipe, Path | None]:
    """Returns the recipe of a run, of a single adapter or of a plain model, and what was trained (None for the base as it is).

    Args:
        path: the folder of a run, of an adapter, ours or PEFT's, or of a model; or a name of one of these: a hub id, embedded:NAME.
        overrides: of the stored recipe. What was made elsewhere has none: they must say what is needed.
        base: the base's place now, where it has moved.
        data: the recipe's data block where none is stored.
        lenient: overrides without effect in a run are no mistakes.
    """
    name = str(path)
    path = _place_of(path)
    if base is not None:
        overrides = [f"model.name={json.dumps(base)}", *overrides]
    if (path / RECIPE).exists():
        saved = next((path / name for name in SAVED if (path / name).exists()), None)
        tree = with_lengths(stored_tree(path / RECIPE), recorded_settings(path).get("lengths"))
        recipe = recipe_from_tree(tree, overrides, str(path / RECIPE), lenient)
        if is_comparison(path):
            runs = sorted(str(file.parent) for file in path.glob(f"**/{RECORD}") if REPLACED not in file.parts)
            raise RunError(
                f"{path} is a comparison. Name one of its runs: {', '.join(runs) or 'none has finished yet'}."
            )
        if saved is None and recipe.training.method != "none":
            raise RunError(f"{path} holds a recipe, but neither {' nor '.join(SAVED)}: the run there has not finished.")
        return recipe, saved
    if (path / "adapter_config.json").exists():
        tree = _with_data(_adapter_tree(path), _for_labels(path, data))
        return recipe_from_tree(tree, overrides, str(path), lenient), path
    if (path / "config.json").exists():
        if stored := _card_tree(path):  # trained whole, and copied out of its run
            here = {"model": {**stored["model"], "name": str(path)}}
            return recipe_from_tree(stored | here, overrides, str(path), lenient), path
        tree = {"name": path.resolve().name, "model": {"name": name}, "training": {"method": "none"}}
        return recipe_from_tree(_with_data(tree, _for_labels(path, data)), overrides, str(path), lenient), None
    raise RunError(
        f"{path} is neither a run (it has no {RECIPE}) nor an adapter (it has no adapter_config.json) "
        "nor a model (it has no config.json)."
    )


def _place_of(path: Path) -> Path:
    """Returns the folder itself, or that of the model or adapter which the name means.

    Raises:
        RunError: there is no such folder, and the name is none of a model.
        ModelError: the name is one of a model, and there is none of it.
    """
    if path.is_dir():
        return path
    if not is_model_name(str(path)):
        raise RunError(
            f"There is no folder {path}.{nearest_file(path)} Expected a run (runs/NAME), an adapter, a model's folder, "
            "a hub id such as google/flan-t5-small, or embedded:tiny-t5."
        )
    return model_folder(str(path))


def _for_labels(path: Path, data: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same for a classifier, ours, PEFT's or Transformers': a label where else a target would stand."""
    file = next(file for file in (path / "adapter_config.json", path / "config.json") if file.exists())
    config = read_json(file)
    classifies = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if data is None or not (classifies or config.get("task_type") == "SEQ_CLS"):
        return data
    return {**{key: value for key, value in data.items() if key != "target"}, "label": "label"}


def _with_data(tree: dict[str, Any], data: dict[str, Any] | None) -> dict[str, Any]:
    return tree if data is None else {"data": data} | tree


def _adapter_tree(path: Path) -> dict[str, Any]:
    """The recipe in an adapter's loralab.json, or what PEFT's config says where there is none."""
    from loralab.adapters import files

    stored = files.read(path)
    return _card_tree(path) or {
        "name": path.resolve().name,
        "model": {"name": stored.base_name},
        "lora": stored.spec.model_dump(mode="json", include=set(LoRASpec.model_fields)),
    }


def _card_tree(path: Path) -> dict[str, Any]:
    """The recipe in a folder's loralab.json, with the lengths of its training; {} where there is none."""
    from loralab.adapters import files

    card = files.read_card(path)
    return with_lengths(card["recipe"], card.get("lengths")) if card.get("recipe") else {}


def with_lengths(tree: dict[str, Any], lengths: Sequence[int] | None) -> dict[str, Any]:
    """Returns a stored recipe whose lengths are numbers of tokens: in the place of a percentile the one that the training used.

    Args:
        lengths: (source, target) in tokens, as recorded with what was trained; None where nothing is recorded.
    """
    data = tree.get("data")
    if lengths is None or not isinstance(data, dict):
        return tree
    settled = zip(("max_source_length", "max_target_length"), lengths, strict=True)
    return tree | {"data": data | {key: length for key, length in settled if isinstance(data.get(key), str)}}


def recorded_settings(run: Path) -> dict[str, Any]:
    """Returns what a run's record says of its model: "lengths", and "labels" of a classifier; what is not recorded is left out.

    Where the run has no record, what was trained has a card that says the same.
    """
    from loralab.adapters import files

    file = run / RECORD
    about = read_record(run) if file.exists() else {}
    for name in SAVED:
        about = files.read_card(run / name) | about
    return {key: about[key] for key in ("lengths", "labels") if about.get(key) is not None}


def size_on_disk(path: Path) -> int:
    """Bytes of the weight files of an adapter or a model."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
