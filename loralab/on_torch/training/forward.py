"""What a model makes of a batch, whatever its kind: the losses of its tokens, and its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loralab.data.batches import Batch
from loralab.on_torch.loading import classifier
from loralab.on_torch.models import causal
from loralab.on_torch.models.heads import is_classifier
from loralab.on_torch.models.output import IGNORED
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.training import sequence_packing
from loralab.on_torch.training.loss import log_probabilities, smoothed


def token_losses(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each real target token, [N], row by row."""
    if isinstance(model, T5):
        return model.token_losses(input_ids, attention_mask, labels, smoothing)
    if is_classifier(model):
        return classifier.token_losses(model, input_ids, attention_mask, labels, smoothing)
    if causal.is_causal(model):
        return causal.token_losses(model, input_ids, attention_mask, labels, smoothing)
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
    real_BT = labels != IGNORED
    return smoothed(log_probabilities(logits_BTV[real_BT]), labels[real_BT], smoothing)


def batch_losses(model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
    """The same of a batch, whose rows may be packed."""
    tensors = tensors_of(batch, _device(model))
    if batch.token_types is not None:
        return classifier.token_losses(model, *tensors, smoothing, _token_types(batch, tensors[0].device))
    if batch.documents is None:
        return token_losses(model, *tensors, smoothing)
    ids, _, labels = tensors
    return sequence_packing.token_losses(model, ids, _documents(batch, ids.device), labels, smoothing)


@torch.inference_mode()
def batch_logits(model: nn.Module, batch: Batch) -> Tensor:
    """In fp32: of each row of a classifier, [B, C], or of each token, [B, T, V]."""
    if is_classifier(model):
        ids, mask, _ = tensors_of(batch, _device(model))
        return classifier.logits(model, ids, mask, _token_types(batch, ids.device))
    logits: Tensor = model(**inputs_of(model, batch)).logits
    return logits.float()


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the forward of a model that writes takes."""
    tensors = tensors_of(batch, _device(model))
    if batch.documents is not None:
        return sequence_packing.inputs_of(model, tensors[0], _documents(batch, tensors[0].device))
    return causal.inputs_of(model, *tensors)


def tensors_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Its ids, mask and labels."""
    arrays = (batch.source_ids, batch.source_mask, batch.labels)
    input_ids, mask, labels = (torch.from_numpy(array).to(device) for array in arrays)
    return input_ids, mask, labels


def _documents(batch: Batch, device: torch.device) -> Tensor:
    assert batch.documents is not None
    return torch.from_numpy(batch.documents).to(device)


def _token_types(batch: Batch, device: torch.device) -> Tensor | None:
    return None if batch.token_types is None else torch.from_numpy(batch.token_types).to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
