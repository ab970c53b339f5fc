"""A T5 or a GPT-2 with new weights, in Hugging Face's layout: where pretraining begins.

Each matrix is normal with mean 0; how far its numbers spread stands in a table of its family (models/t5.py, models/gpt2.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from loralab.config.model import ModelSettings
from loralab.errors import ModelError
from loralab.models import gpt2, is_gpt2, t5
from loralab.models.checkpoint_files import SAFETENSORS, load_tokenizer, model_folder
from loralab.models.gpt2 import GPT2Config
from loralab.models.t5 import T5Config
from loralab.on_torch.models.gpt2 import GPT2, in_file_layout
from loralab.on_torch.models.t5 import T5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND = 64  # a vocabulary is rounded up to a multiple of it, as T5's 32,100 tokens to 32,128


def create_base(settings: ModelSettings, tokenizer: str, seed: int, folder: Path) -> None:
    """Writes a whole base: the tokenizer of that folder or hub id, the config for the settings' sizes, and new weights.

    Raises:
        ModelError: the tokenizer is not there, or lacks a token that the family needs.
        RecipeError: the sizes do not fit.
    """
    loaded = load_tokenizer(model_folder(tokenizer))
    config = (_gpt2_config if is_gpt2(settings.name) else _t5_config)(settings, loaded, tokenizer)
    loaded.save_pretrained(folder)
    write_model(config, seed, folder)


def _t5_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, name: str) -> T5Config:
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not isinstance(pad_id, int) or not isinstance(eos_id, int):
        raise ModelError(f"model.tokenizer {name}: it has no padding token or no end token, and a T5 needs both.")
    return t5.new_config(settings.name, settings.sizes, rounded(len(tokenizer)), pad_id, eos_id)


def _gpt2_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, name: str) -> GPT2Config:
    start_id, eos_id, pad_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(eos_id, int):
        raise ModelError(f"model.tokenizer {name}: it has no end token, and a GPT-2 needs one.")
    start_id = start_id if isinstance(start_id, int) else eos_id
    pad_id = pad_id if isinstance(pad_id, int) else None
    return gpt2.new_config(settings.name, settings.sizes, rounded(len(tokenizer)), start_id, eos_id, pad_id)


def rounded(tokens: int) -> int:
    """The rows of the embedding for so many tokens."""
    return -(-tokens // ROUND) * ROUND


def write_model(config: T5Config | GPT2Config, seed: int, folder: Path) -> None:
    """Writes config.json and new weights in fp32, the same for the same seed."""
    weights: dict[str, Tensor]
    if isinstance(config, GPT2Config):
        with torch.device("meta"):
            shapes = GPT2(config).state_dict()
        weights = in_file_layout(_drawn(shapes, lambda name: gpt2.deviation(name, config), seed))
        raw = gpt2.config_json(config)
    else:
        with torch.device("meta"):
            shapes = T5(config).state_dict()
        weights, raw = _drawn(shapes, lambda name: t5.deviation(name, config), seed), t5.config_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / SAFETENSORS, metadata={"format": "pt"})


def _drawn(shapes: Mapping[str, Tensor], deviation: Callable[[str], float | None], seed: int) -> dict[str, Tensor]:
    """New weights of these shapes. What is not drawn begins at 1, and at 0 if it is a bias."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, tensor in shapes.items():
        spread = deviation(name)
        if spread is not None:
            weights[name] = torch.randn(tensor.shape, generator=generator) * spread
        else:
            weights[name] = torch.zeros(tensor.shape) if name.endswith(".bias") else torch.ones(tensor.shape)
    return weights
