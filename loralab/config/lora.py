"""LoRASpec: everything that defines a LoRA adapter, apart from the model that it is attached to.

A frozen linear map W [out, in] gains a trained update of rank r (Hu et al. 2021, https://arxiv.org/abs/2106.09685):

    y = x Wᵀ + scale · dropout(x) Aᵀ Bᵀ        A [r, in], B [out, r]
    scale = alpha / r, or alpha / √r with `use_rslora` (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732), or 1 where alpha is None

The same record serves PyTorch and JAX, the recipe's `lora` block, and an adapter read from disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from loralab.config.model import Flag
from loralab.errors import TargetError, UserError, nearest

Value = TypeVar("Value")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "rules",
    "init_lora_weights": "init",
}
"""PEFT's name for a setting -> ours."""


class _Explained(type(BaseModel)):  # type: ignore[misc]
    """Metaclass that lets a call in Python take PEFT's names and gives one clear error."""

    def __call__(cls, **fields: Any) -> Any:
        try:
            return super().__call__(**_from_peft(fields))
        except ValidationError as error:
            raise UserError("; ".join(map(_in_words, error.errors()))) from None


def _from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by our names.

    Raises:
        UserError: a field is given by both names, or PEFT's value has no counterpart here.
    """
    ours: dict[str, Any] = {}
    for name, value in fields.items():
        own = PEFT_NAMES.get(name, name)
        if own in ours or (own != name and own in fields):
            raise UserError(f"LoRASpec: {own} is given twice, as PEFT's {name} too. Give one of them.")
        if name == "init_lora_weights" and not isinstance(value, str):
            if value is not True:
                raise UserError(
                    f"LoRASpec: init_lora_weights is {value!r}; expected True or one of kaiming, gaussian, normal."
                )
            value = "kaiming"
        if name == "target_modules" and isinstance(value, str) and value != "all-linear":
            value = f"re:{value}"  # a string is a regular expression in PEFT
        ours[own] = value
    return ours


def _in_words(mistake: Any) -> str:
    """Returns one mistake of a field, with what was found and what was expected."""
    name = ".".join(map(str, mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        known = [*LoRASpec.model_fields, *PEFT_NAMES]
        return f"LoRASpec has no {name!r}. {nearest(name, known)}"
    expected = mistake["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    return f"LoRASpec: {name}: {expected}; got {mistake['input']!r:.60}"


class LoRASpec(BaseModel, metaclass=_Explained):
    """Settings of a LoRA adapter: the modules, the scale, the initialisation.

    In Python PEFT's names are understood too: r, lora_alpha, lora_dropout, target_modules, init_lora_weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    rank: Annotated[int, Field(gt=0, strict=True)] = 8
    """Columns of the update: r."""
    rules: Names | None = None
    """Modules to adapt: `q`, `SelfAttention.q`, `Attention.q`, globs, `re:…`, `all-linear`; None means the family's default."""
    alpha: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Numerator of the scale; None means a scale of exactly 1."""
    dropout: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Probability with which an input element of the update is dropped while training."""
    shared_dropout: Flag = True
    """One mask for the projections that read the same input (q, k, v); false draws one each, as PEFT does."""
    tune_vectors: Flag = False
    """Also train every bias and every norm's scale."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: none, all of the model, or those of the adapted modules."""
    modules_to_save: Names = ()
    """Modules trained and saved whole, such as a task head; written as rules."""
    rank_pattern: Mapping[str, Annotated[int, Field(gt=0, strict=True)]] = {}
    """Ranks for some modules: a regular expression that reaches the end of the module's name -> rank; the first match wins."""
    alpha_pattern: Mapping[str, Annotated[float, Field(gt=0, strict=True)]] = {}
    """Alphas for some modules, in the same way."""
    use_rslora: Flag = False
    """Divide alpha by √r instead of r."""
    use_dora: Flag = False
    """Train the length of each row of W apart from its direction (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""
    init: Literal["kaiming", "gaussian", "normal", "kaiming_normal"] = "kaiming"
    """Start of A: kaiming-uniform (PEFT's default), N(0, 1/r²) (PEFT's "gaussian"), N(0, 1), or N(0, 2/in). B starts at zero."""
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] | None = None
    """Seed of that start; None means the training's seed in a recipe, and 0 elsewhere."""
    disabled: Flag = False
    """No adapter: the whole model is trained."""

    def rank_of(self, module: str) -> int:
        """The rank at the module of this name."""
        return first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The alpha at the module of this name."""
        return first_match(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """The factor on the update at the module of this name."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def pattern_matches(pattern: str, module: str) -> bool:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: a regular expression that begins at a component and reaches the end."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise TargetError(
            f"{pattern!r} in rank_pattern or alpha_pattern is not a regular expression: {error}."
        ) from error


def first_match(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that matches the module's name, or the default."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, module)), default)
