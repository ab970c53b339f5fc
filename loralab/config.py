"""A recipe: everything that one training run, or one comparison of several, is made from.

YAML (1.2) with dotted overrides, `lora.rank=32`. Each field below is its own documentation: the JSON Schema is made
from it. Every mistake is reported at once, with the nearest names; a key that means nothing is a mistake.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from loralab.errors import RecipeError, nearest
from loralab.metrics import METRICS
from loralab.spec import LoRASpec

Count = Annotated[int, Field(gt=0, strict=True)]
Length = Count | Annotated[str, Field(pattern=r"^p\d\d$")]
Tree = dict[str, Any]

DEFAULT_TOKENS_PER_BATCH = 4096


class Settings(BaseModel):
    """A block of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSettings(Settings):
    """The base model and where it runs."""

    name: str
    """A folder in Hugging Face's layout, or a hub id such as google/flan-t5-base."""
    engine: Literal["torch"] = "torch"
    """The framework."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where it runs; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and products; auto times both and takes bfloat16 where it is faster. LoRA's own weights are always float32."""
    quantize: Literal["none"] = "none"
    """The base's storage."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The model's own dropout while training; null keeps the checkpoint's (0.1 for T5)."""


class DataSettings(Settings):
    """The data set, its columns, and how a row becomes tokens."""

    name: str
    """A folder with train, validation and test files (.jsonl, .jsonl.gz, .csv), or a hub id."""
    source: str
    """The column that the model reads."""
    target: str
    """The column that it learns to write; a text, or a list of equally good ones."""
    prompt: str = "{source}"
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
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    """Of the order of rows, of dropout, and of LoRA's start."""

    @model_validator(mode="after")
    def _one_size(self) -> TrainingSettings:
        if self.batch_size and self.tokens_per_batch:
            raise ValueError("batch_size and tokens_per_batch are both given; set one of them to null")
        return self

    @property
    def token_budget(self) -> int | None:
        """Padded tokens a step, or None where rows are counted."""
        return self.tokens_per_batch or (None if self.batch_size else DEFAULT_TOKENS_PER_BATCH)


class OptimizerSettings(Settings):
    """AdamW and its learning rate's course."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The highest one. LoRA takes about ten times that of full fine-tuning."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps over which the rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it falls afterwards: to zero, or not at all."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient is shortened to this length; null leaves it."""


class EvaluationSettings(Settings):
    """What the model is asked to write, and how that is scored."""

    split: Literal["train", "validation", "test"] = "test"
    """The rows that the reported numbers come from."""
    max_new_tokens: Count = 128
    """The longest answer."""
    beams: Literal[1] = 1
    """1 is greedy."""
    metrics: tuple[str, ...] = ("rouge",)
    """What the answers are scored with."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}. {nearest(name, METRICS)}")
        return metrics


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
    evaluation: EvaluationSettings = EvaluationSettings()
    variants: dict[str, dict[str, Any]] = {}
    """What `compare` runs: a name -> dotted overrides of this recipe."""
    published: dict[str, dict[str, float]] = {}
    """Figures to show beside ours: a variant -> metric -> value."""
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

    @model_validator(mode="after")
    def _published_exist(self) -> Recipe:
        for variant in self.published:
            if variant not in self.variants:
                raise ValueError(f"published names the variant {variant!r}. {nearest(variant, self.variants)}")
        return self

    def spec(self) -> LoRASpec:
        """The LoRA block with its seed settled."""
        return self.lora if self.lora.seed is not None else self.lora.model_copy(update={"seed": self.training.seed})

    def variant(self, name: str) -> Recipe:
        """The recipe of one variant."""
        tree = self.model_dump(mode="json", exclude={"variants", "published", "published_source"})
        return Recipe.model_validate(_with_variant(tree, self.variants[name]) | {"name": name})


# Reading


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a shipped name, with overrides such as "lora.rank=32" applied.

    Raises:
        RecipeError: all mistakes of the file, of the overrides and of every variant, at once.
    """
    text, name = _read(str(name_or_path))
    tree = {"name": name} | parse_tree(text, str(name_or_path))
    return recipe_from_tree(tree, overrides, str(name_or_path))


def recipe_from_tree(tree: Tree, overrides: Sequence[str], where: str) -> Recipe:
    """The recipe of settings that were read already, with overrides applied; raises RecipeError as `load_recipe` does."""
    tree = copy.deepcopy(tree)
    mistakes = [mistake for override in overrides if (mistake := _apply(tree, override))]
    mistakes += _check(tree)
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise RecipeError(f"{count} in the recipe {where}:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))
    return Recipe.model_validate(tree)


def shipped_recipes() -> dict[str, str]:
    """Name -> text of every recipe that comes with loralab."""
    folder = resources.files("loralab") / "recipes"
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included; it can be fed back."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.is_file():
        return path.read_text(encoding="utf-8"), path.stem
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path], name_or_path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RecipeError(f"There is no recipe file {name_or_path}.")
    raise RecipeError(
        f"There is no recipe {name_or_path!r}, neither a file nor a shipped one. {nearest(name_or_path, shipped)}"
    )


