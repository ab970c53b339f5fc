"""The `data` block of a recipe: which rows, which columns, and how a row becomes tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from loralab.config.model import Count, Flag, Settings

Length = Count | Annotated[str, Field(pattern=r"^p\d\d$")]

TaskName = Literal["seq2seq", "chat", "language_modeling", "denoising", "classification", "regression"]

NO_PROMPT = "{source}"
TARGET_LENGTH = 128


def _source_or_messages(schema: dict[str, Any]) -> None:
    """The JSON Schema's way to say that a chat has messages in the place of a source."""
    schema["required"].remove("source")
    schema["anyOf"] = [{"required": ["source"]}, {"required": ["messages"]}]


class ExpectedData(Settings):
    """Facts about a data set, for plans on a machine without it."""

    train_rows: Count | None = None
    """Training rows."""
    source_length: Count | None = None
    """Value of a percentile given as max_source_length, in tokens."""
    target_length: Count | None = None
    """Value of a percentile given as max_target_length, in tokens."""


class DataSettings(Settings):
    """The data set, its columns, and how a row becomes tokens."""

    model_config = ConfigDict(json_schema_extra=_source_or_messages)

    name: str
    """A folder with train, validation and test files (.jsonl, .json, .csv, .tsv, each also .gz, .parquet), one such file, what the
    library datasets has written (`save_to_disk`, a hub's repository), a hub id, or embedded:docstrings, embedded:code,
    embedded:documentation."""
    source: str | None
    """The column that the model reads; null teaches a decoder-only model whole texts, those of the target."""
    messages: str | None = None
    """Instead of both, the column of a chat: a list of {role, content}, of which the last, the assistant's, is learnt."""
    objective: Literal["span-corruption", "gap-lines", "mixed"] | None = None
    """Objective for learning from plain documents: the model generates masked spans (T5), masked lines (as PEGASUS), or both in turn."""
    packing: Flag = False
    """With source null: texts stand side by side in rows of max_target_length tokens, and none sees another; a text that is longer
    is cut into windows. Where they are evaluated every byte of a text counts, as bits_per_byte."""
    label: str | None = None
    """Instead of a target, the column of labels for a classifier: a name, a whole number, true or false; or a list of them."""
    text_pair: str | None = None
    """With a label, a second column of text, which the model reads beside the source: a premise and its hypothesis. The tokenizer
    joins them its own way."""
    problem_type: Literal["regression"] | None = None
    """With a label, what stands in its column: regression for numbers; null for labels."""
    labels: dict[str, str] = Field({})
    """Value in that column -> name of the label, in the order of the model's outputs; {} uses the values of the training rows."""
    target: Annotated[str | None, Field(validate_default=True)] = None
    """The column that it learns to write; a text, or a list of equally good ones. None with an objective."""
    prompt: str = NO_PROMPT
    """Template around the source, with the source column's name in braces."""
    max_source_length: Length = 512
    """In tokens, prompt included; p85 is the 85th percentile of the training rows. Of longer rows the source is cut, never the prompt."""
    max_target_length: Length = TARGET_LENGTH
    """In tokens, the end of the text included; or a percentile, as above."""
    max_train_rows: Count | None = None
    """Use only the first rows of the split; null uses all."""
    max_validation_rows: Count | None = None
    """Use only the first rows of the validation split; null uses all."""
    max_test_rows: Count | None = None
    """Use only the first rows of the test split; null uses all."""
    pick_rows: Literal["first", "random"] = "first"
    """Choose the first rows, or random ones (those of the lowest hashes, always the same ones), for files that are sorted."""
    expected: ExpectedData | None = None
    """Facts for `loralab plan` where the data is not on this machine; nothing else reads them."""
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

    @model_validator(mode="before")
    @classmethod
    def _label_alone(cls, tree: Any) -> Any:
        """A label needs no other column than the source; rows without one stop the run, unless the recipe says otherwise."""
        if not isinstance(tree, dict) or tree.get("label") is None:
            return tree
        if both := [key for key in ("target", "messages", "objective") if tree.get(key) is not None]:
            raise ValueError(
                f"label and {', '.join(both)} are both given; a classifier chooses a label and writes nothing"
            )
        if tree.get("source") is None:
            raise ValueError("label needs a source: the column of the texts")
        if tree.get("max_target_length", TARGET_LENGTH) != TARGET_LENGTH:
            raise ValueError("max_target_length means nothing with label; remove it")
        named = {
            str(value).lower() if isinstance(value, bool) else str(value): str(name)
            for value, name in (tree.get("labels") or {}).items()
        }
        return {"empty_rows": "stop"} | tree | {"labels": named}

    @field_validator("target")
    @classmethod
    def _something_to_learn(cls, target: str | None, info: ValidationInfo) -> str | None:
        if target is None and not any(info.data.get(key) for key in ("objective", "messages", "label")):
            raise ValueError(
                "missing; name the column that the model learns to write, messages for a chat, label for classes, or an objective"
            )
        return target

    @model_validator(mode="after")
    def _whole_texts_are_packed(self) -> DataSettings:
        if not self.packing:
            return self
        if self.source is not None or self.target is None:
            raise ValueError(
                "packing is for plain texts: set source to null, and target to their column; rows with a source, chats and labels "
                "are batched by their length instead"
            )
        fields = type(self).model_fields
        idle = [key for key in ("max_source_length", "long_rows") if getattr(self, key) != fields[key].default]
        if idle:
            raise ValueError(
                f"{' and '.join(idle)} mean nothing with packing: rows have max_target_length tokens, and longer texts are cut "
                "into windows; remove them"
            )
        if isinstance(self.max_target_length, str):
            raise ValueError("with packing max_target_length is a number of tokens, the length of a row, no percentile")
        return self

    @model_validator(mode="after")
    def _labels_of_a_label(self) -> DataSettings:
        if self.labels and self.label is None:
            raise ValueError("labels name what stands in the column of data.label, which is not given")
        if self.labels and len(set(self.labels.values())) < 2:
            raise ValueError("labels need at least two names, or there is nothing to choose between")
        return self

    @model_validator(mode="after")
    def _of_an_encoder(self) -> DataSettings:
        """Settings that go with a label alone."""
        if self.label is None and (given := [key for key in ("text_pair", "problem_type") if getattr(self, key)]):
            raise ValueError(f"{given[0]} is for encoders with a head; name the column of the labels as data.label")
        if self.problem_type and self.labels:
            raise ValueError("labels mean nothing with problem_type regression: the column of data.label holds numbers")
        if self.text_pair and self.prompt != NO_PROMPT:
            raise ValueError(
                "prompt means nothing with text_pair: the tokenizer joins the two texts; remove one of them"
            )
        if self.text_pair and isinstance(self.max_source_length, str):
            raise ValueError(
                "with text_pair max_source_length is a number of tokens, of both texts together, no percentile"
            )
        return self

    @property
    def has_head(self) -> bool:
        """Tells whether the task is an encoder's with a head, which writes nothing."""
        return self.label is not None

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
    def row_length(self) -> int:
        """Tokens of a packed row."""
        assert self.packing and isinstance(self.max_target_length, int)
        return self.max_target_length

    @property
    def loss_alone(self) -> str | None:
        """The setting by which nothing can be asked for, so that there are no answers to score."""
        if self.objective:
            return "data.objective"
        return "data.source: null" if self.source is None and self.messages is None else None

    @property
    def task(self) -> TaskName:
        """Returns which task the settings describe; `tasks/` has an object for each."""
        if self.label is not None:
            return self.problem_type or "classification"
        if self.messages is not None:
            return "chat"
        if self.objective is not None:
            return "denoising"
        return "language_modeling" if self.source is None else "seq2seq"

    def max_rows(self, split: str) -> int | None:
        """The bound on the rows of this split."""
        bound: int | None = getattr(self, f"max_{split}_rows")
        return bound


