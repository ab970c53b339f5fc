"""The PyTorch engine: one model, its optimizer, and the handful of things that the training loop asks for (see
engine.py)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralab.adapters.files import write_card
from loralab.atomic_files import whole_folder, write_with
from loralab.config.generation import Decoding
from loralab.config.recipe import Recipe
from loralab.data.batches import Batch
from loralab.data.encoded import Encoded
from loralab.data.stop_sequences import Stops
from loralab.engine import SavedModelCheck, Step, StepProfile
from loralab.metrics.labels import Labels
from loralab.on_torch.adapters.adapter_io import load_adapter
from loralab.on_torch.adapters.base import quantization_of, size, storage_in_words
from loralab.on_torch.generation.generate import generate_ids
from loralab.on_torch.loading.classifier import stored_labels
from loralab.on_torch.loading.load import save_model
from loralab.on_torch.loading.recipe_base import RecipeBase
from loralab.on_torch.models.classifier import label_losses
from loralab.on_torch.models.heads import head_in_words
from loralab.on_torch.models.output import IGNORED
from loralab.on_torch.ops.onednn_linear import prepacked_weights
from loralab.on_torch.ops.random_streams import random_state, set_random_state
from loralab.on_torch.profiling.memory import peak_memory
from loralab.on_torch.profiling.meter import Meter
from loralab.on_torch.training.diagnose import first_not_finite
from loralab.on_torch.training.feature_cache import FeatureCache
from loralab.on_torch.training.forward import batch_logits, batch_losses, inputs_of, tensors_of
from loralab.on_torch.training.frozen_prefix import encoder_of, find_frozen_prefix
from loralab.on_torch.training.optimizer import Optimizer
from loralab.on_torch.training.set_trainable import set_trainable

# fp32: sums in another order. bf16: W + sBA is rounded to 8 bits.
MERGED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


class TorchEngine:
    """One model on one device."""

    def __init__(
        self,
        recipe: Recipe,
        base: str,
        trained: Path | None,
        start: Path | None = None,
        labels: Labels | None = None,
    ) -> None:
        """`base`: the model's folder or hub id. `trained`: an adapter to put on it; `start`: one whose weights a fresh one takes."""
        self.recipe = recipe
        self.base = RecipeBase(recipe, base, labels)
        self.model = self.base.open()
        self.tokenizer, self.prompt, self.labels = self.base.tokenizer, self.base.prompt, self.base.labels
        self.causal, self.positions = self.base.causal, self.base.positions
        self.device, self.dtype, self.dtype_reason = str(self.base.device), self.base.dtype_name, self.base.dtype_reason
        torch.manual_seed(recipe.training.one_seed)
        self.model, self.adapter = set_trainable(self.model, recipe, trained, start, self.base.fresh)
        self.pad_id = int(self.tokenizer.pad_token_id or 0)
        self._features: FeatureCache | None = None
        self._optimizer: Optimizer | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained."""
        if self.adapter is not None:
            return self.adapter.parameters()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def total(self) -> int:
        return self.adapter.total if self.adapter else size(self.model)

    @property
    def summary(self) -> str:
        text = str(self.adapter) if self.adapter else f"Trained: {self.trainable:,} of {self.total:,} parameters."
        head = ""
        if self.labels is not None:
            saved = () if self.adapter is None else self.adapter.tuned
            head = head_in_words(self.model, self.parameters, saved, bool(self.base.fresh), self.labels)
        return "\n".join(filter(None, [text, storage_in_words(self.model), head]))

    @property
    def note(self) -> str | None:
        return self.adapter.note if self.adapter else None

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> Step:
        self._set_training()
        tokens, loss = sum(batch.num_target_tokens for batch in batches), 0.0
        for batch in batches:
            smoothing = self.recipe.training.label_smoothing
            part = self._token_losses(batch, smoothing).sum() / tokens
            part.backward()
            loss += float(part.detach())
        return Step(loss, self.optimizer.step(learning_rate))

    def _set_training(self) -> None:
        """Dropout on; off in the frozen part where the head alone is trained, unless the recipe wants it there too."""
        self.model.train()
        if self.recipe.training.method == "head" and not self.recipe.training.frozen_dropout:
            encoder_of(self.model).eval()

    def _token_losses(self, batch: Batch, smoothing: float) -> Tensor:
        logits = None if self._features is None else self._features.logits(batch)
        if logits is None:
            return batch_losses(self.model, batch, smoothing)
        assert self.labels is not None
        return label_losses(
            logits, torch.from_numpy(batch.labels).to(self.base.device), self.labels.problem_type, smoothing
        )

    def cache_frozen_features(self, encoded: Encoded, on_done: Callable[[int], None]) -> None:
        if self.labels is None or self.recipe.data.text_pair is not None or self.recipe.training.frozen_dropout:
            return
        if self._features is None:
            rows = np.argsort(encoded.source_lengths)[[0, -1]]  # of two lengths, so that one is padded
            ids, mask, _ = tensors_of(encoded.collate(rows, self.pad_id), self.base.device)
            prefix = find_frozen_prefix(self.model, ids, mask)
            if prefix is None:
                return
            self._features = FeatureCache(prefix, self.pad_id)
        self._features.prepare(encoded, on_done)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> NDArray[np.float64]:
        self.model.eval()
        known = None if self._features is None else self._features.logits(batch)
        found = batch_logits(self.model, batch) if known is None else known
        table: NDArray[np.float64] = found.cpu().double().numpy()  # Apple's GPUs have no float64
        return table

    @property
    def optimizer(self) -> Optimizer:
        if self._optimizer is None:
            embeddings = [module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)]
            self._optimizer = Optimizer(self.parameters, self._lora_B_parameters(), self.recipe.optimizer, embeddings)
        return self._optimizer

    def _lora_B_parameters(self) -> list[nn.Parameter]:
        """LoRA's B matrices, which LoRA+ trains at a rate of their own."""
        return [] if self.adapter is None else [update.B for update in self.adapter.updates.values()]

    @contextmanager
    def profile(self) -> Iterator[StepProfile]:
        watched = StepProfile()
        held = [] if self._optimizer is None else self._optimizer.state_tensors()
        with Meter([*self.model.parameters(), *self.model.buffers(), *self.parameters, *held]) as meter:
            yield watched
        watched.flops, watched.peak_bytes = meter.flops, meter.peak

    def diagnose(self, batches: Sequence[Batch]) -> str:
        return first_not_finite(self.model, [inputs_of(self.model, batch) for batch in batches])

    def save_state(self, file: Path) -> None:
        write_with(file, lambda part: save_file(self.optimizer.state() | random_state(), part))

    def load_state(self, file: Path) -> None:
        state = load_file(file)
        self.optimizer.load(state)
        set_random_state(state)

    @contextmanager
    def preserve_rng(self) -> Iterator[None]:
        streams = random_state()
        try:
            yield
        finally:
            set_random_state(streams)

    @torch.inference_mode()
    def losses(self, batch: Batch) -> NDArray[np.float64]:
        self.model.eval()
        per_token = self._token_losses(batch, 0.0).cpu().double()
        real = (batch.labels != IGNORED) | (batch.labels.dtype.kind == "f")  # a number may be -100
        counts = torch.from_numpy(real.sum(axis=1))
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, rows, per_token).numpy()

    def generate(
        self,
        source_ids: Sequence[Sequence[int]],
        decoding: Decoding,
        on_done: Callable[[int], None] | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        stops = Stops(self.tokenizer, decoding.stop) if decoding.stop else None
        return generate_ids(self.model, source_ids, decoding, self.pad_id, on_done, on_token, stops)

    def generation_mode(self) -> AbstractContextManager[None]:
        return prepacked_weights(self.model)

    def save(self, folder: Path, card: dict[str, Any]) -> Path:
        if self.labels is not None:
            card = card | {"labels": self.labels.as_json()}
        if self.adapter is not None:
            self.adapter.card = card
            self.adapter.save(folder / "adapter", self.tokenizer)
            return folder / "adapter"
        with whole_folder(folder / "model") as part:
            save_model(self.model, part, self.base.folder, self.tokenizer)
            write_card(part, card)
        return folder / "model"

    def verify_saved(self, saved: Path, batch: Batch) -> SavedModelCheck:
        self.model.eval()
        live = batch_logits(self.model, batch)
        if quantization_of(self.model) is not None:
            return SavedModelCheck(self._read_again(saved, live, batch), None, None)
        again = self.base.read(saved if self.adapter is None else self.base.folder)
        if self.adapter is not None:
            load_adapter(again, saved)
        equal = torch.equal(live, batch_logits(again, batch))
        if self.adapter is None:
            return SavedModelCheck(equal, None, None)
        del again
        gc.collect()
        merged = batch_logits(self.adapter.merge(), batch)
        error = float((merged - live).abs().max() / live.abs().max())
        return SavedModelCheck(equal, error, MERGED_TOLERANCE[self.base.dtype])

    def _read_again(self, saved: Path, live: Tensor, batch: Batch) -> bool:
        """A large base is read again in the place of the live one, so that memory never holds two; and never the merged one."""
        assert self.adapter is not None, "a packed base is not trained whole"
        self.model, self.adapter, self._optimizer, self._features = nn.Module(), None, None, None
        gc.collect()
        self.model = self.base.read(self.base.folder)
        self.base.set_special_tokens(self.model)
        self.model, self.adapter = set_trainable(self.model, self.recipe, saved, None, self.base.fresh)
        self.model.eval()
        return torch.equal(live, batch_logits(self.model, batch))

    def peak_memory(self) -> int:
        return peak_memory(self.base.device)


def open_engine(
    recipe: Recipe, base: Path | None = None, start: Path | None = None, labels: Labels | None = None
) -> TorchEngine:
    """See engine.py."""
    return TorchEngine(recipe, recipe.model.name if base is None else str(base), None, start, labels)


def load_engine(recipe: Recipe, saved: Path, labels: Labels | None = None) -> TorchEngine:
    """The model of a finished run: `saved` is its adapter, or its model where all of it was trained."""
    labels = stored_labels(saved) or labels
    if recipe.training.method == "full":
        return TorchEngine(recipe, str(saved), None, None, labels)
    return TorchEngine(recipe, recipe.model.name, saved, None, labels)
