"""Settings by the names of other tools, without their block, or written otherwise: each is one error that says what to type."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from workshop import loralab

from loralab.config.loading import load_recipe
from loralab.config.mistakes import annotation_of
from loralab.config.other_names import OTHER_NAMES
from loralab.config.overrides import apply_override
from loralab.errors import RecipeError


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-3", "optimizer.learning_rate"),
        ("learning_rate=1e-3", "optimizer.learning_rate"),
        ("optimizer.lr=1e-3", "optimizer.learning_rate"),
        ("epochs=3", "training.epochs"),
        ("batch_size=8", "training.batch_size"),
        ("lora.r=8", "lora.rank"),
        ("lora_alpha=16", "lora.alpha"),
        ("target_modules=[q,v]", "lora.rules"),
        ("load_in_8bit=true", "model.quantize=int8"),
        ("training.learning_rate=1e-3", "optimizer.learning_rate"),
    ],
)
def test_another_name_is_answered_with_ours(override: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key\. Did you mean '{meant}'\?"):
        load_recipe("t5-small-xsum", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rules=q_proj,v_proj", r"lora\.rules: a list is written in brackets: lora\.rules=\[q_proj,v_proj\]"),
        ("evaluation.metrics=rouge,bleu", r"evaluation\.metrics=\[rouge,bleu\]"),
        ("lora.rank = 4", r"blanks stand around the =; write lora\.rank=4"),
        ("lora.rnak=4", r"Did you mean 'rank'\?"),
    ],
)
def test_another_spelling_is_answered_with_the_right_one(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("t5-small-xsum", [override])


def test_texts_keep_their_commas() -> None:
    assert (
        load_recipe("t5-small-xsum", ["data.prompt=First, read: {document}"]).data.prompt == "First, read: {document}"
    )


@pytest.mark.parametrize("ours", sorted(set(OTHER_NAMES.values())))
def test_what_is_suggested_is_a_setting(ours: str) -> None:
    key, _, value = ours.partition("=")
    assert annotation_of(key.split(".")) is not None
    assert not value or apply_override({}, ours) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("train", "quickstart", "--epochs", "3"),
            "Did you mean training.epochs=VALUE? Settings are given as KEY=VALUE",
        ),
        (("train", "quickstart", "--lr", "1e-3"), "Did you mean optimizer.learning_rate=VALUE?"),
        (("compare", "quickstart", "--output_dir", "x"), "Did you mean --out?"),
        (("serve",), "No such command 'serve'"),
    ],
)
def test_another_tools_option_is_answered_with_the_setting(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in loralab(tmp_path, *words, code=2).stderr


def test_the_version_and_short_help(tmp_path: Path) -> None:
    from loralab import __version__

    assert loralab(tmp_path, "--version").stdout == f"loralab {__version__}\n"
    assert "compare" in loralab(tmp_path, "-h").stdout and "--resume" in loralab(tmp_path, "train", "-h").stdout


def test_an_adapter_made_elsewhere_is_told_what_to_type(workshop: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tiny import theirs

    peft = get_peft_model(theirs(workshop / "base"), LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    peft.save_pretrained(tmp_path / "adapter")
    told = loralab(tmp_path, "evaluate", "adapter", code=2).stderr
    assert "loralab evaluate adapter data.name=FOLDER data.source=COLUMN data.target=COLUMN" in told
    (tmp_path / "empty").mkdir()
    assert f"below {os.path.realpath(tmp_path / 'empty')}." in loralab(tmp_path / "empty", "runs", ".").stdout
