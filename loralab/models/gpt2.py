"""GPT-2 as data: its settings, the published sizes, the names of its weights in other people's files, and how large
they begin (Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).

New weights are normal with mean 0 and this deviation:

    wte, wpe                                0.02                   OpenAI's code draws wpe with 0.01; most others do not
    attn.c_attn, mlp.c_fc                   0.02
    attn.c_proj, mlp.c_proj                 0.02 / √(2 · n_layer)  2 · n_layer of them are added to the stream
    lm_head, where it is not wte            0.02
    ln_1, ln_2, ln_f                        all 1, no draw
    every bias                              all 0, no draw
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from loralab.config.model import ModelSizes
from loralab.errors import ModelError, RecipeError, nearest
from loralab.models.architecture import OwnArchitecture, SpecialTokens

DEFAULT_RULES = ("c_attn",)


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """GPT-2's settings, under Hugging Face's names."""

    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int = 1024
    vocab_size: int = 50257
    n_inner: int | None = None
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    pad_token_id: int | None = None

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the architecture."""
        return "gpt2"

    @property
    def is_encoder_decoder(self) -> bool:
        """As Hugging Face's configs say it."""
        return False

    @property
    def max_position_embeddings(self) -> int:
        """Counts how many tokens it can tell apart by their place, as most configs call it."""
        return self.n_positions

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return self.n_inner or 4 * self.n_embd


REQUIRED = ("n_embd", "n_layer", "n_head")
# What a config.json may ask for beyond GPT-2: such a model is left to Transformers.
PLAIN: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
CLASS = "GPT2LMHeadModel"


def is_plain(raw: Mapping[str, Any]) -> bool:
    """Tells whether a `config.json` is that of a GPT-2 that writes, with nothing added to it."""
    names = raw.get("architectures") or [CLASS]
    if raw.get("model_type") != "gpt2" or names[0] != CLASS:
        return False
    return all(raw.get(key, allowed[0]) in allowed for key, allowed in PLAIN.items())


def parse_config(raw: Mapping[str, Any]) -> GPT2Config:
    """GPT2Config from a `config.json`.

    Raises:
        ModelError: a size is missing, or the heads do not divide the width.
    """
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise ModelError(f"config.json of this GPT-2 lacks {', '.join(missing)}.")
    known = {field.name for field in fields(GPT2Config)}
    settings = {key: value for key, value in raw.items() if key in known and value is not None}
    if isinstance(settings.get("eos_token_id"), list):
        settings["eos_token_id"] = settings["eos_token_id"][0]
    config = GPT2Config(**settings)
    if config.n_embd % config.n_head:
        raise ModelError(f"config.json: n_head {config.n_head} does not divide n_embd {config.n_embd}.")
    return config


def config_json(config: GPT2Config) -> dict[str, Any]:
    """The settings as Hugging Face's config.json has them."""
    return {
        "architectures": [CLASS],
        "model_type": config.model_type,
        "activation_function": "gelu_new",
        **asdict(config),
    }


SIZES: dict[str, GPT2Config] = {
    "gpt2": GPT2Config(768, 12, 12),
    "gpt2-medium": GPT2Config(1024, 24, 16),
    "gpt2-large": GPT2Config(1280, 36, 20),
    "gpt2-xl": GPT2Config(1600, 48, 25),
}


# A GPT-2 of one's own.

HUGGING_FACE = {
    "d_model": "n_embd",
    "d_ff": "n_inner",
    "layers": "n_layer",
    "heads": "n_head",
    "positions": "n_positions",
}


