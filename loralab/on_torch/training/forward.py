"""Forward pass of a batch, by the model's family: token losses, and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loralab.data.batches import Batch
from loralab.on_torch.models.registry import family_of


def token_losses(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Loss of each real target token in nats, [N], row by row."""
    return family_of(model).token_losses(model, input_ids, attention_mask, labels, smoothing)


def batch_losses(model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
    """Loss of each real target token of a batch, whose rows may be packed."""
    device = _device(model)
    return family_of(model).token_losses(model, *tensors_of(batch, device), smoothing, **_further(batch, device))


@torch.inference_mode()
def batch_logits(model: nn.Module, batch: Batch) -> Tensor:
    """In fp32: of each row of a classifier, [B, C], or of each token, [B, T, V]."""
    logits: Tensor = model(**inputs_of(model, batch)).logits
    return logits.float()


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Returns what the model's forward takes to give logits for a batch."""
    device = _device(model)
    return family_of(model).inputs(model, *tensors_of(batch, device), **_further(batch, device))


def tensors_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Its ids, mask and labels."""
    arrays = (batch.source_ids, batch.source_mask, batch.labels)
    input_ids, mask, labels = (torch.from_numpy(array).to(device) for array in arrays)
    return input_ids, mask, labels


def _further(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Returns what some batches have besides: which text each token is of, by number or as one of a pair."""
    arrays = {"documents": batch.documents, "token_types": batch.token_types}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items() if array is not None}


def _device(model: nn.Module) -> torch.device:
    """Returns where the model is."""
    return next(model.parameters()).device
