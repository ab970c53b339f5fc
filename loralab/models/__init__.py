"""The model families that loralab knows by heart: settings, published sizes, Hugging Face names and default targets, as
data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loralab.models import bert, distilbert, gpt2, t5
from loralab.models.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each for each in (t5.ARCHITECTURE, gpt2.ARCHITECTURE, bert.ARCHITECTURE, distilbert.ARCHITECTURE)
}

# The published sizes: model_type -> name, without its owner -> settings.
SIZES: dict[str, Mapping[str, Any]] = {name: each.sizes for name, each in ARCHITECTURES.items()}

# Where LoRA goes when a recipe names no rules, by Hugging Face's `model_type`.
DEFAULT_RULES: dict[str, tuple[str, ...]] = {name: each.default_rules for name, each in ARCHITECTURES.items()}

# What a sequence classifier's head consists of; in other families it is what stands beside the encoder.
HEADS: dict[str, tuple[str, ...]] = {name: each.head for name, each in ARCHITECTURES.items() if each.head}

# And in any other family of Transformers': the queries and values of attention, under the first names that it has.
ATTENTION_RULES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, …
    ("c_attn",),  # GPT-BigCode and other relatives of GPT-2: q, k and v in one matrix
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("qkv_proj",),  # Phi-3, CodeGen
    ("Wqkv",),  # MPT
    ("q", "v"),  # mT5 and other relatives of T5
    ("query", "value"),  # BERT and its relatives
)


def is_gpt2(name: str) -> bool:
    """Tells whether a new model of this name is a GPT-2; any other is a T5."""
    return name.rpartition("/")[2].startswith("gpt2")