def new_config(
    name: str, sizes: ModelSizes | None, vocab_size: int, start_id: int, end_id: int, pad_id: int | None
) -> GPT2Config:
    """The settings of a new model: those of the published name, with the sizes that are given instead.

    Raises:
        RecipeError: the name is unknown, a size is a T5's, or the heads do not divide the width.
    """
    short = name.rpartition("/")[2]
    if short not in SIZES:
        raise RecipeError(f"model.name {name!r} has no sizes to begin with at random. {nearest(short, SIZES)}")
    known = {key: value for key, value in (sizes.model_dump() if sizes else {}).items() if value is not None}
    if foreign := [key for key in known if key not in HUGGING_FACE]:
        raise RecipeError(
            f"model.sizes.{foreign[0]} is for T5 and means nothing for a GPT-2, whose sizes are {', '.join(HUGGING_FACE)}. Remove it."
        )
    config = replace(
        SIZES[short], **{HUGGING_FACE[key]: value for key, value in known.items()},
        vocab_size=vocab_size, bos_token_id=start_id, eos_token_id=end_id, pad_token_id=pad_id,
    )  # fmt: skip
    if config.n_embd % config.n_head:
        raise RecipeError(
            f"model.sizes.heads {config.n_head} does not divide model.sizes.d_model {config.n_embd}. Take another number."
        )
    return config


def deviation(name: str, config: GPT2Config) -> float | None:
    """The standard deviation with which a matrix of this name begins; None for a norm's weight and every bias."""
    if name.endswith(".bias") or name.split(".")[-2].startswith("ln_"):
        return None
    return 0.02 * (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 0.02


# Names. Ours are Hugging Face's GPT2LMHeadModel's.

PREFIX = "transformer."
HEAD, TIED_TO = "lm_head.weight", "transformer.wte.weight"
# Matrices that every published file has as [in, out], as its class Conv1D takes them; ours are [out, in].
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# In old files: the triangle of the causal mask, and what it hides with.
UNUSED = (".attn.bias", ".attn.masked_bias")

OPENAI = {
    "model/wte": "transformer.wte.weight",
    "model/wpe": "transformer.wpe.weight",
    "model/ln_f/g": "transformer.ln_f.weight",
    "model/ln_f/b": "transformer.ln_f.bias",
}
OPENAI_LAYER = {
    "ln_1/g": "ln_1.weight",
    "ln_1/b": "ln_1.bias",
    "attn/c_attn/w": "attn.c_attn.weight",
    "attn/c_attn/b": "attn.c_attn.bias",
    "attn/c_proj/w": "attn.c_proj.weight",
    "attn/c_proj/b": "attn.c_proj.bias",
    "ln_2/g": "ln_2.weight",
    "ln_2/b": "ln_2.bias",
    "mlp/c_fc/w": "mlp.c_fc.weight",
    "mlp/c_fc/b": "mlp.c_fc.bias",
    "mlp/c_proj/w": "mlp.c_proj.weight",
    "mlp/c_proj/b": "mlp.c_proj.bias",
}


def names(config: GPT2Config) -> dict[str, str]:
    """Every name under which a weight may stand in a file -> ours: OpenAI's, and Hugging Face's with and without the prefix."""
    openai = OPENAI | {
        f"model/h{layer}/{theirs}": f"{PREFIX}h.{layer}.{ours}"
        for layer in range(config.n_layer)
        for theirs, ours in OPENAI_LAYER.items()
    }
    ours = list(openai.values())
    return openai | {name: name for name in ours} | {name.removeprefix(PREFIX): name for name in ours} | {HEAD: HEAD}


def _new(name: str, sizes: ModelSizes | None, vocabulary: int, tokens: SpecialTokens) -> GPT2Config:
    if tokens.end is None:
        raise ModelError(f"model.tokenizer {tokens.tokenizer}: it has no end token, and a GPT-2 needs one.")
    start = tokens.end if tokens.start is None else tokens.start
    return new_config(name, sizes, vocabulary, start, tokens.end, tokens.pad)


ARCHITECTURE = OwnArchitecture(
    model_type="gpt2",
    default_rules=DEFAULT_RULES,
    sizes=SIZES,
    accepts=is_plain,
    parse=parse_config,
    as_json=config_json,
    new=_new,
    deviation=deviation,
    vocabulary=50257,
)
