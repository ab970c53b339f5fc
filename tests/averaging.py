"""A family that loralab does not have: a decoder without attention, in which a token sees the average of what stands before it.

Data and modules as they would stand in loralab/models/averaging.py and loralab/on_torch/models/averaging.py; `FAMILY` is the line in
loralab/on_torch/models/registry.py.

Shapes:  B rows   L tokens of a row   N hypotheses of all rows   D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.config.model import ModelSizes
from loralab.models.architecture import OwnArchitecture, SpecialTokens
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.kv_cache import hypotheses_of
from loralab.on_torch.models.output import IGNORED, Output
from loralab.on_torch.models.own_family import OwnFamily
from loralab.on_torch.ops.onednn_linear import Linear, times
from loralab.on_torch.ops.random_streams import checkpointed
from loralab.on_torch.training.loss import token_losses

# Data


@dataclass(frozen=True)
class AveragingConfig:
    """The settings."""

    width: int
    layers: int
    vocab_size: int = 100
    eos_token_id: int = 1

    model_type = "averaging"
    is_encoder_decoder = False


def _parse(raw: Any) -> AveragingConfig:
    known = {field.name for field in fields(AveragingConfig)}
    return AveragingConfig(**{key: value for key, value in raw.items() if key in known})


def _as_json(config: AveragingConfig) -> dict[str, Any]:
    return {"model_type": "averaging", "architectures": ["AveragingForCausalLM"], **asdict(config)}


def _new(name: str, sizes: ModelSizes | None, vocabulary: int, tokens: SpecialTokens) -> AveragingConfig:
    assert tokens.end is not None
    return replace(SIZES[name], vocab_size=vocabulary, eos_token_id=tokens.end)


def _deviation(name: str, config: AveragingConfig) -> float | None:
    return None if "norm" in name or name.endswith(".bias") else config.width**-0.5


SIZES = {"averaging-tiny": AveragingConfig(width=32, layers=2)}
ARCHITECTURE = OwnArchitecture(
    model_type="averaging",
    default_rules=("inner", "outer"),
    sizes=SIZES,
    accepts=lambda raw: raw.get("model_type") == "averaging",
    parse=_parse,
    as_json=_as_json,
    new=_new,
    deviation=_deviation,
    vocabulary=100,
)

# Modules


class Block(nn.Module):
    """The average of what stands before a token, and two products."""

    def __init__(self, config: AveragingConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.inner, self.outer = Linear(config.width, 2 * config.width), Linear(2 * config.width, config.width)

    def forward(self, x_BLD: Tensor, weights_BLL: Tensor) -> Tensor:
        return self.after(x_BLD, weights_BLL @ self.norm(x_BLD))

    def after(self, x_BLD: Tensor, average_BLD: Tensor) -> Tensor:
        """The stream after the block."""
        added: Tensor = self.outer(F.gelu(self.inner(average_BLD)))
        return x_BLD + added


class Averaging(nn.Module):
    """The model; its output head is the embedding."""

    def __init__(self, config: AveragingConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.block = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.final_norm = nn.LayerNorm(config.width)
        self.ends, self.name_or_path, self.checkpointing = (config.eos_token_id,), "", False

    @property
    def tied_head(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, documents: Tensor | None = None
    ) -> Output:
        return Output(None, self.logits(self.states(input_ids, attention_mask, documents)))

    def states(self, ids_BL: Tensor, mask_BL: Tensor | None, documents_BL: Tensor | None) -> Tensor:
        """[B, L, D] before the head."""
        seen_BLL = torch.ones(ids_BL.shape[1], ids_BL.shape[1], device=ids_BL.device).tril()[None]
        if mask_BL is not None:
            seen_BLL = seen_BLL * mask_BL[:, None, :]
        if documents_BL is not None:
            seen_BLL = seen_BLL * (documents_BL[:, None, :] == documents_BL[:, :, None])
        weights_BLL = (seen_BLL / seen_BLL.sum(-1, keepdim=True).clamp(min=1)).to(self.embedding.weight.dtype)
        x_BLD = self.embedding(ids_BL)
        for block in self.block:
            run: Callable[..., Tensor] = block
            if self.checkpointing and self.training:
                x_BLD = checkpointed(run, x_BLD, weights_BLL)
            else:
                x_BLD = run(x_BLD, weights_BLL)
        states_BLD: Tensor = self.final_norm(x_BLD)
        return states_BLD

    def logits(self, states_D: Tensor) -> Tensor:
        return times(states_D, self.embedding)


class Sums:
    """What the model remembers while it writes: of each hypothesis and block the sum of what stands before."""

    def __init__(self, model: Averaging, ids_BL: Tensor, mask_BL: Tensor, beams: int) -> None:
        self.model, self.beams = model, beams
        self.context = ids_BL.where(mask_BL.bool(), ids_BL[:, -1:])
        self.count_N1 = mask_BL[:, :-1].sum(1, keepdim=True).repeat_interleave(beams, 0)
        zeros = model.embedding.weight.new_zeros(len(ids_BL), model.config.width)
        self.sums = [zeros.clone() for _ in model.block]
        for place in range(ids_BL.shape[1] - 1):
            self._read(ids_BL[:, place], mask_BL[:, place, None], mask_BL[:, : place + 1].sum(1, keepdim=True))
        self.sums = [each.repeat_interleave(beams, 0) for each in self.sums]

    def _read(self, tokens_N: Tensor, real_N1: Tensor, count_N1: Tensor) -> Tensor:
        x_ND = self.model.embedding(tokens_N)
        for index, block in enumerate(self.model.block):
            assert isinstance(block, Block)
            self.sums[index] = self.sums[index] + block.norm(x_ND) * real_N1
            x_ND = block.after(x_ND, (self.sums[index] / count_N1.clamp(min=1)).to(x_ND.dtype))
        return x_ND

    def next_logits(self, tokens_N: Tensor) -> Tensor:
        self.count_N1 = self.count_N1 + 1
        x_ND = self._read(tokens_N, torch.ones_like(self.count_N1), self.count_N1)
        return self.model.logits(self.model.final_norm(x_ND)).float()

    def keep(self, sources: Tensor) -> None:
        self.reorder(hypotheses_of(sources, len(self.count_N1), self.beams))

    def reorder(self, hypotheses: Tensor) -> None:
        self.sums, self.count_N1 = [each[hypotheses] for each in self.sums], self.count_N1[hypotheses]

    def grow(self, tokens: int) -> object:
        """Sums are as large after any number of tokens."""
        return None


class AveragingFamily(CausalFamily, OwnFamily):
    """The family."""

    architecture, module, blocks = ARCHITECTURE, Averaging, ("Block",)

    def joined_inputs(
        self, model: nn.Module, ids: Tensor, mask: Tensor | None, documents: Tensor | None = None
    ) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": mask, "documents": documents}

    def joined_losses(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None,
        following: Tensor,
        smoothing: float = 0.0,
        documents: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(model, Averaging)
        predicts = following != IGNORED
        states_ND = model.states(ids, mask, documents)[predicts]
        return token_losses(states_ND, model.logits, None, following[predicts], smoothing)

    def start_decoding(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, max_length: int, beams: int = 1
    ) -> Sums:
        assert isinstance(model, Averaging)
        return Sums(model, input_ids, attention_mask, beams)


FAMILY = AveragingFamily()
