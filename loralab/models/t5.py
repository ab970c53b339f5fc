"""T5 as data: its settings, the published sizes, and the oddities of its checkpoints (Raffel et al. 2020,
https://arxiv.org/abs/1910.10683).

Two generations share the architecture: v1.0 (t5-small …) with ReLU and an output head tied to the input embedding, and
v1.1 (t5-v1_1, FLAN-T5) with a gated GELU and a head of its own (Shazeer 2020, https://arxiv.org/abs/2002.05202).

New weights are normal with mean 0 and this deviation, so that a layer's output is as large as its input; as in the
published code of T5 and in Transformers' `_init_weights`:

    shared.weight, lm_head.weight               1
    q                                           (d_model · d_kv)^-½        there is no 1/√d_kv in its attention
    k, v, relative_attention_bias               d_model^-½
    o                                           (heads · d_kv)^-½
    wi, wi_0, wi_1                              d_model^-½
    wo                                          d_ff^-½
    layer_norm.weight, final_layer_norm.weight  all 1, no draw
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from loralab.config.model import ModelSizes
from loralab.errors import ModelError, RecipeError, nearest
from loralab.models.architecture import OwnArchitecture, SpecialTokens

DEFAULT_RULES = ("q", "v")


@dataclass(frozen=True, slots=True)
class T5Config:
    """T5's settings, under Hugging Face's names."""

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        return "t5"

    @property
    def is_encoder_decoder(self) -> bool:
        """As Hugging Face's configs say it."""
        return True

    @property
    def gated(self) -> bool:
        """Tells whether the feed-forward layer is v1.1's gated GELU."""
        return self.feed_forward_proj == "gated-gelu"


CLASS = "T5ForConditionalGeneration"


def is_plain(raw: Mapping[str, Any]) -> bool:
    """Tells a config.json of a T5 that writes."""
    return raw.get("model_type") == "t5" and CLASS in (raw.get("architectures") or [CLASS])


FEED_FORWARDS = ("relu", "gated-gelu")
REQUIRED = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")


def parse_config(raw: Mapping[str, Any]) -> T5Config:
    """T5Config from a `config.json`. Where the file does not say, the decoder is as deep as the encoder, and outputs are scaled iff
    the head is tied (the rule that the published v1.0 and v1.1 checkpoints follow).

    Raises:
        ModelError: a size is missing, or the feed-forward layer is of another kind.
    """
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise ModelError(f"config.json of this T5 lacks {', '.join(missing)}.")
    known = {field.name for field in fields(T5Config)}
    settings = {key: value for key, value in raw.items() if key in known and value is not None}
    settings.setdefault("num_decoder_layers", settings["num_layers"])
    settings.setdefault("scale_decoder_outputs", settings.get("tie_word_embeddings", True) is not False)
    if settings.get("feed_forward_proj", "relu") not in FEED_FORWARDS:
        raise ModelError(
            f"feed_forward_proj {settings['feed_forward_proj']!r} is not one of {', '.join(FEED_FORWARDS)}."
        )
    return T5Config(**settings)


# Keys of old published files that hold nothing of their own.
COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED_KEYS = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def drop_copies(tensors: dict[str, Any], folder: Path, equal: Callable[[Any, Any], bool]) -> None:
    """Takes those keys out of a file's tensors, of either framework.

    Raises:
        ModelError: a copy of the embedding differs from it.
    """
    for key in UNUSED_KEYS:
        tensors.pop(key, None)
    for key in COPIES_OF_SHARED:
        copy = tensors.pop(key, None)
        if copy is not None and not equal(tensors.setdefault("shared.weight", copy), copy):
            raise ModelError(f"{folder}: {key} differs from shared.weight; in a T5 both are one embedding.")


def _v1_0(d_model: int, d_kv: int, d_ff: int, layers: int, heads: int) -> T5Config:
    return T5Config(d_model, d_kv, d_ff, layers, layers, heads)


def _v1_1(d_model: int, d_ff: int, layers: int, heads: int) -> T5Config:
    return T5Config(
        d_model,
        64,
        d_ff,
        layers,
        layers,
        heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        scale_decoder_outputs=False,
    )


SIZES: dict[str, T5Config] = {
    "t5-small": _v1_0(512, 64, 2048, 6, 8),
    "t5-base": _v1_0(768, 64, 3072, 12, 12),
    "t5-large": _v1_0(1024, 64, 4096, 24, 16),
    "t5-3b": _v1_0(1024, 128, 16384, 24, 32),
    "t5-11b": _v1_0(1024, 128, 65536, 24, 128),
    "flan-t5-small": _v1_1(512, 1024, 8, 6),
    "flan-t5-base": _v1_1(768, 2048, 12, 12),
    "flan-t5-large": _v1_1(1024, 2816, 24, 16),
    "flan-t5-xl": _v1_1(2048, 5120, 24, 32),
    "flan-t5-xxl": _v1_1(4096, 10240, 24, 64),
}


