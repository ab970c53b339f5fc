"""Base models: from a folder in Hugging Face's layout, or a hub id, to a model in memory; and back to a folder.

T5 and GPT-2 are ours (models/). Every other architecture is Transformers' own class. Weights are read tensor by tensor from
mapped files, cast or packed (quantization/quantize.py) on the way in, and each key of the files is used exactly once; a folder with
a missing or damaged shard fails before anything is loaded.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loralab.atomic_files import whole_folder
from loralab.errors import ModelError
from loralab.models import gpt2
from loralab.models.checkpoint_files import (
    GENERATION,
    SAFETENSORS,
    check_shapes,
    check_tokens,
    copy_configs,
    first_line,
    load_tokenizer,
    model_folder,
    open_file,
    read_config,
    read_json,
    weight_files,
)
from loralab.models.pretrained import from_pretrained, refuse_code
from loralab.models.t5 import drop_copies, parse_config
from loralab.on_torch.adapters.base import quantization_of
from loralab.on_torch.loading.device import choose_device, choose_dtype
from loralab.on_torch.models.gpt2 import GPT2, drop_tied_head, from_files, in_file_layout
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops.onednn_linear import by_onednn
from loralab.on_torch.quantization.quantize import Quantization, load_quantized, quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    quantize_except: Sequence[str] = (),
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A base model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, or a hub id such as google/flan-t5-small.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where a short probe finds it faster.
        device: "cpu", "cuda", "mps", or "auto".
        quantize: "int8" or "nf4" for linear maps that are stored so, and frozen; None for all in `dtype`.
        quantize_except: rules, as those of LoRA, of linear maps that stay in `dtype` all the same.

    Raises:
        ModelError: the folder or one of its files is missing, damaged, or not what its config says.
        MissingExtra: `quantize` needs the extra loralab[quantize].
    """
    folder = model_folder(name)
    place = choose_device(device)
    model = load_weights(folder, choose_dtype(dtype, place)[0], place, quantization(quantize, quantize_except))
    model.name_or_path = name  # type: ignore[assignment]
    tokenizer = load_tokenizer(folder)
    check_vocabulary(model, tokenizer, folder)
    return model, tokenizer


def load_weights(
    folder: Path, dtype: torch.dtype | None, device: torch.device, how: Quantization | None = None
) -> nn.Module:
    """The model of a folder; a dtype of None keeps the one on disk. `how`: its linear maps in fewer bits."""
    weight_files(folder)
    if how is not None:
        assert dtype is not None, "a packed base needs a dtype to compute in"
        return load_quantized(partial(load_weights, folder), dtype, device, how)
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
    drop_copies(tensors, folder, torch.equal)
    with torch.device("meta"):
        model = T5(parse_config(config), own_head="lm_head.weight" in tensors)
    check_shapes(_shapes(model.state_dict()), _shapes(tensors), folder)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_gpt2(folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> GPT2:
    """Our GPT-2 with the folder's weights, under OpenAI's or Hugging Face's names; the tokens that end a text are those of
    generation_config.json, or the config's."""
    settings = gpt2.parse_config(config)
    weights = from_files(read_weights(folder), settings)
    # Turned matrices are copied into rows where they are to be multiplied by; without a dtype all stays mapped.
    tensors = {
        name: tensor.to(device) if dtype is None else tensor.to(device, dtype).contiguous() for name, tensor in weights
    }
    drop_tied_head(tensors, settings)
    with torch.device("meta"):
        model = GPT2(settings)
    check_shapes(_shapes(model.state_dict()), _shapes(tensors), folder)
    model.load_state_dict(tensors, assign=True)
    model.ends = _ends(folder) or model.ends
    return model.eval()


def _ends(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text by generation_config.json; none where it says nothing."""
    if not (folder / GENERATION).exists():
        return ()
    ends = read_json(folder / GENERATION).get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _load_with_transformers(
    folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device
) -> nn.Module:
    import transformers

    refuse_code(folder)
    names = config.get("architectures") or []
    known = [getattr(transformers, str(name), None) for name in names]
    classes = [kind for kind in known if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    if not classes:
        raise ModelError(
            f"{folder}/config.json names the architectures {names}; Transformers {transformers.__version__} has none of them."
        )
    model: nn.Module
    with quiet_transformers():
        model, found = from_pretrained(classes[0], folder, dtype=dtype or "auto", output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights that a {classes[0].__name__} has, such as {missing[0]}; "
            "they would be random. Is its config.json that of another class?"
        )
    return by_onednn(model.to(device).eval())


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


# Weights


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raises ModelError where the tokenizer of one of our families has tokens that the model has no embedding of."""
    if isinstance(model, T5 | GPT2):
        check_tokens(model.config.vocab_size, tokenizer, folder)


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's weight files, one at a time; all files are looked at before the first is read."""
    shards = weight_files(folder)
    for shard in shards:
        if shard.suffix == ".safetensors":
            with open_file(shard, "pt") as file:
                yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (a file, not a dict)
        else:
            yield from _read_pickle(shard).items()


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A `.bin`, by the reader that takes tensors only and runs no code; mapped from disk, but for the format of before PyTorch 1.6."""
    try:
        tensors: dict[str, Tensor] = torch.load(
            path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="cpu"
        )
    except Exception as error:  # pickle, zip and torch each raise their own
        raise ModelError(
            f"{path} cannot be read as weights ({first_line(error)}). Download or copy it again."
        ) from error
    return tensors


# Writing


def save_model(model: nn.Module, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes the model in Hugging Face's layout. Our own families take config.json from `source`, the folder that they were read from."""
    assert quantization_of(model) is None, "what is written is a plain model"
    with whole_folder(folder) as part:
        _write_model(model, part, source)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def _write_model(model: nn.Module, folder: Path, source: Path) -> None:
    if isinstance(model, T5 | GPT2):
        named = in_file_layout(model.state_dict()) if isinstance(model, GPT2) else model.state_dict()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
        copy_configs(source, folder, dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."))
        if isinstance(model, GPT2):
            _write_ends(model.ends, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)  # type: ignore[operator]


def _write_ends(ends: tuple[int, ...], folder: Path) -> None:
    """Keeps the tokens at which a chat's answers end."""
    stored = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    stored["eos_token_id"] = list(ends) if len(ends) > 1 else ends[0]
    (folder / GENERATION).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
