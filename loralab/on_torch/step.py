"""The PyTorch engine: one model, its optimizer, and the handful of things that the training loop asks for (see
engine.py)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralab.config import Recipe
from loralab.data.batches import Batch
from loralab.data.chat import Chat
from loralab.data.encode import prompt_of
from loralab.decoding import Decoding
from loralab.engine import Proof, Step
from loralab.on_torch import causal
from loralab.on_torch.attach import Adapter, attach
from loralab.on_torch.device import choose_device, choose_dtype
from loralab.on_torch.diagnose import first_not_finite
from loralab.on_torch.dropout import Dropout
from loralab.on_torch.generate import generate_ids
from loralab.on_torch.kinds import check_kind, check_looks_back
from loralab.on_torch.load import load_tokenizer, load_weights, model_folder, save_model
from loralab.on_torch.loss import log_probabilities, smoothed
from loralab.on_torch.memory import peak_memory
from loralab.on_torch.models.t5 import IGNORED, T5
from loralab.on_torch.optimizer import Optimizer, random_state, set_random_state
from loralab.on_torch.stored import continue_from, load_adapter

# fp32: sums in another order. bf16: W + sBA is rounded to 8 bits.
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def token_losses(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each real target token, [N], row by row."""
    if isinstance(model, T5):
        return model.token_losses(input_ids, attention_mask, labels, smoothing)
    if causal.is_causal(model):
        return causal.token_losses(model, input_ids, attention_mask, labels, smoothing)
    logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).logits
    real_BT = labels != IGNORED
    return smoothed(log_probabilities(logits_BTV[real_BT]), labels[real_BT], smoothing)


