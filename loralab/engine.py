"""The engine's interface for the training loop, evaluation and the command line. Tensors stay behind it.

An engine is one model with one way of training it: `open_engine` makes a fresh one, `load_engine` one from a finished
run or an adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loralab.tasks.task import TaskModel

if TYPE_CHECKING:
    from loralab.config.model import ModelSettings
    from loralab.config.recipe import Recipe
    from loralab.data.batches import Batch
    from loralab.data.encoded import Encoded
    from loralab.metrics.labels import Labels
    from loralab.models.lookup import Base


@dataclass(frozen=True)
class Step:
    """Result of one optimizer step."""

    loss: float
    """Mean over the step's target tokens, in nats, before the update."""
    grad_norm: float
    """Length of the gradient before clipping."""


@dataclass(frozen=True)
class SavedModelCheck:
    """Result of comparing the saved model with the trained one, on real rows right after training."""

    reloaded_equal: bool
    """Base and adapter read again from disk give bit-identical logits."""
    merged_error: float | None
    """Largest difference between the logits with the adapter and those of the merged model, over the largest logit."""
    merged_tolerance: float | None
    """Largest error that is accepted in this dtype."""


@dataclass
class StepProfile:
    """FLOPs and memory of one step."""

    flops: int = 0
    """FLOPs of matrix products."""
    peak_bytes: int = 0
    """Bytes of tensors, at one time."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The size of a batch."""

    rows: int
    source: int
    target: int
    """Tokens of the longest row; of packed rows and of whole texts all tokens are target."""
    padded: bool = False
    """True if a source is shorter than the longest."""
    target_tokens: int = 0
    """Target tokens of all rows that are predicted, padding apart."""
    packed: bool = False
    """True if several texts are packed in a row."""


@dataclass(frozen=True)
class StepSettings:
    """Settings of a recipe that decide the memory of a step and may be changed to fit a machine."""

    dtype: str
    """Dtype of weights and products: float32 or bfloat16."""
    device: str
    """Kind of device: cpu, cuda or mps."""
    checkpointing: bool = False
    accumulate: int = 1
    quantize: str | None = None


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step. Bytes are of tensors alone, without the process around them."""

    flops: int
    """FLOPs of matrix products."""
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Held for the backward pass when the forward pass has ended."""
    logits: int
    """The widest piece of them at one time."""
    peak: int
    """The most at one time; not the sum of the others, which are not all there together."""


@dataclass(frozen=True)
class ModelFacts:
    """Counts and sizes of a model and of its trained part, for any batch."""

    trainable: int
    total: int
    """Parameters of base and updates together."""
    base_parameters: int
    matrices: Sequence[tuple[int, int]]
    """Shapes [out, in] of the linear modules that a quantised base packs."""
    saved: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors in the adapter's file, by name without PEFT's prefix; none where all weights are trained."""
    causal: bool
    """Source and target are one sequence to it."""
    positions: int | None
    """Tokens of the longest row of a classifier with learnt positions; None where there is no bound."""


class CannotTrace(Exception):
    """A class of model whose step does not run without numbers; its text is the reason."""


class TracedModel(Protocol):
    """A model without numbers, made ready for a recipe's method."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def trains_head_alone(self) -> bool:
        """Tells whether steps run on stored states of a frozen encoder (training/feature_cache.py)."""

    def step_cost(self, settings: StepSettings, shapes: Sequence[BatchShape], first: bool = False) -> StepCost:
        """Cost of one step of these batches, whose gradients are added up.

        Args:
            first: of a run, before the optimizer has moments.

        Raises:
            CannotTrace: the class needs numbers.
        """

    def held_bytes(self, settings: StepSettings) -> int:
        """Bytes of weights, adapter and optimizer, below which no step's peak lies."""

    def forward_flops(self, settings: StepSettings, shape: BatchShape) -> int:
        """FLOPs of one forward pass of the whole model, from which nothing learns.

        Raises:
            CannotTrace: the class needs numbers.
        """

    def inference_peak(self, settings: StepSettings, shape: BatchShape) -> int:
        """Bytes of weights, adapter and tensors at their most while rows are answered, in batches as large as generation makes them
        (config/generation.py): each row of the shape's lengths, with the recipe's beams. Of a classifier the batch itself.

        Raises:
            CannotTrace: the class needs numbers.
        """


