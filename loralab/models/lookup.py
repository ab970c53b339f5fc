"""Finds the model that a recipe names, from the published sizes or from a config file: no weights, no network, no framework."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loralab import builtin_data
from loralab import models as families
from loralab.config.model import ModelSettings
from loralab.errors import ModelError, RecipeError, nearest, nearest_file
from loralab.models.architecture import OwnArchitecture, SpecialTokens
from loralab.models.checkpoint_files import PACKAGE, model_folder

CONFIG = "config.json"
VOCABULARY, ROUND = (
    8192,
    64,
)  # of a new tokenizer (data/tokenizer_training.py), and what it is rounded up to (on_torch/loading/random_init.py)
HEAD_NOTE = "its name says more than that of the bare encoder: it is taken to bring a head of its own"


@dataclass(frozen=True)
class Base:
    """A model before it is built: its architecture and settings.

    Attributes:
        family: Hugging Face's `model_type`.
        config: the settings, as in a config.json.
        origin: where the settings are from, in words.
        labels: of a classifier, how many labels it has; None for a model that writes text.
        published: loralab knows the architecture by heart (models/__init__.py); of any other its engine finds a class for the config.
        brings_head: of a classifier, whether its files have the head.
        own_head: the output matrix is separate from the embedding; None where the config decides.
    """

    family: str
    config: Mapping[str, Any] = field(repr=False)
    origin: str
    labels: int | None = None
    published: bool = True
    brings_head: bool = True
    own_head: bool | None = None


def find_base(settings: ModelSettings, labels: int | None) -> Base:
    """Returns the model of a recipe.

    Args:
        settings: the recipe's `model` block.
        labels: of a classifier, the number of its labels; None for a model that writes text.

    Raises:
        ModelError: the name is neither published nor a folder or file with a config.
    """
    if settings.init == "random":
        return _random(settings)
    beside = settings.name.startswith((builtin_data.PREFIX, PACKAGE))
    place = model_folder(settings.name) if beside else Path(settings.name)
    file = place / CONFIG if place.is_dir() else place
    if file.is_file():
        return _of_file(file, labels)
    if place.is_dir():
        raise ModelError(f"{place} has no {CONFIG}, from which its sizes could be read.")
    return _published(settings.name, labels)


def architecture_named(name: str) -> OwnArchitecture:
    """Returns the architecture of a new model of this name.

    Raises:
        RecipeError: no architecture that loralab builds itself has sizes of this name.
    """
    own = [each for each in families.ARCHITECTURES.values() if isinstance(each, OwnArchitecture)]
    if found := next((each for each in own if each.has_sizes_of(name)), None):
        return found
    names = [known for each in own for known in (*each.sizes, each.model_type)]
    raise RecipeError(
        f"model.name {name!r} has no sizes to begin with at random. {nearest(name.rpartition('/')[2], names)}"
    )


def _random(settings: ModelSettings) -> Base:
    """Returns the base of the recipe's sizes; the vocabulary of a tokenizer that is elsewhere is taken to be the architecture's own."""
    found = architecture_named(settings.name)
    tokens = settings.vocabulary or (VOCABULARY if settings.tokenizer == "train" else found.vocabulary)
    tokens = -(-tokens // ROUND) * ROUND
    config = found.new(settings.name, settings.sizes, tokens, SpecialTokens(start=0, end=1, pad=0))
    return Base(found.model_type, found.as_json(config), "random weights, of the recipe's sizes")


def _published(name: str, labels: int | None) -> Base:
    short = name.rpartition("/")[2]
    known = {size: family for family, sizes in families.SIZES.items() for size in sizes}
    found = max((size for size in known if short == size or short.startswith(f"{size}-")), key=len, default=None)
    if found is None:
        raise ModelError(
            f"{name!r} is none of the models whose sizes are known here, and no folder or file{nearest_file(Path(name))}. "
            f"{nearest(short, known)} For any other model give its folder, or its config.json alone: model.name=config.json."
        )
    origin = f"the published sizes of {found}"
    config, family = families.SIZES[known[found]][found], known[found]
    architecture = families.ARCHITECTURES[family]
    if isinstance(architecture, OwnArchitecture):
        return Base(family, architecture.as_json(config), origin)
    base = _encoder({"model_type": family, **config}, labels, origin, brings_head=short != found)
    return replace(base, origin=f"{origin}; {HEAD_NOTE}") if base.brings_head else base


def _of_file(file: Path, labels: int | None) -> Base:
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        family = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is no model's config: it has to be JSON with a model_type.") from error
    origin, kind = str(file), str((config.get("architectures") or [""])[0])
    architecture = families.ARCHITECTURES.get(family)
    if isinstance(architecture, OwnArchitecture):
        if labels is None and architecture.accepts(config):
            settings = architecture.as_json(architecture.parse(config))
            return Base(family, settings, origin, own_head=_has_own_head(architecture, file.parent))
    elif architecture is not None and labels is not None:
        named = len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)
        return _encoder(config, labels, origin, kind.endswith("ForSequenceClassification") and named == labels)
    return Base(family, config, origin, labels, published=False)


def _has_own_head(architecture: OwnArchitecture, folder: Path) -> bool | None:
    """Says if the weights beside a config have an output matrix of their own; None without weights, and where the config decides."""
    if architecture.has_own_head is None:
        return None
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return architecture.has_own_head(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    if not (folder / "model.safetensors").exists():
        return None
    with (folder / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return architecture.has_own_head(json.loads(file.read(length)))


def _encoder(config: Mapping[str, Any], labels: int | None, origin: str, brings_head: bool) -> Base:
    if labels is None:
        raise ModelError(
            f"{origin}: this encoder writes nothing. A recipe on it names the column of its labels, data.label."
        )
    return Base(str(config["model_type"]), config, origin, labels, brings_head=brings_head)
