"""A recipe: everything that one training run, or one comparison of several, is made from.

Each field below is its own documentation: the JSON Schema is made
from it. Every mistake is reported at once, with the nearest names; a key that means nothing is a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from loralab.decoding import Decoding
from loralab.errors import RecipeError, nearest
from loralab.metrics import COLUMNS, METRICS
from loralab.model_settings import Count, ModelSettings, Settings
from loralab.spec import LoRASpec

Length = Count | Annotated[str, Field(pattern=r"^p\d\d$")]
Seed = Annotated[int, Field(ge=0, strict=True)]
Tree = dict[str, Any]
TrackerName = Literal["tensorboard", "wandb"]

DEFAULT_TOKENS_PER_BATCH = 4096
NO_PROMPT = "{source}"
PUBLISHED_COSTS = {  # figures beside scores that a recipe may quote, and their titles
    "trained_millions": "trained (M)", "gflops": "GFLOPs a step", "memory_gb": "GPU memory (GB)", "minutes": "minutes",
}  # fmt: skip


class DataSettings(Settings):
    """The data set, its columns, and how a row becomes tokens."""

    name: str
    """A folder with train, validation and test files (.jsonl, .csv, either .gz, .parquet), one such file, a hub id, or
    embedded:docstrings, embedded:code."""
    source: str | None
    """The column that the model reads; null teaches a decoder-only model whole texts, those of the target."""
    messages: str | None = None
    """Instead of both, the column of a chat: a list of {role, content}, of which the last, the assistant's, is learnt."""
    objective: Literal["span-corruption", "gap-lines", "mixed"] | None = None
    """How a model learns from plain documents: it writes masked spans (T5), masked lines (as PEGASUS), or both in turn."""
    target: Annotated[str | None, Field(validate_default=True)] = None
    """The column that it learns to write; a text, or a list of equally good ones. None with an objective."""
    prompt: str = NO_PROMPT
    """What surrounds the source: a template with the source column's name in braces."""
    max_source_length: Length = 512
    """In tokens, prompt included; p85 is the 85th percentile of the training rows. Of longer rows the source is cut, never the prompt."""
    max_target_length: Length = 128
    """In tokens, the end of the text included; or a percentile, as above."""
    max_train_rows: Count | None = None
    """Use only the first rows of the split; null uses all."""
    max_validation_rows: Count | None = None
    """The same for the validation split."""
    max_test_rows: Count | None = None
    """The same for the test split."""
    empty_rows: Literal["skip", "stop"] = "skip"
    """Rows whose source or target is blank or missing."""
    duplicate_rows: Literal["keep", "skip", "stop"] = "keep"
    """Rows with the source and the targets of an earlier row, white space apart."""
    long_rows: Literal["cut", "skip", "stop"] = "cut"
    """Rows beyond the lengths above. Rows to evaluate are never skipped for their length, but cut."""
    html_breaks: Literal["keep", "newline", "stop"] = "keep"
    """`<br />` in a text: stays, or becomes a line end."""

    @model_validator(mode="before")
    @classmethod
    def _messages_alone(cls, tree: Any) -> Any:
        """A chat has no other columns, and the tokenizer's template instead of a prompt."""
        if not isinstance(tree, dict) or tree.get("messages") is None:
            return tree
        both = [key for key in ("source", "target", "objective") if tree.get(key) is not None]
        both += [] if tree.get("prompt", NO_PROMPT) == NO_PROMPT else ["prompt"]
        if both:
            raise ValueError(f"messages and {', '.join(both)} are both given; messages stand alone, without the others")
        return tree | {"source": None, "target": None}

    @field_validator("target")
    @classmethod
    def _something_to_learn(cls, target: str | None, info: ValidationInfo) -> str | None:
        if target is None and info.data.get("objective") is None and info.data.get("messages") is None:
            raise ValueError(
                "missing; name the column that the model learns to write, messages for a chat, or an objective"
            )
        return target

    @model_validator(mode="after")
    def _one_task(self) -> DataSettings:
        if self.objective is None:
            return self
        if self.source is None:
            raise ValueError("source is null; with an objective it names the column of the documents")
        if self.target is not None:
            raise ValueError("target means nothing with an objective, which makes targets itself; remove one of them")
        if self.prompt != NO_PROMPT:
            raise ValueError("prompt means nothing with an objective; remove one of them")
        if self.long_rows != "cut":
            raise ValueError(
                "long_rows means nothing with an objective, which cuts documents to chunks; remove one of them"
            )
        if isinstance(self.max_source_length, str) or isinstance(self.max_target_length, str):
            raise ValueError(
                "with an objective max_source_length and max_target_length are numbers of tokens, no percentiles"
            )
        return self

    @property
    def columns(self) -> list[str]:
        """Those that rows are made of."""
        return [column for column in (self.source, self.target, self.messages) if column is not None]

    def max_rows(self, split: str) -> int | None:
        """The bound on the rows of this split."""
        bound: int | None = getattr(self, f"max_{split}_rows")
        return bound


