"""T5 as data: its settings, the published sizes, and the oddities of its checkpoints (Raffel et al. 2020,
https://arxiv.org/abs/1910.10683).

Two generations share the architecture: v1.0 (t5-small …) with ReLU and an output head tied to the input embedding, and
v1.1 (t5-v1_1, FLAN-T5) with a gated GELU and a head of its own (Shazeer 2020, https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from loralab.errors import ModelError

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
        """Whether the feed-forward layer is v1.1's gated GELU."""
        return self.feed_forward_proj == "gated-gelu"


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
