"""Rules select what their words say, and say so when they select nothing."""

from __future__ import annotations

import pytest

from loralab.adapters.target_modules import Module, check_patterns, matches, resolve, select
from loralab.errors import TargetError

NAMES = [
    *(f"encoder.block.{i}.layer.0.SelfAttention.{p}" for i in range(2) for p in "qkvo"),
    *(f"encoder.block.{i}.layer.1.DenseReluDense.{p}" for i in range(2) for p in ("wi", "wo")),
    *(
        f"decoder.block.{i}.layer.{j}.{a}.{p}"
        for i in range(2)
        for j, a in enumerate(("SelfAttention", "EncDecAttention"))
        for p in "qkvo"
    ),
    "lm_head",
]
MODULES = [
    Module("encoder", "Stack"),
    Module("encoder.block.0.layer.0.SelfAttention", "Attention"),
    Module("encoder.block.0.layer.0.layer_norm", "RMSNorm"),
    Module("shared", "Embedding", wrappable=True),
    *(Module(name, "Linear", wrappable=True, linear=True) for name in NAMES),
]


def chosen(*rules: str) -> list[str]:
    return resolve(rules, MODULES)


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("q", 6),
        ("SelfAttention.q", 4),
        ("Attention.q", 6),
        ("EncDecAttention.q", 2),
        ("encoder.block.0.layer.0.SelfAttention.q", 1),
        ("decoder.*.q", 4),
        ("block.1.*.w?", 2),
        ("[qv]", 12),
        (r"re:decoder\..*\.[qv]", 8),
        ("shared", 1),
        ("lm_head", 1),
        ("all-linear", 28),
    ],
)
def test_a_rule_selects_what_it_says(rule: str, count: int) -> None:
    assert len(chosen(rule)) == count


def test_rules_add_up_in_the_models_order() -> None:
    assert chosen("v", "q") == [name for name in NAMES if name[-2:] in (".q", ".v")]


@pytest.mark.parametrize(
    ("rule", "name", "hit"),
    [
        ("q", "attention.q_lin", False),
        ("q", "layer.seq", False),
        ("wo", "layer.two", False),
        ("attention.q", "block.SelfAttention.q", False),  # lower case: a whole component
        ("Attention.q", "block.Attention.q", True),
        ("Attention.q", "block.PREAttention.q", False),  # no CamelCase boundary
        ("Attention", "block.SelfAttention.q", False),  # must reach the end
        ("f.Attention.q", "self.SelfAttention.q", False),
        ("re:.*q", "a.q.b", False),
    ],
)
def test_components_are_matched_whole(rule: str, name: str, hit: bool) -> None:
    assert matches(rule, name) is hit


def test_an_unmatched_rule_names_the_nearest() -> None:
    with pytest.raises(
        TargetError, match=r"'Attention.w' matches no module.*'SelfAttention.q' or |'Attention.w' matches no module"
    ):
        chosen("Attention.w")
    with pytest.raises(TargetError, match=r"Did you mean 'SelfAttention\.q'"):
        chosen("SelfAttention.qq")


def test_all_unmatched_rules_are_reported_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        chosen("q", "nope", "neither")
    assert "'nope'" in str(caught.value) and "'neither'" in str(caught.value)


def test_a_rule_for_something_that_cannot_be_wrapped_says_what_it_is() -> None:
    with pytest.raises(
        TargetError, match=r"a Attention; LoRA wraps .* Name the linear modules inside: SelfAttention.q, q"
    ):
        chosen("SelfAttention")
    with pytest.raises(TargetError, match="a RMSNorm"):
        chosen("layer_norm")


def test_a_broken_regular_expression_is_reported() -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is not a regular expression"):
        chosen("re:(")


def test_patterns_must_reach_an_adapted_module() -> None:
    names = chosen("q")
    check_patterns({"decoder.*EncDecAttention.q": 4}, names, "rank_pattern")
    with pytest.raises(TargetError, match=r"rank_pattern 'SelfAttention' matches none of the 6 adapted modules"):
        check_patterns({"SelfAttention": 4}, names, "rank_pattern")


def test_select_takes_any_kind_of_module() -> None:
    assert select(["layer_norm"], [module.name for module in MODULES], "modules_to_save") == [
        "encoder.block.0.layer.0.layer_norm"
    ]
    with pytest.raises(TargetError, match="modules_to_save 'nope' matches no module"):
        select(["nope"], NAMES, "modules_to_save")
