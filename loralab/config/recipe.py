"""A recipe: everything that one training run, or one comparison of several, is made from.

Each field below is its own documentation: the JSON Schema is made
from it. Every mistake is reported at once, with the nearest names; a key that means nothing is a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from loralab.config.data import DataSettings, HeldOutSettings, MixedSettings
from loralab.config.generation import Decoding
from loralab.config.lora import LoRASpec
from loralab.config.model import Count, FolderName, ModelSettings, Settings, folder_name
from loralab.config.training import OptimizerSettings, TrainingSettings
from loralab.config.yaml_tree import shown
from loralab.errors import RecipeError, nearest
from loralab.metrics import COLUMNS, LABELS, METRICS, NUMBERS

Tree = dict[str, Any]
Figure = Annotated[float, Field(strict=True)]

PUBLISHED_COSTS = {  # figures beside scores that a recipe may quote, and their titles
    "trained_millions": "trained (M)", "gflops": "GFLOPs a step", "memory_gb": "GPU memory (GB)", "minutes": "minutes",
}  # fmt: skip


BESIDE_RESULTS = ("published", "published_epochs")  # blocks by variant, which change nothing in a run


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
    """Number of rows: the first ones of the split; null takes all that data.max_validation_rows leaves."""
    metrics: tuple[str, ...] = ()
    """Metrics of generated answers, as in evaluation.metrics; without any, the loss alone is measured."""
    metric: str = "loss"
    """The column that says which validation is the best: loss (less is better), or one of the scores, such as rouge2 (more)."""
    keep: Literal["last", "best"] = "last"
    """The weights that the run ends with: those of its last step, or those of the best validation."""
    samples: Annotated[int, Field(ge=0, le=20, strict=True)] = 0
    """With data.packing: of so many of these texts the model reads the beginning and goes on, as evaluation says; shown and kept
    in samples.jsonl."""
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
    """Settings of evaluation: the rows, generation, and metrics."""

    split: Literal["train", "validation", "test"] = "test"
    """The rows that the reported numbers come from."""
    max_new_tokens: Count = 128
    """The longest answer, in tokens."""
    shots: Annotated[int, Field(ge=0, strict=True)] = 0
    """Worked examples before each row's prompt, drawn from the training rows by the seed: as many as fit whole into
    data.max_source_length together with the row. A percentile there is that of rows without examples: give a number of
    tokens for both. Rows that are measured while training get none."""
    metrics: tuple[str, ...] = ("rouge",)
    """Metrics of the answers; [] measures the loss alone, as with data.objective."""

    _known = field_validator("metrics")(known_metrics)

    @model_validator(mode="after")
    def _examples_are_not_scored(self) -> EvaluationSettings:
        if self.shots and self.split == "train":
            raise ValueError(
                "shots are examples from the training rows, and split train scores these; set shots to 0 or another split"
            )
        return self


class Recipe(Settings):
    """One experiment."""

    name: FolderName
    """Taken from the file's name where it is not given."""
    description: str = ""
    """One line for `loralab recipes`."""
    model: ModelSettings
    data: DataSettings
    mixture: dict[str, MixedSettings] = Field({})
    """Further data to train on, by short names of yours, each with a weight; validation and evaluation are on `data` alone."""
    lora: LoRASpec = LoRASpec()
    training: TrainingSettings = TrainingSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    forgetting: dict[str, HeldOutSettings] = Field({})
    """Other data, by short names of yours: the loss on it is measured before and after the training, and shown as a column."""
    variants: dict[str, dict[str, Any]] = Field({})
    """Variants of `compare`: a name -> dotted overrides of this recipe."""
    published: dict[str, dict[str, Figure]] = Field({})
    """Figures to show beside ours: a variant -> metric -> value; also trained_millions, gflops, memory_gb and minutes."""
    published_epochs: dict[str, dict[str, tuple[Figure, ...]]] = Field({})
    """Published figures after each epoch, shown in the table of epochs: a variant -> metric -> values from the first epoch on."""
    published_source: str = ""
    """Source of the published figures, and what they were measured on."""
    next_steps: tuple[str, ...] = ()
    """Lines to print below a comparison: what to try next."""

    @field_validator("variants")
    @classmethod
    def _one_folder_each(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in variants:
            folder_name(name)
        return variants

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
        if training is not None and not isinstance(training, dict):
            return tree  # told as what it is
        return tree | {"training": (training or {}) | {"method": "full"}}

    @model_validator(mode="before")
    @classmethod
    def _metrics_of_the_task(cls, tree: Any) -> Any:
        """Masked or whole texts are scored by their loss, as there is no question that an answer could be written to; labels by
        the metric of labels."""
        data = tree.get("data") if isinstance(tree, dict) else None
        if not isinstance(data, dict) or data.get("messages"):
            return tree
        if not (data.get("label") or data.get("objective") or _is_null(data, "source")):
            return tree
        metrics: list[str] = [NUMBERS if data.get("problem_type") else LABELS] if data.get("label") else []
        evaluation = tree.get("evaluation") or {}
        return tree | {"evaluation": {"metrics": metrics} | evaluation} if isinstance(evaluation, dict) else tree

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for block in ("evaluation", "validation"):
            metrics: tuple[str, ...] = getattr(self, block).metrics
            if metrics and (what := self.data.loss_alone):
                raise ValueError(f"{block}.metrics {', '.join(metrics)}: with {what} only the loss is measured")
        if self.evaluation.shots and (what := self.data.loss_alone):
            raise ValueError(
                f"evaluation.shots {self.evaluation.shots}: with {what} no row asks for a target, so that there is nothing "
                "to give examples of; set shots to 0"
            )
        self._fits_labels()
        self._fits_packing()
        if self.model.init == "random" and self.training.method != "full":
            raise ValueError(
                f"model.init random goes with training.method full, not {self.training.method}: random weights have to learn first"
            )
        if self.model.quantize is not None and self.training.method == "full":
            raise ValueError(
                f"model.quantize {self.model.quantize} stores weights that no step can change, and training.method full trains them all; "
                "set model.quantize to null, or the method to lora"
            )
        if self.optimizer.scale_parameter and self.training.method in ("lora", "head"):
            raise ValueError(
                "optimizer.scale_parameter is for training.method full: LoRA's B begins at zero and would hardly leave it"
            )
        return self

    def _fits_packing(self) -> None:
        """Packed rows are a mixture's only in whole, and texts to go on with are those of plain texts."""
        if self.mixture and (self.data.packing or any(data.packing for data in self.mixture.values())):
            raise ValueError(
                "data.packing and mixture are both given; put the texts into one data set, or set packing to false"
            )
        if self.validation.samples and not self.data.packing:
            raise ValueError(
                f"validation.samples {self.validation.samples}: they go on with plain texts, those of data.packing; for answers to "
                "rows name validation.metrics"
            )

    def _fits_labels(self) -> None:
        """Settings of classifiers go with labels, and none of writing do."""
        classifies, training = self.data.has_head, self.training
        idle = ["training.method head"] if training.method == "head" else []
        idle += [f"training.{key}" for key in ("head", "frozen_dropout") if getattr(training, key)]
        if idle and not classifies:
            raise ValueError(f"{' and '.join(idle)}: for classifiers only; name the column of the labels as data.label")
        further: dict[str, DataSettings] = {f"forgetting.{name}": data for name, data in self.forgetting.items()}
        further |= {f"mixture.{name}": data for name, data in self.mixture.items()}
        if other := [
            name
            for name, data in further.items()
            if (data.has_head, data.problem_type) != (classifies, self.data.problem_type)
        ]:
            raise ValueError(
                f"{other[0]}: it and data have not the same task (one has a label, or numbers as labels, and the other not); "
                "the model has one head, or writes"
            )
        if not classifies:
            return
        for block, metrics in (("evaluation", self.evaluation.metrics), ("validation", self.validation.metrics)):
            measured = NUMBERS if self.data.problem_type else LABELS
            if wrong := [name for name in metrics if name != measured]:
                raise ValueError(f"{block}.metrics {', '.join(wrong)}: with data.label only {measured} is measured")
        if self.data.problem_type and training.label_smoothing:
            raise ValueError("training.label_smoothing means nothing with data.problem_type regression")
        fields = {name: field.default for name, field in Decoding.model_fields.items() if name != "max_new_tokens"}
        fields["shots"] = 0
        if writes := [name for name, default in fields.items() if getattr(self.evaluation, name) != default]:
            raise ValueError(f"evaluation.{writes[0]} means nothing with data.label: a classifier writes nothing")
        if self.model.init == "random":
            raise ValueError("model.init random makes a model that writes; with data.label name a pretrained base")

    @model_validator(mode="after")
    def _published_exist(self) -> Recipe:
        self._check_figures("published", self.published, [*COLUMNS, *PUBLISHED_COSTS])
        self._check_figures("published_epochs", self.published_epochs, list(COLUMNS))
        return self

    def _check_figures(self, block: str, published: Mapping[str, Mapping[str, Any]], known: list[str]) -> None:
        for variant, figures in published.items():
            if variant not in self.variants:
                raise ValueError(f"{block} names the variant {variant!r}. {nearest(variant, self.variants)}")
            if unknown := [name for name in figures if name not in known]:
                raise ValueError(f"{block}.{variant} has the figure {unknown[0]!r}. {nearest(unknown[0], known)}")

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
        tree = self.model_dump(mode="json", exclude={"variants", *BESIDE_RESULTS, "published_source", "next_steps"})
        return Recipe.model_validate(with_overrides(tree, self.variants[name]) | {"name": name})


def _is_null(block: Tree, key: str) -> bool:
    return key in block and block[key] is None


def set_key(tree: Tree, path: list[str], value: Any, key: str) -> str | None:
    """Sets one dotted key in place; a variant's overrides stay dotted. Returns the mistake where there is one."""
    if path[0] == "variants" and len(path) > 2:
        path = [*path[:2], ".".join(path[2:])]
    for part in path[:-1]:
        if not isinstance(tree.get(part), dict):
            if tree.get(part) is not None:
                return f"{key}: {part!r} holds the value {shown(tree[part])}, not settings"
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
    model = tree.get("model")  # anything, where a recipe has not been checked yet
    trains_all = overrides.get("training.method") == "full" and "model.quantize" not in overrides
    if trains_all and isinstance(model, dict) and "quantize" in model:
        model |= {"quantize": None, "quantize_except": []}  # a frozen base's storage, of no use to this variant
    return tree


def recipe_schema() -> Tree:
    """The JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()
