"""Facts about an architecture, as data and functions that need no framework.

Each file beside this one describes one: `ARCHITECTURE` at its end. How an engine builds and runs it stands in that engine's folder
(on_torch/models/registry.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loralab.config.model import ModelSizes


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's special tokens; None where it has none of a kind."""

    start: int | None
    end: int | None
    pad: int | None
    tokenizer: str = ""
    """Name of the tokenizer, for messages."""


@dataclass(frozen=True)
class Architecture:
    """Data of one architecture.

    Attributes:
        model_type: Hugging Face's name of it.
        default_rules: where LoRA goes when a recipe names no rules.
        sizes: published name, without its owner -> settings.
        head: modules of a sequence classifier's head; in other families it is all that stands beside the encoder.
    """

    model_type: str
    default_rules: tuple[str, ...]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OwnArchitecture(Architecture):
    """Data of an architecture that writes text, and whose modules are loralab's own.

    Attributes:
        accepts: says if a config.json is one of this architecture that loralab's modules compute.
        parse: a config.json -> the settings; raises ModelError where one is missing or unknown.
        as_json: the settings -> what a config.json holds.
        new: (model.name, model.sizes, tokens of the vocabulary, special tokens) -> the settings of a model with random weights; raises
            RecipeError for sizes that do not fit, ModelError for a tokenizer without a token that is needed.
        deviation: (name of a weight, the settings) -> standard deviation with which it begins; None for one that begins at 1, or at 0 if
            it is a bias.
        vocabulary: tokens of the published tokenizer, as a plan takes them where no tokenizer is at hand.
        has_own_head: (names of the weights in a file) -> the output matrix is one of them, whatever the config says; None where the
            config alone decides.
    """

    accepts: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], Any]
    as_json: Callable[[Any], dict[str, Any]]
    new: Callable[[str, ModelSizes | None, int, SpecialTokens], Any]
    deviation: Callable[[str, Any], float | None]
    vocabulary: int
    has_own_head: Callable[[Any], bool] | None = None

    def has_sizes_of(self, name: str) -> bool:
        """Says if a new model of this name is one of this architecture: a published name, or that of the architecture itself."""
        short = name.rpartition("/")[2]
        return short in self.sizes or short == self.model_type
