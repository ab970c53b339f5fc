"""Base models: from a folder in Hugging Face's layout, or a hub id, to a model in memory; and back to a folder.

Which class a folder is for, and how its files are read and written, its family says (models/registry.py). Weights are read from
mapped files, cast or packed (quantization/quantize.py) on the way in; a folder with a missing or damaged shard fails before
anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from loralab.atomic_files import whole_folder
from loralab.models.checkpoint_files import load_tokenizer, model_folder, read_config, weight_files
from loralab.on_torch.adapters.base import quantization_of
from loralab.on_torch.loading.device import choose_device, choose_dtype
from loralab.on_torch.models.registry import family_for, family_of
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
    family_of(model).check_vocabulary(model, tokenizer, folder)
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
    return family_for(config, classifies=False).load(folder, config, dtype, device)


def save_model(model: nn.Module, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes the model in Hugging Face's layout. Our own families take config.json from `source`, the folder that they were read from."""
    assert quantization_of(model) is None, "what is written is a plain model"
    with whole_folder(folder) as part:
        family_of(model).save(model, part, source)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