class Engine(TaskModel, Protocol):
    """One model, and how it is trained.

    `prompt`: how rows are written down for it. `causal`: source and target are one sequence to it, of at most `positions`
    tokens. `labels`: what it chooses from, if it is a classifier. `note`: what is to be known of an adapter on this base, if anything.
    """

    device: str
    dtype: str
    dtype_reason: str

    @property
    def trainable(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def summary(self) -> str: ...
    @property
    def note(self) -> str | None: ...

    def train_step(self, batches: Sequence[Batch], learning_rate: float) -> Step:
        """One update from all of these batches, each target token weighing the same; none where the result is not finite."""

    def profile(self) -> AbstractContextManager[StepProfile]:
        """Sees what runs inside computes and holds; it is filled in at the end."""

    def diagnose(self, batches: Sequence[Batch]) -> str:
        """Returns which module first gives numbers that are not finite, in words."""

    def save_state(self, file: Path) -> None:
        """Writes all that a later process needs to go on: what is trained, the optimizer, the random streams."""

    def load_state(self, file: Path) -> None:
        """Goes back to what `save_state` wrote."""

    def preserve_rng(self) -> AbstractContextManager[None]:
        """Whatever is measured inside leaves the random streams as they were: training goes on as if it had not been."""

    def cache_frozen_features(self, encoded: Encoded, on_done: Callable[[int], None]) -> None:
        """Computes what of these rows is the same in every epoch; `on_done` hears how many rows are done."""

    def generation_mode(self) -> AbstractContextManager[None]:
        """Prepares the weights once for all calls of `generate` inside, where they do not change."""

    def save(self, folder: Path, card: dict[str, Any]) -> Path:
        """Writes what was trained below this folder; returns where."""

    def verify_saved(self, saved: Path, batch: Batch) -> SavedModelCheck:
        """Reads back what was saved and holds it against the live model."""

    def peak_memory(self) -> int:
        """The most bytes in use so far: of the GPU, or of this process."""


def open_engine(
    recipe: Recipe, base: Path | None = None, start: Path | None = None, labels: Labels | None = None
) -> Engine:
    """A fresh model, made ready for the recipe's method.

    Args:
        base: its folder, where that is not the recipe's model.name.
        start: an adapter whose weights the training starts from.
        labels: those of the data, for a classifier; without them it has those of its base.
    """
    engine: Engine = _module(recipe.model.engine).open_engine(recipe, base, start, labels)
    return engine


def create_base(settings: ModelSettings, tokenizer: str, seed: int, folder: Path) -> None:
    """Writes a base with random weights, of the settings' sizes, with the tokenizer of a folder or hub id."""
    _module(settings.engine, "loading.random_init").create_base(settings, tokenizer, seed, folder)


def load_engine(recipe: Recipe, saved: Path, labels: Labels | None = None) -> Engine:
    """The model of a finished run: `saved` is its adapter, or its model where all of it was trained.

    `labels`: those of the data, for a classifier that was saved without any.
    """
    engine: Engine = _module(recipe.model.engine).load_engine(recipe, saved, labels)
    return engine


def merge(base: str, adapter: Path, out: Path) -> str:
    """Writes base and adapter as one plain model, in the base's own dtype, whose name it gives."""
    return str(_module("torch", "adapters.merge").merge_folder(base, adapter, out))


def generate_texts(model: Any, *arguments: Any, **settings: Any) -> list[str]:
    """Answers texts with a loaded model of PyTorch: see on_torch/generation/generate.py."""
    answers: list[str] = _module("torch", "generation.generate").generate(model, *arguments, **settings)
    return answers


def measure(recipe: Recipe, *planned: Any) -> Any:
    """Real steps of a planned shape: see on_torch/profiling/measure.py."""
    return _module(recipe.model.engine, "profiling.measure").measure(recipe, *planned)


def trace(recipe: Recipe, base: Base) -> TracedModel:
    """Builds a model without numbers, from which its counts and the cost of its steps are read.

    Raises:
        ModelError: there is no such class.
        TargetError: a rule of the recipe selects nothing, or something that cannot be trained.
    """
    traced: TracedModel = _module(recipe.model.engine, "profiling.traced_model").traced_model(recipe, base)
    return traced


def _module(engine: str, part: str = "engine") -> Any:
    return importlib.import_module(f"loralab.on_{engine}.{part}")
