"""loralab: LoRA fine-tuning of small and middle-sized language models, with an honest number for what it bought.

Names are loaded when they are first used: `import loralab` alone imports no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.api.functions import compare, evaluate, generate, plan, score, train
    from loralab.config.loading import load_recipe
    from loralab.config.lora import LoRASpec
    from loralab.config.recipe import Recipe
    from loralab.errors import LoralabError, UserError
    from loralab.on_torch.adapters.adapter_io import load_adapter
    from loralab.on_torch.adapters.attach import Adapter, attach
    from loralab.on_torch.loading.load import load_model

__version__ = "0.1.0"

_HOME = {
    "Adapter": "loralab.on_torch.adapters.attach",
    "LoRASpec": "loralab.config.lora",
    "LoralabError": "loralab.errors",
    "Recipe": "loralab.config.recipe",
    "UserError": "loralab.errors",
    "attach": "loralab.on_torch.adapters.attach",
    **dict.fromkeys(("compare", "evaluate", "generate", "plan", "score", "train"), "loralab.api.functions"),
    "load_adapter": "loralab.on_torch.adapters.adapter_io",
    "load_model": "loralab.on_torch.loading.load",
    "load_recipe": "loralab.config.loading",
}

__all__ = [
    "Adapter",
    "LoRASpec",
    "LoralabError",
    "Recipe",
    "UserError",
    "attach",
    "compare",
    "evaluate",
    "generate",
    "load_adapter",
    "load_model",
    "load_recipe",
    "plan",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loralab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
