"""A model of one of loralab's own families with new weights, in Hugging Face's layout: where pretraining begins.

Each matrix is normal with mean 0; how far its numbers spread stands in a table of its architecture (models/t5.py, models/gpt2.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loralab.config.model import ModelSettings
from loralab.models.architecture import SpecialTokens
from loralab.models.checkpoint_files import load_tokenizer, model_folder
from loralab.on_torch.models.registry import family_named, family_with

ROUND = 64  # a vocabulary is rounded up to a multiple of it, as T5's 32,100 tokens to 32,128


def create_base(settings: ModelSettings, tokenizer: str, seed: int, folder: Path) -> None:
    """Writes a whole base: the tokenizer of that folder or hub id, the config for the settings' sizes, and new weights.

    Raises:
        ModelError: the tokenizer is not there, or lacks a token that the family needs.
        RecipeError: the sizes do not fit.
    """
    loaded = load_tokenizer(model_folder(tokenizer))
    tokens = (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id)
    start, end, pad = (each if isinstance(each, int) else None for each in tokens)
    family = family_named(settings.name)
    special = SpecialTokens(start, end, pad, tokenizer)
    config = family.architecture.new(settings.name, settings.sizes, rounded(len(loaded)), special)
    loaded.save_pretrained(folder)
    family.write_new(config, seed, folder)


def rounded(tokens: int) -> int:
    """The rows of the embedding for so many tokens."""
    return -(-tokens // ROUND) * ROUND


def write_model(config: Any, seed: int, folder: Path) -> None:
    """Writes config.json and new weights in fp32, the same for the same seed.

    Args:
        config: settings of one of loralab's own architectures.
    """
    family_with(config).write_new(config, seed, folder)