class TrainingSettings(Settings):
    """How long, on how much at once, and what is trained."""

    method: Literal["lora", "full", "none"] = "lora"
    """lora, full (every weight), or none (the base as it is: zero-shot)."""
    epochs: Count = 1
    """Passes over the training rows."""
    batch_size: Count | None = None
    """Rows a step."""
    tokens_per_batch: Count | None = None
    """Or padded tokens a step, source and target together: long rows come in small batches. 4096 where neither is given."""
    accumulate: Count = 1
    """Batches a step: their gradients are added up, each target token weighing the same."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the loss that goes to the whole vocabulary instead of the label. Reported losses are without it."""
    gradient_checkpointing: bool = False
    """Keep less for the backward pass and compute it again: less memory, about a third more time."""
    save_every: Count = 200
    """Steps between two checkpoints, from which `--resume` goes on."""
    trackers: tuple[TrackerName, ...] = ()
    """Where curves go besides the run's own files: tensorboard, wandb (online or offline by WANDB_MODE). Each is an extra."""
    start_from: str | None = None
    """A finished run or an adapter from whose weights the training starts; in a comparison, another variant."""
    seed: Seed | Annotated[tuple[Seed, ...], Field(min_length=1)] = 42
    """Of the order of rows, of dropout, and of LoRA's start. A comparison takes a list too, and trains once for each."""

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

    learning_rate: Annotated[float, Field(gt=0)] | Literal["pilot"] = 1e-3
    """The highest one; LoRA takes about ten times that of full fine-tuning. Or pilot: the best of five, found by short trainings."""
    scale_parameter: bool = False
    """Each tensor's rate is also multiplied by the root mean square of its weights, as in T5's own training: for random weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] = 1.0
    """How many times the rate LoRA's B takes that of the rest (LoRA+, Hayou et al. 2024, https://arxiv.org/abs/2402.12354)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which the rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Or their number."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls afterwards: to zero, or not at all."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
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


