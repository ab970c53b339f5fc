"""The model families that loralab knows by heart: settings, published sizes, Hugging Face names and default targets, as
data."""

from __future__ import annotations

from loralab.families import t5

# Where LoRA goes when a recipe names no rules, by Hugging Face's `model_type`.
DEFAULT_RULES: dict[str, tuple[str, ...]] = {"t5": t5.DEFAULT_RULES}
