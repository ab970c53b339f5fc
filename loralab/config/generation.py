"""Settings of generation, in a recipe and from Python alike; and what both engines share of them: the
numbers behind the draws, the end of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from loralab.config.model import Count, Flag, Settings
from loralab.errors import UserError, invalid_settings

TOKENS_PER_BATCH = 32768  # positions whose keys and values are kept at once: of the sources, and of every beam


class Decoding(Settings):
    """Settings of generation; names and meanings are Hugging Face's."""

    max_new_tokens: Count
    """The longest answer, in tokens."""
    beams: Count = 1
    """Hypotheses kept at each step; 1 is greedy."""
    length_penalty: Annotated[float, Field(ge=-100, le=100, strict=True)] = 1.0
    """A finished beam's log-probability is divided by its length to this power: above 0 favours long answers, below 0 short ones."""
    early_stopping: Literal[False, True, "never"] = False
    """When the search of a row ends: true as soon as `beams` hypotheses are finished; false when the best open one, were it to end
    now, would be no better than the worst of them; never when none could become better."""
    sample: Flag = False
    """Draw each token from the model's distribution instead of taking the likeliest."""
    temperature: Annotated[float, Field(gt=0, strict=True)] = 1.0
    """Divides the logits before a draw: below 1 sharpens the distribution, above 1 flattens it."""
    top_k: Count | None = None
    """Draw from this many likeliest tokens; null from all."""
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """Draw from the fewest likeliest tokens whose probabilities reach this sum; null from all."""
    repetition_penalty: Annotated[float, Field(gt=0, strict=True)] = 1.0
    """Above 1 makes tokens that were written already less likely: their logits are divided by it where positive, else multiplied."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts with which an answer ends, such as "\\n\\n"; it is cut before the first of them. Where none comes, it ends as ever."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 42
    """Seed of sampling. Each row has its own random numbers, made of the seed and its place, whatever else is in its batch."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)

    @model_validator(mode="after")
    def _nothing_idle(self) -> Decoding:
        """A setting that the way of writing would not look at is a mistake."""
        if self.sample and self.beams > 1:
            raise ValueError(
                f"sample is true and beams is {self.beams}, and a beam search draws nothing; "
                "set beams to 1 or sample to false"
            )
        for names, need, there in (
            (("temperature", "top_k", "top_p"), "sample: true", self.sample),
            (("length_penalty", "early_stopping"), "beams above 1", self.beams > 1),
        ):
            for name in names:
                value = getattr(self, name)
                if not there and value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is {value}, which means something only with {need}")
        return self


def decoding_of(settings: dict[str, Any]) -> Decoding:
    """Returns those of the arguments that are settings of generation.

    Raises:
        UserError: a setting is out of its bounds, or means nothing with the others.
    """
    try:
        return Decoding(**{name: value for name, value in settings.items() if name in Decoding.model_fields})
    except ValidationError as error:
        raise UserError(invalid_settings(error)) from error


def refuse_one_text(texts: object) -> None:
    """Raises UserError where a text stands in the place of a list of texts."""
    if isinstance(texts, str):
        raise UserError(f"texts is the one text {texts[:40]!r}; it must be a list of texts, if need be of one: [text].")


def uniforms(seed: int, rows: Sequence[int], steps: int) -> np.ndarray:
    """Numbers from (0, 1] behind the draws, [rows, steps]; each row's are its own, made of the seed and its place in the call."""
    return np.stack([1 - np.random.default_rng([seed, row]).random(steps) for row in rows])


def until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