# A T5 of one's own.

OF_ONES_OWN = "t5"  # the name without sizes
TO_GIVE = ("d_model", "d_ff", "layers", "heads")


def new_config(name: str, sizes: ModelSizes | None, vocab_size: int, pad_id: int, eos_id: int) -> T5Config:
    """The settings of a new model: those of the published name with the sizes that are given instead, or of these alone for "t5".

    The decoder starts from the padding token, as in every published T5.

    Raises:
        RecipeError: the name is unknown, a size is missing, or the heads do not divide d_model.
    """
    known = {key: value for key, value in (sizes.model_dump() if sizes else {}).items() if value is not None}
    if "positions" in known:
        raise RecipeError(
            "model.sizes.positions is for GPT-2: a T5 has no bound on the length of its texts. Remove it."
        )
    tokens: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "decoder_start_token_id": pad_id,
    }
    if name == OF_ONES_OWN:
        return replace(_of_sizes(known), **tokens)
    short = name.rpartition("/")[2]
    if short not in SIZES:
        raise RecipeError(
            f"model.name {name!r} has no sizes to begin with at random. {nearest(short, [*SIZES, OF_ONES_OWN])} "
            f"({OF_ONES_OWN!r} takes them from model.sizes.)"
        )
    if "layers" in known:
        known.setdefault("decoder_layers", known["layers"])
    return replace(
        SIZES[short], **{HUGGING_FACE.get(key, key): value for key, value in _consistent(known).items()}, **tokens
    )


HUGGING_FACE = {
    "layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "heads": "num_heads",
    "feed_forward": "feed_forward_proj",
    "tie_embeddings": "tie_word_embeddings",
}


def _of_sizes(known: dict[str, Any]) -> T5Config:
    if missing := [key for key in TO_GIVE if key not in known]:
        raise RecipeError(
            f"model.name {OF_ONES_OWN!r} with init random lacks {', '.join('model.sizes.' + key for key in missing)}. "
            f"Give them, or take a published name: {', '.join(SIZES)}."
        )
    if "d_kv" not in known and known["d_model"] % known["heads"]:
        raise RecipeError(
            f"model.sizes.heads {known['heads']} does not divide model.sizes.d_model {known['d_model']}. "
            "Take another number, or give the width of a head, model.sizes.d_kv."
        )
    known = {
        "d_kv": known["d_model"] // known["heads"],
        "decoder_layers": known["layers"],
        "feed_forward": "gated-gelu",
        **known,
    }
    return T5Config(**{HUGGING_FACE.get(key, key): value for key, value in _consistent(known).items()})


def _consistent(known: dict[str, Any]) -> dict[str, Any]:
    """Outputs are scaled iff the head is tied, the rule that the published checkpoints follow."""
    return {**known, "scale_decoder_outputs": known["tie_embeddings"]} if "tie_embeddings" in known else known


def deviation(name: str, config: T5Config) -> float | None:
    """The standard deviation with which a weight of this name begins; None for a norm's, which is 1."""
    part = name.split(".")[-2]
    if part.endswith("layer_norm"):
        return None
    inner, d_model = config.num_heads * config.d_kv, config.d_model
    spreads: dict[str, float] = {
        "shared": 1.0,
        "lm_head": 1.0,
        "q": (d_model * config.d_kv) ** -0.5,
        "o": inner**-0.5,
        "wo": config.d_ff**-0.5,
    }
    return spreads.get(part, float(d_model**-0.5))


def config_json(config: T5Config) -> dict[str, Any]:
    """The settings as Hugging Face's config.json has them."""
    return {
        "architectures": [CLASS],
        "model_type": config.model_type,
        "is_encoder_decoder": True,
        **asdict(config),
    }


def _new(name: str, sizes: ModelSizes | None, vocabulary: int, tokens: SpecialTokens) -> T5Config:
    if tokens.pad is None or tokens.end is None:
        raise ModelError(
            f"model.tokenizer {tokens.tokenizer}: it has no padding token or no end token, and a T5 needs both."
        )
    return new_config(name, sizes, vocabulary, tokens.pad, tokens.end)


ARCHITECTURE = OwnArchitecture(
    model_type="t5",
    default_rules=DEFAULT_RULES,
    sizes=SIZES,
    accepts=is_plain,
    parse=parse_config,
    as_json=config_json,
    new=_new,
    deviation=deviation,
    vocabulary=32128,
    has_own_head=lambda names: "lm_head.weight" in names,
)
