"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), with fp32 copies of bf16 weights, and its state
as plain tensors.

`scale_parameter` is Adafactor's, with which T5 was trained (Shazeer & Stern 2018, section 8, https://arxiv.org/abs/1804.04235):
a step is relative to a tensor's size. T5's random embeddings are 100 times its random queries, and no one rate fits both.

Weight decay pulls at matrices of products alone, LoRA's among them: not at biases and norms, which have one dimension, nor
at embeddings, of which most rows have no gradient in a step.

In bf16's 8 bits of mantissa most steps would round to nothing, so such weights are updated through copies in fp32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loralab.config.training import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALLEST = 1e-3  # root mean square that a tensor counts as at least, so that zeros can move


class Optimizer:
    """One step after the other at the rate that the loop says."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        twins: Sequence[nn.Parameter],
        settings: OptimizerSettings,
        embeddings: Sequence[Tensor] = (),
    ) -> None:
        """`twins`: those of the parameters that learn at `lora_plus_ratio` times the rate. `embeddings`: those that no decay touches,
        beside biases and norms."""
        self.parameters = list(parameters)
        self.masters = [p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float()) for p in self.parameters]
        self.max_grad_norm = settings.max_grad_norm
        faster = {id(twin) for twin in twins}
        self.scale_parameter = settings.scale_parameter
        kept = {id(embedding) for embedding in embeddings}
        groups: dict[tuple[float, float, int], list[nn.Parameter]] = defaultdict(list)
        for index, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            ratio = settings.lora_plus_ratio if id(parameter) in faster else 1.0
            decay = 0.0 if parameter.ndim < 2 or id(parameter) in kept else settings.weight_decay
            groups[ratio, decay, index if self.scale_parameter else 0].append(master)
        self.adamw = torch.optim.AdamW(
            [
                {"params": members, "ratio": ratio, "weight_decay": decay}
                for (ratio, decay, _), members in groups.items()
            ],
            lr=0.0,
            fused=True,
        )

    def step(self, learning_rate: float) -> float:
        """One update; returns the gradient's length before clipping. Without a finite gradient nothing is changed."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = float(nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                size = _size(group["params"][0]) if self.scale_parameter else 1.0
                group["lr"] = learning_rate * group["ratio"] * size
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._copy_back()
        return norm

    @torch.no_grad()
    def _copy_back(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by position; weights that have not had a gradient have no moments."""
        tensors = {}
        for index, master in enumerate(self.masters):
            tensors[f"weight.{index}"] = master.detach().cpu().contiguous()
            moments = self.adamw.state.get(master, {})
            tensors |= {f"{name}.{index}": value.detach().cpu() for name, value in moments.items()}
        return tensors

    def state_tensors(self) -> list[Tensor]:
        """All that it holds beside the parameters themselves."""
        moments = [value for state in self.adamw.state.values() for value in state.values()]
        return [*self.masters, *(each for each in moments if isinstance(each, Tensor))]

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Goes back to what `state` gave."""
        self.adamw.state.clear()
        for index, master in enumerate(self.masters):
            master.copy_(state[f"weight.{index}"])
            if f"step.{index}" in state:
                moments = {name: state[f"{name}.{index}"].to(master.device) for name in MOMENTS}
                self.adamw.state[master] = {"step": state[f"step.{index}"].to(master.device), **moments}
        self._copy_back()


def _size(parameter: Tensor) -> float:
    """Root mean square of its elements, at least SMALLEST."""
    return max(float(parameter.detach().square().mean().sqrt()), SMALLEST)
