"""A rank that is given without its alpha changes LoRA's scale, and that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loralab.config.loading import recipe_from_tree, settings_of
from loralab.config.lora_scale import changed_scales
from loralab.config.recipe import Tree
from loralab.runs.arguments import recipe_and_folder

TREE: Tree = {
    "name": "r",
    "model": {"name": "m"},
    "data": {"name": "d", "source": "s", "target": "t"},
    "lora": {"rank": 32, "alpha": 64},
    "variants": {
        "inherits": {},
        "both": {"lora.rank": 8, "lora.alpha": 16},
        "full": {"training.method": "full", "optimizer.learning_rate": 1e-4},
    },
}
ALONE = (
    "lora.rank is 4 instead of 32, and alpha stays 64: LoRA's scale is 16 instead of 2. To keep it, add lora.alpha=8."
)


def said(tree: Tree, *overrides: str, variants: bool = True) -> list[str]:
    recipe = recipe_from_tree(tree, overrides, "r")
    return changed_scales(tree, settings_of(overrides), recipe, variants)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["lora.rank=4"], [ALONE]),
        (["lora.rank=4", "lora.alpha=8"], []),
        (["lora.rank=4", "lora.alpha=64"], []),
        (["lora.rank=32"], []),
        (["lora.dropout=0.1"], []),
        (["lora={rank: 4, rules: [q]}"], [ALONE.replace("alpha stays 64", "without an alpha").replace("16 in", "1 in")]),
        (["lora.rank=128", "lora.use_rslora=true"], [
            "lora.rank is 128 instead of 32, and alpha stays 64: LoRA's scale is 5.65685 instead of 2. To keep it, add lora.alpha=22.6274."
        ]),
        (["variants.both.lora.rank=4"], [
            "variants.both: lora.rank is 4 instead of 8, and alpha stays 16: LoRA's scale is 4 instead of 2. To keep it, add lora.alpha=8."
        ]),
        (["variants.both.lora.rank=4", "variants.both.lora.alpha=8"], []),
        (["variants.inherits.lora.rank=4"], [f"variants.inherits: {ALONE}"]),
        (["variants={new: {lora.rank: 4}}"], [f"variants.new: {ALONE}"]),
        (["variants={new: {lora: {rank: 4, alpha: 8}}}"], []),
        (["variants=[both]", "lora.rank=4"], [ALONE]),
    ],
)  # fmt: skip
def test_both_scales_are_said(overrides: list[str], expected: list[str]) -> None:
    assert said(TREE, *overrides) == expected


def test_a_variant_of_the_file_that_gives_a_rank_alone_is_named_where_variants_run() -> None:
    tree = TREE | {"variants": {"small": {"lora.rank": 4}}}
    assert said(tree) == [f"variants.small: {ALONE}"] and said(tree, variants=False) == []


def test_without_an_alpha_the_scale_is_1_at_every_rank_and_nothing_is_said() -> None:
    tree = TREE | {"lora": {"rank": 32}, "variants": {"small": {"lora.rank": 4}}}
    assert said(tree, "lora.rank=2") == []


@pytest.mark.parametrize("command", ["train", "compare", "plan"])
def test_it_is_one_line_on_stderr(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(TREE))
    recipe_and_folder(command, str(file), ["lora.rank=4"], None, None, False)
    spoken = capsys.readouterr()
    assert spoken.out == "" and spoken.err == f"{ALONE}\n"
    recipe_and_folder(command, "quickstart", ["lora.rank=4"], None, None, False)
    assert "scale is 16 instead of 2" in capsys.readouterr().err