class TorchEngine:
    """One model on one device."""

    def __init__(self, recipe: Recipe, base: str, trained: Path | None, start: Path | None = None) -> None:
        """`base`: the model's folder or hub id. `trained`: an adapter to put on it; `start`: one whose weights a fresh one takes."""
        self.recipe, self.folder = recipe, model_folder(base)
        check_kind(self.folder)
        self._device = choose_device(recipe.model.device)
        self._dtype, self.dtype_reason = choose_dtype(recipe.model.dtype, self._device)
        self.device, self.dtype = str(self._device), str(self._dtype).removeprefix("torch.")
        self.model = load_weights(self.folder, self._dtype, self._device)
        self.model.name_or_path = recipe.model.name  # type: ignore[assignment]
        self.tokenizer = load_tokenizer(self.folder)
        self.causal = causal.is_causal(self.model)
        self.positions = causal.positions(self.model)
        self.prompt = prompt_of(recipe.data, self.tokenizer, self.causal)
        if self.causal:
            check_looks_back(self.model)
            causal.stop_at(
                self.model, self.prompt.end if isinstance(self.prompt, Chat) else self.tokenizer.eos_token_id
            )
        torch.manual_seed(recipe.training.one_seed)
        self.adapter = self._prepare(trained)
        if start is not None:
            assert self.adapter is not None
            continue_from(self.adapter, self.model, start)
        self.pad_id = int(self.tokenizer.pad_token_id or 0)
        self._optimizer: Optimizer | None = None

    def _prepare(self, trained: Path | None) -> Adapter | None:
        method = self.recipe.training.method
        if self.recipe.model.dropout is not None:
            _set_dropout(self.model, self.recipe.model.dropout)
        if self.recipe.training.gradient_checkpointing:
            checkpoint_activations(self.model)
        self.model.requires_grad_(method == "full")
        if method != "lora":
            return None
        return attach(self.model, self.recipe.spec()) if trained is None else load_adapter(self.model, trained)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        if self.adapter is not None:
            return self.adapter.parameters()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def total(self) -> int:
        return self.adapter.total if self.adapter else sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def summary(self) -> str:
        return str(self.adapter) if self.adapter else f"Trained: {self.trainable:,} of {self.total:,} parameters."

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> Step:
        self.model.train()
        tokens, loss = sum(batch.num_target_tokens for batch in batches), 0.0
        for batch in batches:
            smoothing = self.recipe.training.label_smoothing
            part = token_losses(self.model, *self._tensors(batch), smoothing).sum() / tokens
            part.backward()
            loss += float(part.detach())
        return Step(loss, self.optimizer.step(learning_rate))

    @property
    def optimizer(self) -> Optimizer:
        if self._optimizer is None:
            self._optimizer = Optimizer(self.parameters, self._twins(), self.recipe.optimizer)
        return self._optimizer

    def _twins(self) -> list[nn.Parameter]:
        """LoRA's B matrices, which LoRA+ trains at a rate of their own."""
        return [] if self.adapter is None else [update.B for update in self.adapter.updates.values()]

    def diagnose(self, batches: Sequence[Batch]) -> str:
        return first_not_finite(self.model, [self._tensors(batch) for batch in batches])

    def save_state(self, file: Path) -> None:
        try:
            save_file(self.optimizer.state() | random_state(), file)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(str(error)) from error

    def load_state(self, file: Path) -> None:
        state = load_file(file)
        self.optimizer.load(state)
        set_random_state(state)

    @contextmanager
    def aside(self) -> Iterator[None]:
        streams = random_state()
        try:
            yield
        finally:
            set_random_state(streams)

    @torch.inference_mode()
    def losses(self, batch: Batch) -> NDArray[np.float64]:
        self.model.eval()
        per_token = token_losses(self.model, *self._tensors(batch)).double().cpu()
        counts = torch.from_numpy((batch.labels != IGNORED).sum(axis=1))
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, rows, per_token).numpy()

    def generate(
        self,
        source_ids: Sequence[Sequence[int]],
        decoding: Decoding,
        on_done: Callable[[int], None] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        return generate_ids(self.model, source_ids, decoding, self.pad_id, on_done, on_token)

    def save(self, folder: Path, card: dict[str, Any]) -> Path:
        if self.adapter is not None:
            self.adapter.card = card
            self.adapter.save(folder / "adapter", self.tokenizer)
            return folder / "adapter"
        save_model(self.model, folder / "model", self.folder, self.tokenizer)
        return folder / "model"

    def prove(self, saved: Path, batch: Batch) -> Proof:
        self.model.eval()
        live = self._logits(self.model, batch)
        again = load_weights(saved if self.adapter is None else self.folder, self._dtype, self._device)
        if self.adapter is not None:
            again.name_or_path = self.recipe.model.name  # type: ignore[assignment]
            load_adapter(again, saved)
        equal = torch.equal(live, self._logits(again, batch))
        if self.adapter is None:
            return Proof(equal, None, None)
        del again
        gc.collect()
        merged = self._logits(self.adapter.merge(), batch)
        error = float((merged - live).abs().max() / live.abs().max())
        return Proof(equal, error, MERGED_TOLERANCE[self._dtype])

    @torch.inference_mode()
    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**causal.inputs_of(model, *self._tensors(batch))).logits
        return logits.float()

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        arrays = (batch.source_ids, batch.source_mask, batch.labels)
        input_ids, mask, labels = (torch.from_numpy(array).to(self._device) for array in arrays)
        return input_ids, mask, labels

    def peak_memory(self) -> int:
        return peak_memory(self._device)


def checkpoint_activations(model: nn.Module) -> None:
    """Makes the model compute its activations again in the backward pass instead of keeping them."""
    if isinstance(model, T5):
        model.encoder.checkpointing = model.decoder.checkpointing = True
    else:
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name since Transformers 5.23
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Everywhere: our modules, PyTorch's, and the rates that Transformers' modules keep as plain numbers."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = rate
        elif isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


def open_engine(recipe: Recipe, base: Path | None = None, start: Path | None = None) -> TorchEngine:
    """See engine.py."""
    return TorchEngine(recipe, recipe.model.name if base is None else str(base), None, start)


def load_engine(recipe: Recipe, saved: Path) -> TorchEngine:
    """The model of a finished run: `saved` is its adapter, or its model where all of it was trained."""
    if recipe.training.method == "full":
        return TorchEngine(recipe, str(saved), None)
    return TorchEngine(recipe, recipe.model.name, saved)


def merge_folder(base: str, adapter: Path, out: Path) -> None:
    """Writes base and adapter as one plain model; sums in fp32, rounded once to the dtype that the base has on disk."""
    folder = model_folder(base)
    model = load_weights(folder, None, torch.device("cpu"))
    model.name_or_path = base  # type: ignore[assignment]
    merged = load_adapter(model, adapter).merge()
    save_model(merged, out, folder, load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else folder))