def known_metrics(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError where one of the names is no metric's."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}. {nearest(name, METRICS)}")
    return metrics


class ValidationSettings(Settings):
    """Measuring while training, on the data's validation split; data without one is trained on without measuring."""

    every: Literal["epoch"] | Count | None = "epoch"
    """When: after each epoch, or every so many steps and after the last; null never."""
    rows: Count | None = 200
    """How many: the first ones of the split; null takes all that data.max_validation_rows leaves."""
    metrics: tuple[str, ...] = ()
    """What answers are generated for and scored with, as in evaluation.metrics; without any, the loss alone is measured."""
    metric: str = "loss"
    """The column that says which validation is the best: loss (less is better), or one of the scores, such as rouge2 (more)."""
    keep: Literal["last", "best"] = "last"
    """The weights that the run ends with: those of its last step, or those of the best validation."""
    patience: Count | None = None
    """Stop after so many validations in a row without a better one; null never."""

    _known = field_validator("metrics")(known_metrics)

    @property
    def columns(self) -> list[str]:
        """The names of the numbers that are measured."""
        return ["loss", *(column.name for metric in self.metrics for column in METRICS[metric].COLUMNS)]

    @property
    def chooses(self) -> str | None:
        """The setting by which these rows choose the checkpoint, if one does."""
        return "keep: best" if self.keep == "best" else f"patience: {self.patience}" if self.patience else None

    @model_validator(mode="after")
    def _measured(self) -> ValidationSettings:
        if self.metric not in self.columns:
            owner = next(
                (name for name, metric in METRICS.items() if self.metric in [column.name for column in metric.COLUMNS]),
                None,
            )
            advice = f"Add {owner} to validation.metrics." if owner else nearest(self.metric, self.columns)
            raise ValueError(f"the metric {self.metric!r} is not measured. {advice}")
        if COLUMNS[self.metric].better == "neither":
            raise ValueError(f"of {self.metric!r} neither more nor less is better, so that it cannot choose")
        if self.every is None and self.chooses:
            raise ValueError(
                f"{self.chooses} needs validations, but every is null; set it to epoch or to a number of steps"
            )
        return self


class EvaluationSettings(Decoding):
    """What the model is asked to write, how, and how that is scored."""

    split: Literal["train", "validation", "test"] = "test"
    """The rows that the reported numbers come from."""
    max_new_tokens: Count = 128
    """The longest answer, in tokens."""
    metrics: tuple[str, ...] = ("rouge",)
    """What the answers are scored with; [] measures the loss alone, as with data.objective."""

    _known = field_validator("metrics")(known_metrics)


class Recipe(Settings):
    """One experiment."""

    name: str
    """Taken from the file's name where it is not given."""
    description: str = ""
    """One line for `loralab recipes`."""
    model: ModelSettings
    data: DataSettings
    lora: LoRASpec = LoRASpec()
    training: TrainingSettings = TrainingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    variants: dict[str, dict[str, Any]] = Field({})
    """What `compare` runs: a name -> dotted overrides of this recipe."""
    published: dict[str, dict[str, float]] = Field({})
    """Figures to show beside ours: a variant -> metric -> value; also trained_millions, gflops, memory_gb and minutes."""
    published_source: str = ""
    """Where those figures come from, and what they were measured on."""

    @model_validator(mode="before")
    @classmethod
    def _disabled_is_full(cls, tree: Any) -> Any:
        """`lora.disabled: true` is another spelling of `training.method: full`."""
        lora, training = (tree.get(block) if isinstance(tree, dict) else None for block in ("lora", "training"))
        if not (isinstance(lora, dict) and lora.get("disabled") is True):
            return tree
        method = training.get("method", "full") if isinstance(training, dict) else "full"
        if method == "none":  # a zero-shot variant inherits the block and has no use for it
            return tree
        if method != "full":
            raise ValueError(
                f"lora.disabled is true, which means training.method: full; but training.method is {method!r}"
            )
        return tree | {"training": (training or {}) | {"method": "full"}}

    @model_validator(mode="before")
    @classmethod
    def _objective_has_no_metrics(cls, tree: Any) -> Any:
        """Masked text is scored by its loss; nothing is written out."""
        data = tree.get("data") if isinstance(tree, dict) else None
        if not (isinstance(data, dict) and data.get("objective")):
            return tree
        evaluation = tree.get("evaluation") or {}
        return tree | {"evaluation": {"metrics": []} | evaluation} if isinstance(evaluation, dict) else tree

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for block in ("evaluation", "validation"):
            metrics: tuple[str, ...] = getattr(self, block).metrics
            if self.data.objective and metrics:
                raise ValueError(f"{block}.metrics {', '.join(metrics)}: with data.objective only the loss is measured")
        if self.model.init == "random" and self.training.method != "full":
            raise ValueError(
                f"model.init random goes with training.method full, not {self.training.method}: random weights have to learn first"
            )
        if self.optimizer.scale_parameter and self.training.method == "lora":
            raise ValueError(
                "optimizer.scale_parameter is for training.method full: LoRA's B begins at zero and would hardly leave it"
            )
        return self

    @model_validator(mode="after")
    def _published_exist(self) -> Recipe:
        for variant, figures in self.published.items():
            if variant not in self.variants:
                raise ValueError(f"published names the variant {variant!r}. {nearest(variant, self.variants)}")
            if unknown := [name for name in figures if name not in (*COLUMNS, *PUBLISHED_COSTS)]:
                raise ValueError(
                    f"published.{variant} has the figure {unknown[0]!r}. {nearest(unknown[0], [*COLUMNS, *PUBLISHED_COSTS])}"
                )
        return self

    @property
    def chooses(self) -> str | None:
        """The setting, with its block, by which rows choose something; None where none does."""
        if self.optimizer.learning_rate == "pilot":
            return "optimizer.learning_rate: pilot"
        return self.validation.chooses and f"validation.{self.validation.chooses}"

    def spec(self) -> LoRASpec:
        """The LoRA block with its seed settled."""
        return (
            self.lora if self.lora.seed is not None else self.lora.model_copy(update={"seed": self.training.one_seed})
        )

    def variant(self, name: str) -> Recipe:
        """The recipe of one variant."""
        tree = self.model_dump(mode="json", exclude={"variants", "published", "published_source"})
        return Recipe.model_validate(with_overrides(tree, self.variants[name]) | {"name": name})


def set_key(tree: Tree, path: list[str], value: Any, key: str) -> str | None:
    """Sets one dotted key in place; a variant's overrides stay dotted. Returns the mistake where there is one."""
    if path[0] == "variants" and len(path) > 2:
        path = [*path[:2], ".".join(path[2:])]
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            if tree.get(part) is not None:
                return f"{key}: {part!r} holds the value {tree[part]!r}, not settings"
            tree[part] = {}
        tree = tree[part]
    tree[path[-1]] = value
    return None


def with_overrides(tree: Tree, overrides: Mapping[str, Any]) -> Tree:
    """A copy of the settings with a variant's dotted overrides applied.

    Raises:
        RecipeError: an override reaches into something that has no settings of its own.
    """
    tree = copy.deepcopy(tree)
    if overrides.get("lora.disabled") is True:  # the variant's word for full, against the method that it inherits
        overrides = {"training.method": "full"} | dict(overrides)
    for key, value in overrides.items():
        if mistake := set_key(tree, key.split("."), value, key):
            raise RecipeError(mistake)
    return tree


def recipe_schema() -> Tree:
    """The JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()
