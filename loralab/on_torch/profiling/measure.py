"""Real steps of a planned shape on random weights, which cost what trained ones cost: what they compute, hold and take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralab.config.recipe import Recipe
from loralab.engine import BatchShape, StepSettings
from loralab.models.lookup import Base
from loralab.on_torch.models.classifier import label_losses
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.profiling.build import build
from loralab.on_torch.profiling.meter import Meter
from loralab.on_torch.quantization.quantize import load_settled, quantization
from loralab.on_torch.training.forward import token_losses
from loralab.on_torch.training.frozen_prefix import FrozenEncoder, encoder_of
from loralab.on_torch.training.optimizer import Optimizer
from loralab.on_torch.training.set_trainable import set_trainable
from loralab.tasks import task_of


@dataclass(frozen=True)
class Measured:
    """One step."""

    flops: int
    peak_bytes: int
    """Bytes of tensors; on a GPU as its allocator counts them."""
    seconds: float


def measure(recipe: Recipe, base: Base, settings: StepSettings, shape: BatchShape) -> Measured:
    """Takes three steps: one to warm up, one that is watched, one that is timed.

    Raises:
        MissingExtra, ModelError: the base is to be quantised, and cannot be.
    """
    device, dtype, quantize = torch.device(settings.device), getattr(torch, settings.dtype), settings.quantize
    model = build(base, dtype, device)
    if how := quantization(quantize, recipe.model.quantize_except if quantize else ()):
        model = load_settled(model, dtype, device, how)
    fresh = [] if base.brings_head else head_parameters(model)
    model, adapter = set_trainable(model, recipe, None, None, fresh)
    parameters = adapter.parameters() if adapter else [p for p in model.parameters() if p.requires_grad]
    optimizer = Optimizer(parameters, [], recipe.optimizer)
    loss = _loss(model, recipe, shape, device)

    def step() -> None:
        model.train()
        for _ in range(settings.accumulate):
            loss().backward()
        optimizer.step(1e-4)

    step()
    there = [*model.parameters(), *model.buffers(), *parameters, *optimizer.state_tensors(), *_tensors_of(loss)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Meter(there) as meter:
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else meter.peak
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Measured(meter.flops, peak, time.perf_counter() - started)


class _Batch:
    """A random batch that is used for every step."""

    def __init__(self, vocabulary: int, shape: BatchShape, classifies: bool, device: torch.device) -> None:
        rows, draw = shape.rows, torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, vocabulary, (rows, shape.source), generator=draw).to(device)
        self.mask = torch.ones_like(self.ids)
        if shape.padded:
            self.mask[1:, -1] = 0
        width = 1 if classifies else shape.target
        self.labels = torch.randint(0 if classifies else 2, 2 if classifies else vocabulary, (rows, width)).to(device)


def _loss(model: nn.Module, recipe: Recipe, shape: BatchShape, device: torch.device) -> Callable[[], Tensor]:
    """Mean loss of the batch; of a head that is trained alone, on states."""
    classifies = task_of(recipe.data).classifies
    batch = _Batch(int(model.config.vocab_size), shape, classifies, device)  # type: ignore[union-attr, arg-type]
    if recipe.training.method == "head" and not recipe.training.frozen_dropout:
        cut, weight = FrozenEncoder(model), next(encoder_of(model).parameters())
        states = torch.zeros(shape.rows, 1, cut.width, dtype=weight.dtype, device=device)

        def of_head() -> Tensor:
            encoder_of(model).eval()
            return label_losses(cut.logits(states, batch.ids, batch.mask), batch.labels).mean()

        return of_head
    return lambda: token_losses(model, batch.ids, batch.mask, batch.labels).mean()


def _tensors_of(loss: Callable[[], Tensor]) -> list[Tensor]:
    """Returns those of the batch."""
    held = [cell.cell_contents for cell in loss.__closure__ or ()]
    return [x for each in held if isinstance(each, _Batch) for x in (each.ids, each.mask, each.labels)]
