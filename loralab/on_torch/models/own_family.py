"""Families whose modules are loralab's own: files are read and written here tensor by tensor, and texts are written by
generation/decode.py and beam_search.py.

A family of this kind has at least a data record (models/architecture.py), a module, and how it reads a source before the first token
is written. The module's class has `config`, `ends` (tokens that end a text), `tied_head`, and Hugging Face's forward.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loralab.config.generation import Decoding
from loralab.data.stop_sequences import Stops
from loralab.errors import ModelError
from loralab.models.architecture import OwnArchitecture
from loralab.models.checkpoint_files import SAFETENSORS, check_shapes, check_tokens, copy_configs
from loralab.models.lookup import Base
from loralab.on_torch.generation.beam_search import beam_search
from loralab.on_torch.generation.decode import DecoderState, decode
from loralab.on_torch.loading.weights import read_weights
from loralab.on_torch.models.family import ModelFamily, modules_called

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

META = torch.device("meta")
NARROW = 0.02  # random weights lie within so much of zero: nothing overflows, and no denormal number slows a step down


class OwnFamily(ModelFamily):
    """A family of modules of loralab's own.

    Attributes:
        architecture: its data.
        module: its class.
        blocks: names of the classes of its repeated blocks, which a training step calls as modules.
    """

    architecture: OwnArchitecture
    module: type[nn.Module]
    blocks: tuple[str, ...]
    files_hold_parameters = True

    @property
    def default_rules(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.architecture.default_rules

    def takes(self, config: Mapping[str, Any], classifies: bool) -> bool:
        return not classifies and self.architecture.accepts(config)

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, self.module)

    # Building

    def empty(self, config: Any, own_head: bool | None = None) -> nn.Module:
        """Builds the module of these settings without numbers.

        Args:
            own_head: the output matrix is separate from the embedding; None where the settings decide.
        """
        with META:
            return self.module(config)

    def build(self, base: Base, dtype: torch.dtype, device: torch.device) -> nn.Module:
        model = self.empty(self.architecture.parse(base.config), base.own_head).to(dtype)
        if device == META:
            return model
        model = model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-NARROW, NARROW)
        return model

    def new_weights(self, config: Any, seed: int) -> dict[str, Tensor]:
        """Draws the weights of a new model in fp32, the same for the same seed, under the names and in the layout of files."""
        shapes = self.empty(config).state_dict()
        return self.in_file_layout(_drawn(shapes, lambda name: self.architecture.deviation(name, config), seed))

    # Files

    def from_files(self, tensors: Iterable[tuple[str, Tensor]], config: Any) -> Iterator[tuple[str, Tensor]]:
        """Turns tensors as files have them into those of the module's parameters; unknown names stay as they are."""
        yield from tensors

    def drop_copies(self, tensors: dict[str, Tensor], config: Any, folder: Path) -> None:
        """Removes tensors that hold nothing of their own.

        Raises:
            ModelError: one of them is no copy.
        """

    def in_file_layout(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turns weights of the module's parameters into what files have: the inverse of `from_files`."""
        return dict(weights)

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        settings = self.architecture.parse(config)
        named = self.from_files(read_weights(folder), settings)
        # Turned matrices are copied into rows where they are to be multiplied by; without a dtype all stays mapped.
        tensors = {
            name: each.to(device) if dtype is None else each.to(device, dtype).contiguous() for name, each in named
        }
        self.drop_copies(tensors, settings, folder)
        model = self.empty(settings, self._own_head(tensors))
        check_shapes(_shapes(model.state_dict()), _shapes(tensors), folder)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def _own_head(self, names: Collection[str]) -> bool | None:
        decides = self.architecture.has_own_head
        return None if decides is None else decides(names)

    def save(self, model: nn.Module, folder: Path, source: Path) -> None:
        named = self.in_file_layout(model.state_dict())
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})
        copy_configs(source, folder, dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."))

    def write_new(self, config: Any, seed: int, folder: Path) -> None:
        """Writes config.json and new weights in fp32."""
        raw = self.architecture.as_json(config) | {"dtype": "float32"}
        weights = {name: tensor.contiguous() for name, tensor in self.new_weights(config, seed).items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        save_file(weights, folder / SAFETENSORS, metadata={"format": "pt"})

    def check_vocabulary(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        check_tokens(model.config.vocab_size, tokenizer, folder)  # type: ignore[union-attr, arg-type]

    # Training

    def checkpoint_activations(self, model: nn.Module) -> None:
        """Sets `checkpointing` on every module that has it."""
        stacks = [module for module in model.modules() if hasattr(module, "checkpointing")]
        if not stacks:
            raise ModelError(
                f"{type(model).__name__} cannot compute activations again. Set training.gradient_checkpointing to false."
            )
        for stack in stacks:
            stack.checkpointing = True  # type: ignore[assignment]

    def sharding_units(self, model: nn.Module) -> list[str]:
        return modules_called(model, self.blocks)

    def peft_task(self, model: nn.Module) -> str | None:
        return "CAUSAL_LM" if self.causal else "SEQ_2_SEQ_LM"

    # Answers

    @abstractmethod
    def start_decoding(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, max_length: int, beams: int = 1
    ) -> DecoderState:
        """Reads the sources [B, S], after which up to `max_length` tokens can be written, by `beams` hypotheses of each."""

    @torch.inference_mode()
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
        ends: Any = model.ends
        state = self.start_decoding(model, input_ids, attention_mask, decoding.max_new_tokens, decoding.beams)
        if decoding.beams > 1:
            return beam_search(state, ends, decoding, stops)
        return decode(state, ends, decoding, rows, on_token, stops)

    def generation_limit(self, model: nn.Module) -> int | None:
        limit: int | None = getattr(model.config, "max_position_embeddings", None)
        return limit

    def trace_answer(self, model: nn.Module, ids: Tensor, mask: Tensor, new: int, beams: int) -> None:
        state = self.start_decoding(model, ids, mask, new, beams)
        widened = state.grow(new - 1)
        hypotheses = torch.empty(len(ids) * beams, dtype=torch.long, device=META)
        logits = state.next_logits(hypotheses)
        if beams > 1:
            torch.log_softmax(logits, -1)
            state.reorder(hypotheses)
        del widened  # until now there, as beside a cache that makes room


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _drawn(shapes: Mapping[str, Tensor], deviation: Callable[[str], float | None], seed: int) -> dict[str, Tensor]:
    """New weights of these shapes. What is not drawn begins at 1, and at 0 if it is a bias."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, tensor in shapes.items():
        spread = deviation(name)
        if spread is not None:
            weights[name] = torch.randn(tensor.shape, generator=generator) * spread
        else:
            weights[name] = torch.zeros(tensor.shape) if name.endswith(".bias") else torch.ones(tensor.shape)
    return weights
