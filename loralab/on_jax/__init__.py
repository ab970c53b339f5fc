"""The JAX engine: LoRA for any function, T5, generation, adapters. It comes with the extra `loralab[jax]`."""

from __future__ import annotations

from loralab.errors import MissingExtra

try:
    import jax  # noqa: F401
except ImportError as error:
    raise MissingExtra("jax", "jax") from error

from loralab.on_jax.lora import Adapted, adapt, lora_init

__all__ = ["Adapted", "adapt", "lora_init"]
