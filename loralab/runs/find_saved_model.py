"""Finding what to evaluate, to generate from, to merge or to start from: a run, an adapter, or a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config.loading import recipe_from_tree, stored_tree
from loralab.config.lora import LoRASpec
from loralab.config.recipe import Recipe
from loralab.errors import RunError, nearest_file
from loralab.models.checkpoint_files import is_model_name, model_folder
from loralab.runs.folder import HOME, RECIPE, RECORD, REPLACED, SAVED, is_comparison
from loralab.runs.record import read_json, recorded_settings

NO_ROWS = "none"  # the name of the data where there are no rows


# What a base, or an adapter made elsewhere, is asked with where nothing is said: the text as it is.
NO_DATA = {"name": NO_ROWS, "source": "source", "target": "target"}


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
    if path.parent == HOME or not is_model_name(str(path)):  # runs/NAME is a run, also where there are none yet
        raise RunError(
            f"There is no folder {path}.{nearest_file(path)} Expected a run (runs/NAME), an adapter, a model's folder, "
            "a hub id such as google/flan-t5-small, or embedded:tiny-t5."
        )
    return model_folder(str(path))


def _for_labels(path: Path, data: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the same for a classifier, ours, PEFT's or Transformers': a label where else a target would stand."""
    file = next(file for file in (path / "adapter_config.json", path / "config.json") if file.exists())
    config = read_json(file)
    classifies = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if data is None or not (classifies or config.get("task_type") == "SEQ_CLS"):
        return data
    return {**{key: value for key, value in data.items() if key != "target"}, "label": "label", **_numbers_of(config)}


def _numbers_of(config: dict[str, Any]) -> dict[str, Any]:
    """The setting of a head that gives a number: its problem type, or its single output, says so."""
    single = len(config.get("id2label") or {}) == 1 or config.get("num_labels") == 1
    return {"problem_type": "regression"} if single or config.get("problem_type") == "regression" else {}


def _with_data(tree: dict[str, Any], data: dict[str, Any] | None) -> dict[str, Any]:
    return tree if data is None else {"data": data} | tree


def _adapter_tree(path: Path) -> dict[str, Any]:
    """The recipe in an adapter's loralab.json, or what PEFT's config says where there is none."""
    from loralab.adapters import files

    stored = files.read_adapter(path)
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
