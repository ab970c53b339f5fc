"""A batch of a decoder-only model as people write it for Transformers: what our two causal trajectories are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from loralab.data.batches import Batch


def joined(batch: Batch) -> dict[str, Tensor]:
    """A batch as people write it for Transformers, row by row: the prompt stands in the labels as -100."""
    rows = []
    for ids, mask, labels in zip(batch.source_ids, batch.source_mask, batch.labels, strict=True):
        source, target = ids[mask].tolist(), labels[labels != -100].tolist()
        rows.append((source + target, [-100] * len(source) + target))
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }
