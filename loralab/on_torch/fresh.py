"""A T5 with new weights, in Hugging Face's layout: where pretraining begins.

Each matrix is normal with mean 0 and this deviation, so that a layer's output is as large as its input; as in the
published code of T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683) and in Transformers' `_init_weights`:

    shared.weight, lm_head.weight               1
    q                                           (d_model · d_kv)^-½        there is no 1/√d_kv in its attention
    k, v, relative_attention_bias               d_model^-½
    o                                           (heads · d_kv)^-½
    wi, wi_0, wi_1                              d_model^-½
    wo                                          d_ff^-½
    layer_norm.weight, final_layer_norm.weight  all 1, no draw
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loralab.errors import ModelError
from loralab.families.t5 import T5Config, config_json, new_config
from loralab.model_files import SAFETENSORS, load_tokenizer, model_folder
from loralab.model_settings import ModelSettings
from loralab.on_torch.models.t5 import T5


def deviation(name: str, config: T5Config) -> float | None:
    """The standard deviation with which a weight of this name begins; None for a norm's."""
    part = name.split(".")[-2]
    if part.endswith("layer_norm"):
        return None
    inner, d_model = config.num_heads * config.d_kv, config.d_model
    return {
        "shared": 1.0,
        "lm_head": 1.0,
        "q": (d_model * config.d_kv) ** -0.5,
        "o": inner**-0.5,
        "wo": config.d_ff**-0.5,
    }.get(part, d_model**-0.5)


ROUND = 64  # a vocabulary is rounded up to a multiple of it, as T5's 32,100 tokens to 32,128


def create_base(settings: ModelSettings, tokenizer: str, seed: int, folder: Path) -> None:
    """Writes a whole base: the tokenizer of that folder or hub id, the config for the settings' sizes, and new weights.

    Raises:
        ModelError: the tokenizer is not there, or lacks a padding or end token.
        RecipeError: the sizes do not fit.
    """
    loaded = load_tokenizer(model_folder(tokenizer))
    pad_id, eos_id = loaded.pad_token_id, loaded.eos_token_id
    if not isinstance(pad_id, int) or not isinstance(eos_id, int):
        raise ModelError(f"model.tokenizer {tokenizer}: it has no padding token or no end token, and a T5 needs both.")
    config = new_config(settings.name, settings.sizes, -(-len(loaded) // ROUND) * ROUND, pad_id, eos_id)
    loaded.save_pretrained(folder)
    write_model(config, seed, folder)


def write_model(config: T5Config, seed: int, folder: Path) -> None:
    """Writes config.json and new weights in fp32, the same for the same seed."""
    with torch.device("meta"):
        model = T5(config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        spread = deviation(name, config)
        drawn = torch.ones(tensor.shape) if spread is None else torch.randn(tensor.shape, generator=generator) * spread
        weights[name] = drawn
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(config_json(config) | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8"
    )
    save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
