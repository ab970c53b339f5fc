"""The JAX engine: LoRA for any function, T5, generation, adapters. It comes with the extra `loralab[jax]`."""

from __future__ import annotations

from loralab.errors import MissingExtra

try:
    import jax  # noqa: F401
except ImportError as error:
    raise MissingExtra("jax", "jax") from error

from loralab.on_jax.adapters.adapter_io import load_adapter, save_adapter
from loralab.on_jax.adapters.lora import Adapted, adapt, lora_init
from loralab.on_jax.generation.generate import generate
from loralab.on_jax.loading.load import load_model, save_model
from loralab.on_jax.profiling import flops, memory

__all__ = [
    "Adapted",
    "adapt",
    "flops",
    "generate",
    "load_adapter",
    "load_model",
    "lora_init",
    "memory",
    "save_adapter",
    "save_model",
]
