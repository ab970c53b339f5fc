"""The table that `print(adapter)` shows: which modules are adapted, with what, and how much of the model that is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from loralab.config.lora import LoRASpec
from loralab.on_torch.adapters.lora import LoRAWeights


def adapter_table(
    spec: LoRASpec,
    updates: Mapping[str, LoRAWeights],
    tuned: Mapping[str, nn.Parameter],
    linear: int,
    trainable: int,
    total: int,
) -> str:
    """One line for all modules that differ in a layer's number alone, then what is trained whole, then the coverage.

    Args:
        linear: how many linear modules the model has.
    """
    groups: dict[tuple[str, str, int, str], list[LoRAWeights]] = {}
    for name, update in updates.items():
        shape, alpha = f"{update.B.shape[0]}x{update.A.shape[1]}", _number(spec.alpha_of(name))
        groups.setdefault((_pattern(name), shape, update.rank, alpha), []).append(update)
    width = max([*(len(pattern) for pattern, *_ in groups), *(len(name) for name in tuned), len("module")])
    lines = [f"{'module':<{width}} {'shape':>10} {'count':>5} {'rank':>4} {'alpha':>5} {'parameters':>10}"]
    for (pattern, shape, rank, alpha), alike in groups.items():
        size = sum(p.numel() for update in alike for p in update.parameters())
        lines.append(f"{pattern:<{width}} {shape:>10} {len(alike):>5} {rank:>4} {alpha:>5} {size:>10,}")
    lines += [f"{name:<{width}} {_whole(parameter):>27} {parameter.numel():>10,}" for name, parameter in tuned.items()]
    return "\n".join([*lines, _coverage(len(updates), linear, trainable, total)])


def _coverage(adapted: int, linear: int, trainable: int, total: int) -> str:
    return (
        f"{adapted} modules adapted; the model has {linear} linear ones. "
        f"Trained: {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)."
    )


def _whole(parameter: nn.Parameter) -> str:
    return "trained whole" if parameter.requires_grad else "saved, not trained"


def _number(alpha: float | None) -> str:
    return "null" if alpha is None else f"{alpha:.4g}"


def _pattern(name: str) -> str:
    """`block.*` for `block.0`, `block.1`, …"""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