def parse_tree(text: str, where: str) -> Tree:
    """The settings in a YAML text, unchecked."""
    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{where} holds {type(tree).__name__}, not a mapping of settings.")
    return tree


# Overrides


def _apply(tree: Tree, override: str) -> str | None:
    """Applies one override in place; returns the mistake where there is one."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r}: an override is written key=value, such as lora.rank=32"
    try:
        value = _value(text)
    except YAMLError:
        return f"{key}: {text!r} is not a YAML value; put it in quotes"
    if key == "variants" and isinstance(value, list):
        return _choose_variants(tree, value)
    return _set(tree, key.split("."), value, key)


def _value(text: str) -> Any:
    """A YAML value; lists and mappings in brackets only, so that `data.prompt=Headline: {text}` is the text that it looks like."""
    if text.lstrip()[:1] in ("{", "[", '"', "'"):
        return YAML(typ="safe", pure=True).load(text)
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    return text if isinstance(value, (dict, list)) else value


def _choose_variants(tree: Tree, names: list[Any]) -> str | None:
    """`variants=[zero-shot, lora-8]` keeps these of the recipe's variants, in this order."""
    known = tree.get("variants") or {}
    for name in names:
        if name not in known:
            return f"variants: there is no variant {name!r}. {nearest(str(name), known)}"
    tree["variants"] = {name: known[name] for name in names}
    tree["published"] = {name: figures for name, figures in (tree.get("published") or {}).items() if name in names}
    return None


def _set(tree: Tree, path: list[str], value: Any, key: str) -> str | None:
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


def _with_variant(tree: Tree, overrides: Mapping[str, Any]) -> Tree:
    tree = copy.deepcopy(tree)
    for key, value in overrides.items():
        _set(tree, key.split("."), value, key)
    return tree


# Checking


def _check(tree: Tree) -> list[str]:
    """Every mistake of the recipe, and those that only a variant has."""
    mistakes = _mistakes(tree)
    variants = tree.get("variants")
    if not isinstance(variants, dict):
        return mistakes
    plain = {key: value for key, value in tree.items() if key not in ("variants", "published")}
    for name, overrides in variants.items():
        if isinstance(overrides, dict):
            found = _mistakes(_with_variant(plain, overrides))
            mistakes += [f"variants.{name}: {mistake}" for mistake in found if mistake not in mistakes]
    return mistakes


def _mistakes(tree: Tree) -> list[str]:
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        found: dict[str, None] = {}
        for mistake in error.errors():
            found[_explain(mistake["type"], mistake["loc"], mistake["msg"], mistake["input"])] = None
        return list(found)
    return []


def _explain(kind: str, location: Iterable[int | str], message: str, got: Any) -> str:
    # Pydantic adds the name of each branch of a union to the location; only keys of the recipe mean something to the user.
    path = [str(part) for part in location]
    key = ".".join(_real(path))
    if kind == "extra_forbidden":
        return f"{key}: unknown key. {nearest(path[-1], _keys(path[:-1]))}"
    if kind == "missing":
        return f"{key}: missing; the recipe must give it"
    text = message.removeprefix("Value error, ")
    if kind == "value_error" and isinstance(got, dict):
        return f"{key}: {text}" if key else text
    return f"{key}: {_sentence(kind, text)}; got {got!r}"


def _sentence(kind: str, message: str) -> str:
    return message.replace("Input should be", "expected").replace(
        "String should match pattern '^p\\d\\d$'", "expected a percentile such as p85"
    )


def _real(path: list[str]) -> list[str]:
    """The leading parts of a location that are keys of the recipe."""
    model: Any = Recipe
    kept: list[str] = []
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        elif kept and (model is None or kept[-1] not in ("variants", "published")) and not isinstance(model, type):
            break
        kept.append(part)
    return kept


def _keys(path: list[str]) -> list[str]:
    """The keys that a block of the recipe has."""
    model: Any = Recipe
    for part in path:
        model = model.model_fields[part].annotation
        model = next((m for m in (model, *get_args(model)) if isinstance(m, type) and issubclass(m, BaseModel)), Recipe)
    return list(model.model_fields)


def recipe_schema() -> Tree:
    """The JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()
