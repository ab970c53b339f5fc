"""The block of a recipe that says which model: one that is there, or a new one of given sizes (recipe.py has the others)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(gt=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


def folder_name(name: str) -> str:
    """Raises ValueError where a folder of this name would not lie right in the folder that it is made in."""
    if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise ValueError(f"{name!r} is to be the name of a folder: one without / and \\, and not '.' or '..'")
    return name


FolderName = Annotated[str, AfterValidator(folder_name)]


class Settings(BaseModel):
    """A block of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSizes(Settings):
    """The sizes of a T5 or a GPT-2 of one's own; null is what `model.name` has, or else stands below."""

    d_model: Count | None = None
    """Width of the stream."""
    d_ff: Count | None = None
    """Width of the feed-forward layers."""
    layers: Count | None = None
    """Layers of a T5's encoder, or of a GPT-2."""
    decoder_layers: Count | None = None
    """Layers of a T5's decoder; default: as many as the encoder's."""
    heads: Count | None = None
    """Heads of attention."""
    d_kv: Count | None = None
    """Width of a head of a T5; default: d_model / heads."""
    positions: Count | None = None
    """Longest text that a GPT-2 can read, in tokens."""
    feed_forward: Literal["relu", "gated-gelu"] | None = None
    """Feed-forward layer of a T5: relu (T5 1.0) or gated-gelu (T5 1.1, FLAN-T5); default: gated-gelu."""
    tie_embeddings: Flag | None = None
    """Use the embedding as the output matrix; default: true."""


class ModelSettings(Settings):
    """The base model and where it runs."""

    name: str
    """A folder in Hugging Face's layout, or a hub id such as google/flan-t5-base. With init random: t5-small, flan-t5-base, …, or t5;
    gpt2, gpt2-medium, …"""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained reads the weights that are there; random begins with new ones, for training.method full."""
    sizes: ModelSizes | None = None
    """With init random: sizes other than those of the name; all of them for the name t5."""
    tokenizer: str | None = None
    """With init random: train (a byte-level BPE on the training rows), or a folder or hub id that has one."""
    vocabulary: Count | None = None
    """With tokenizer train: how many tokens; null is 8192."""
    engine: Literal["torch"] = "torch"
    """The framework."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of weights and products; auto times both and takes bfloat16 where it is faster. LoRA's own weights are always float32."""
    quantize: Literal["int8", "nf4"] | None = None
    """Storage of the frozen base's linear maps: int8 (8 bits a weight), nf4 (4.5); null keeps them in dtype. Products are
    in dtype all the same. Not for training.method full; needs the extra loralab[quantize]."""
    quantize_except: tuple[str, ...] = ()
    """With quantize: linear modules that stay in dtype, by rules as those of lora.rules, such as [wo]. Embeddings and heads always do."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = None
    """The model's own dropout while training; null keeps the checkpoint's (0.1 for T5)."""

    @field_validator("quantize", mode="before")
    @classmethod
    def _none_is_null(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _nothing_idle(self) -> ModelSettings:
        if self.quantize_except and self.quantize is None:
            raise ValueError("quantize_except means something only with quantize: int8 or nf4")
        return self

    @model_validator(mode="after")
    def _random_or_not(self) -> ModelSettings:
        given = [key for key in ("sizes", "tokenizer", "vocabulary") if getattr(self, key) is not None]
        if self.init == "pretrained" and given:
            raise ValueError(
                f"{' and '.join(given)} mean nothing for pretrained weights; set init: random, or remove them"
            )
        if self.init == "random" and self.tokenizer is None:
            raise ValueError("init random needs a tokenizer: train, or a folder or hub id that has one")
        if self.vocabulary is not None and self.tokenizer != "train":
            raise ValueError(
                "vocabulary is the size of a tokenizer that is trained; set tokenizer: train, or remove it"
            )
        return self
