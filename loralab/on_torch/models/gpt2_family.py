"""GPT-2 as a family: see models/gpt2.py for its modules, models/gpt2_decoding.py for how it writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.models import gpt2
from loralab.models.checkpoint_files import GENERATION, read_json
from loralab.on_torch.generation.decode import DecoderState
from loralab.on_torch.models import gpt2_decoding
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.gpt2 import GPT2, drop_tied_head, from_files, in_file_layout
from loralab.on_torch.models.own_family import OwnFamily

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GPT2Family(CausalFamily, OwnFamily):
    """GPT-2 of any size, with nothing added to it."""

    architecture = gpt2.ARCHITECTURE
    module = GPT2
    blocks = ("Block",)
    files_hold_parameters = False

    def from_files(self, tensors: Iterable[tuple[str, Tensor]], config: Any) -> Iterator[tuple[str, Tensor]]:
        return from_files(tensors, config)

    def in_file_layout(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return in_file_layout(weights)

    def drop_copies(self, tensors: dict[str, Tensor], config: Any, folder: Path) -> None:
        drop_tied_head(tensors, config)

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """Reads a model; the tokens that end a text are those of generation_config.json, or the config's."""
        model = super().load(folder, config, dtype, device)
        assert isinstance(model, GPT2)
        model.ends = _ends(folder) or model.ends
        return model

    def save(self, model: nn.Module, folder: Path, source: Path) -> None:
        """Writes a model, and the tokens at which a chat's answers end."""
        super().save(model, folder, source)
        assert isinstance(model, GPT2)
        stored = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
        stored["eos_token_id"] = list(model.ends) if len(model.ends) > 1 else model.ends[0]
        (folder / GENERATION).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    def set_special_tokens(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, end: int | None) -> None:
        assert isinstance(model, GPT2)
        model.ends = tuple(dict.fromkeys([*model.ends, *([] if end is None else [end])]))

    def joined_inputs(
        self, model: nn.Module, ids: Tensor, mask: Tensor | None, documents: Tensor | None = None
    ) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": mask, "document_ids": documents}
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def joined_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        following: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(model, GPT2)
        return model.token_losses(ids, mask, following, smoothing, documents)

    def start_decoding(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, max_length: int, beams: int = 1
    ) -> DecoderState:
        assert isinstance(model, GPT2)
        return gpt2_decoding.Cache(model, input_ids, attention_mask, beams)


def _ends(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text by generation_config.json; none where it says nothing."""
    if not (folder / GENERATION).exists():
        return ()
    ends = read_json(folder / GENERATION).get("eos_token_id")
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
