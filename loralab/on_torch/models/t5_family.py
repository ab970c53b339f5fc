"""T5 as a family: see models/t5.py for its modules, models/t5_decoding.py for how it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.models import t5
from loralab.on_torch.generation.decode import DecoderState
from loralab.on_torch.models import t5_decoding
from loralab.on_torch.models.own_family import META, OwnFamily
from loralab.on_torch.models.t5 import T5


class T5Family(OwnFamily):
    """T5 and FLAN-T5, of any size."""

    architecture = t5.ARCHITECTURE
    module = T5
    blocks = ("Block",)

    def empty(self, config: Any, own_head: bool | None = None) -> nn.Module:
        with META:
            return T5(config, own_head)

    def drop_copies(self, tensors: dict[str, Tensor], config: Any, folder: Path) -> None:
        t5.drop_copies(tensors, folder, torch.equal)

    def inputs(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def token_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(model, T5)
        return model.token_losses(ids, mask, labels, smoothing)

    def start_decoding(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, max_length: int, beams: int = 1
    ) -> DecoderState:
        assert isinstance(model, T5)
        return t5_decoding.start(model, input_ids, attention_mask, max_length, beams)

    def sharding_units(self, model: nn.Module) -> list[str]:
        """Returns the tables of position biases, which each stack reads before its first block, and the blocks."""
        tables = [name for name, _ in model.named_modules() if name.endswith(".relative_attention_bias")]
        return [*tables, *super().sharding_units(model)]