class HeldOutSettings(DataSettings):
    """Other data, on whose held-out rows forgetting is measured; columns, prompt and lengths are its own."""

    rows: Count | None = 200
    """Number of rows: the first ones of its test split, or where it has none, of its validation split; null takes all."""

    @model_validator(mode="after")
    def _what_means_nothing(self) -> HeldOutSettings:
        _no_bounds(self, ("train", "validation", "test"), "rows says how many are measured on")
        _no_labels(self)
        if isinstance(self.max_source_length, str) or isinstance(self.max_target_length, str):
            raise ValueError("max_source_length and max_target_length are numbers of tokens here, no percentiles")
        return self

    @property
    def lengths(self) -> tuple[int, int]:
        """(source, target) in tokens."""
        assert isinstance(self.max_source_length, int) and isinstance(self.max_target_length, int)
        return self.max_source_length, self.max_target_length

    def max_rows(self, split: str) -> int | None:
        """The bound on the rows of any split."""
        return self.rows


class MixedSettings(DataSettings):
    """Further data that is trained on beside the main data; columns, prompt and lengths are its own."""

    weight: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Rows of it for one row of the main data; 0.5 is one for two. null: each of its rows once an epoch."""

    @model_validator(mode="after")
    def _what_means_nothing(self) -> MixedSettings:
        _no_bounds(self, ("validation", "test"), "validation and evaluation are on the main data")
        _no_labels(self)
        return self


def _no_bounds(data: DataSettings, splits: tuple[str, ...], why: str) -> None:
    if data.expected is not None:
        raise ValueError("expected means nothing here; a plan looks at data alone")
    for split in splits:
        if getattr(data, f"max_{split}_rows") is not None:
            raise ValueError(f"max_{split}_rows means nothing here; {why}")


def _no_labels(data: DataSettings) -> None:
    if data.labels:
        raise ValueError("labels mean nothing here; data.labels says what stands for what, also in this data")
