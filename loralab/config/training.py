"""The `training` and `optimizer` blocks of a recipe: what is trained, how long, and by which steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from loralab.config.model import Count, Flag, Settings
from loralab.errors import RecipeError

Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
TrackerName = Literal["tensorboard", "wandb"]

DEFAULT_TOKENS_PER_BATCH = 4096


class TrainingSettings(Settings):
    """Settings of training: the method, its length, the batch."""

    method: Literal["lora", "head", "full", "none"] = "lora"
    """lora, head (of a classifier, alone), full (every weight), or none (the base as it is: zero-shot)."""
    head: Literal["trained", "frozen"] | None = None
    """A classifier's head under lora: null trains one that is freshly initialised, and freezes one that the base brings."""
    frozen_dropout: Flag = False
    """With method head: dropout in the frozen part too, which then must be run in every step; without, once for all epochs."""
    epochs: Count = 1
    """Passes over the training rows; with a mixture, over those of the main data."""
    max_steps: Count | None = None
    """Optimizer steps, in the place of epochs: rows are passed as often as that takes. The learning rate's schedule ends with them."""
    max_minutes: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Minutes of steps and validations after which the training stops, saves and evaluates as at its end; the learning rate's
    schedule is that of all steps. `loralab train RUN --resume training.max_minutes=60` goes on."""
    batch_size: Count | None = None
    """Rows a step."""
    tokens_per_batch: Count | None = None
    """Or padded tokens a step, source and target together: long rows come in small batches. 4096 where neither is given."""
    accumulate: Count = 1
    """Batches a step: their gradients are added up, each target token weighing the same."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Share of the loss that goes to the whole vocabulary instead of the label. Reported losses are without it."""
    gradient_checkpointing: Flag = False
    """Keep less for the backward pass and compute it again: less memory, about a third more time."""
    save_every: Count = 200
    """Steps between two checkpoints, from which `--resume` goes on."""
    trackers: tuple[TrackerName, ...] = ()
    """Trackers for curves, besides the run's own files: tensorboard, wandb (online or offline by WANDB_MODE). Each is an extra."""
    start_from: str | None = None
    """A finished run or an adapter from whose weights the training starts; in a comparison, another variant."""
    seed: Seed | Annotated[tuple[Seed, ...], Field(min_length=1)] = 42
    """Seed of the order of rows, of dropout, and of LoRA's initialisation. A comparison takes a list too, and trains once for each."""

    @field_validator("seed")
    @classmethod
    def _each_once(cls, seed: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """Two runs of one seed are one run, which would count twice."""
        if isinstance(seed, tuple) and len(set(seed)) < len(seed):
            raise ValueError("one seed stands there twice; name each once")
        return seed

    @model_validator(mode="after")
    def _one_size(self) -> TrainingSettings:
        if self.batch_size and self.tokens_per_batch:
            raise ValueError("batch_size and tokens_per_batch are both given; set one of them to null")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """All of them, for a comparison."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    @property
    def one_seed(self) -> int:
        """The seed of a single training.

        Raises:
            RecipeError: there are several.
        """
        if isinstance(self.seed, tuple):
            raise RecipeError(
                f"training.seed is the list {list(self.seed)}. A training has one; `loralab compare` runs one for each."
            )
        return self.seed

    @property
    def token_budget(self) -> int | None:
        """Padded tokens a step, or None where rows are counted."""
        return self.tokens_per_batch or (None if self.batch_size else DEFAULT_TOKENS_PER_BATCH)


class OptimizerSettings(Settings):
    """AdamW and its learning rate's course."""

    learning_rate: Annotated[float, Field(gt=0, strict=True)] | Literal["pilot"] = 1e-3
    """The highest one; LoRA takes about ten times that of full fine-tuning. Or pilot: the best of five, found by short trainings."""
    scale_parameter: Flag = False
    """Each tensor's rate is also multiplied by the root mean square of its weights, as in T5's own training: for random weights."""
    weight_decay: Annotated[float, Field(ge=0, strict=True)] = 0.0
    """Decoupled; of matrices, not of biases, norms and embeddings (an output head that is the embedding is one)."""
    lora_plus_ratio: Annotated[float, Field(gt=0, strict=True)] = 1.0
    """Factor on the learning rate of LoRA's B (LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Share of the steps over which the rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Or their number."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Schedule after the warm-up: linear or cosine to zero, or constant."""
    max_grad_norm: Annotated[float, Field(gt=0, strict=True)] | None = 1.0
    """The gradient is shortened to this length; null leaves it."""

    @property
    def peak(self) -> float:
        """The learning rate as a number, once a pilot has settled it."""
        assert isinstance(self.learning_rate, float), "the pilot has not run"
        return self.learning_rate

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimizerSettings:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps are both given; set one of them to 0")
        return self
