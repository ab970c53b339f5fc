"""The JAX engine: LoRA for any function, T5, generation, adapters. It comes with the extra `loralab[jax]`."""

from __future__ import annotations

from loralab.errors import MissingExtra

try:
    import jax  # noqa: F401
except ImportError as error:
    raise MissingExtra("jax", "jax") from error

from loralab.on_jax.generate import generate
from loralab.on_jax.load import load_model, save_model
from loralab.on_jax.lora import Adapted, adapt, lora_init
from loralab.on_jax.stored import load_adapter, save_adapter

__all__ = ["Adapted", "adapt", "generate", "load_adapter", "load_model", "lora_init", "save_adapter", "save_model"]
