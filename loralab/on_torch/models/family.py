"""The record of each model family: `ModelFamily`.

registry.py lists the families and finds the one of a model or of a config. Nothing else asks for a model's class: what differs
between families stands in theirs.

    ModelFamily                    what is asked
    ├── OwnFamily                  modules of loralab's own: own_family.py, with t5_family.py and gpt2_family.py
    └── TransformersFamily         any class of Transformers': transformers_families.py
    CausalFamily                   what decoder-only models of either kind have in common: causal.py

Shapes:  B rows   S source tokens   T target tokens   N predicted tokens of a batch   L tokens of the longest row
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.config.generation import Decoding
from loralab.data.stop_sequences import Stops
from loralab.models.lookup import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelFamily(ABC):
    """One kind of model: how it is built, read, written, trained, asked and planned.

    Attributes:
        causal: source and target are one sequence to it (decoder-only).
        classifies: it chooses among labels, and writes nothing.
        logits_in_chunks: a training step never has the logits of more than training/loss.py's CHUNK tokens at one time.
        files_hold_parameters: its files have each parameter under its own name and in its own layout.
        default_rules: where LoRA goes when a recipe names no rules; () where models/__init__.py says so by `model_type`.
    """

    causal = False
    classifies = False
    logits_in_chunks = True
    files_hold_parameters = False
    default_rules: tuple[str, ...] = ()

    # Which models it is of

    @abstractmethod
    def takes(self, config: Mapping[str, Any], classifies: bool) -> bool:
        """Says if models of this config.json are of this family.

        Args:
            classifies: the model is to choose among labels; otherwise it writes text.
        """

    @abstractmethod
    def owns(self, model: nn.Module) -> bool:
        """Says if a model is of this family."""

    # Building, reading, writing

    @abstractmethod
    def build(self, base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Builds a model from its settings alone: without numbers on the meta device, else with small random ones.

        Raises:
            ModelError: there is no class for these settings.
        """

    @abstractmethod
    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """Reads a model in evaluation mode.

        Args:
            config: the folder's config.json.
            dtype: of its weights; None keeps the one on disk, and the weights mapped.

        Raises:
            ModelError: the weights are damaged, or not what the config says.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, source: Path) -> None:
        """Writes config and weights in the published layout.

        Args:
            source: the folder that the model was read from.
        """

    def check_vocabulary(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:  # noqa: B027 (most need nothing)
        """Raises ModelError where the tokenizer has tokens that the model has no embedding of."""

    def positions(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Returns how many tokens of a row the model can tell apart by their place; None where there is no bound."""
        return positions_of_config(model.config)

    def set_special_tokens(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, end: int | None) -> None:  # noqa: B027 (most need nothing)
        """Tells the model which tokens have a meaning, also after it has been saved.

        Args:
            end: the token with which a text ends in the training data.
        """

    # Training

    @abstractmethod
    def inputs(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> dict[str, Any]:
        """Returns what the model's forward takes to give logits for these rows.

        Args:
            ids, mask: [B, S], padded on the right.
            labels: [B, T], -100 in the padding; of packed rows [B, S], what follows each token.
            documents: [B, S], of packed rows the number of each token's text, negative in the padding; for causal families alone.
            token_types: [B, S], of pairs of texts which one each token is of; for classifiers alone.
        """

    @abstractmethod
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
        """Returns the loss of each real target token in nats, [N], row by row, under teacher forcing; of a classifier those of its labels.

        Args: as in `inputs`.
        """

    @abstractmethod
    def checkpoint_activations(self, model: nn.Module) -> None:
        """Makes the model compute its activations again in the backward pass instead of keeping them."""

    @abstractmethod
    def sharding_units(self, model: nn.Module) -> list[str]:
        """Returns the names of the modules whose parameters are gathered together where the model is sharded over devices (FSDP).

        The forward of a training step calls each of them as a module, so that hooks on it run. Where one is inside another the
        inner one comes first. Parameters outside all of them are the whole model's own unit.
        """

    @abstractmethod
    def peft_task(self, model: nn.Module) -> str | None:
        """Returns PEFT's name for what the model does; None where it has none."""

    # Answers

    @abstractmethod
    def write(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoding: Decoding,
        rows: Sequence[int],
        on_token: Callable[[int], None] | None = None,
        stops: Stops | None = None,
    ) -> list[list[int]]:
        """Writes answers to a batch, greedy, by draws or by beam search, as ids without prompt, start and end token.

        Args:
            input_ids, attention_mask: [B, S], padded on the right, or for a causal family on the left.
            rows: places of these sources in the whole call, of which their draws are made.
            on_token: hears each token as it is written; for a batch of one, and no beam search.
            stops: texts with which an answer ends too; it keeps the token that completes one.
        """

    def generation_limit(self, model: nn.Module) -> int | None:
        """Returns the tokens that a text and its answer may have together; None where the class sees to that itself."""
        return None

    # Plans

    def run_once_before_training(self, model: nn.Module) -> None:  # noqa: B027 (most need nothing)
        """Does what the first of all steps does and no later one, so that a plan does not count it."""

    @abstractmethod
    def trace_answer(self, model: nn.Module, ids: Tensor, mask: Tensor, new: int, beams: int) -> None:
        """Runs, without numbers, the moment in which answering a batch holds the most: the last of `new` tokens.

        Args:
            ids, mask: [B, S], on the meta device.
        """


def positions_of_config(config: Any) -> int | None:
    """Returns how many positions a config names; None where it names none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    number = getattr(config, "max_position_embeddings", None)
    return number if isinstance(number, int) and number > 0 else None


def modules_called(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns the names of all modules in the model whose class has one of these names: what is inside another one before it, else in the
    model's order."""
    found = [name for name, module in model.named_modules() if name and type(module).__name__ in names]
    return sorted(found, key=lambda name: -name.count("."))
