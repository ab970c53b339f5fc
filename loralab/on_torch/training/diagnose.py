"""Finds the module where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(model: nn.Module, batches: Sequence[dict[str, Any]]) -> str:
    """A weight that is not finite, or else the first module, in the order of the computation, whose output is not.

    Args:
        batches: what the model's forward takes.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"The weight {name} holds numbers that are not finite."
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
            found.append(name)

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        for inputs in batches:
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return (
        f"The first module to give such a number is {found[0]}."
        if found
        else "The forward pass is finite; the gradient is not."
    )
