"""The commands as Python functions: what they return is what the commands print, and a notebook can show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import write_jsonl
from workshop import loralab as command

import loralab
from loralab.config.loading import spelt
from loralab.errors import RecipeError, UserError
from loralab.runs.record import read_record

FEW = {
    "training.epochs": 1,
    "evaluation": {"max_new_tokens": 4},
    "data": {"max_train_rows": 12, "max_validation_rows": 4},
}


@pytest.fixture(scope="module")
def run(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loralab.train(workshop / "tiny.yaml", FEW, out=tmp_path_factory.mktemp("api") / "run")


def test_a_training_gives_what_its_record_holds(run: Any) -> None:
    record = read_record(run.folder)
    assert run.record == record and run.steps == record["steps"] and run.saved == run.folder / "adapter"
    found = run.metrics["rouge1"]
    assert (found.value, found.low, found.high) == tuple(
        record["metrics"]["rouge1"][key] for key in ("value", "low", "high")
    )
    assert float(found) == found.value and "rouge1" in str(run)
    shown = run._repr_html_()
    assert shown.startswith("<pre>") and "data:image/png;base64," in shown and "rouge1" in shown


def test_what_was_trained_is_evaluated_and_answers(run: Any, workshop: Path) -> None:
    again = loralab.evaluate(run.folder, ["data.max_validation_rows=4"])
    assert again.metrics["rouge1"].value == pytest.approx(run.metrics["rouge1"].value)
    text = "Tom: Lunch? Ann: At one."
    answers = loralab.generate(run.folder, [text, "Ann: No."])
    said = json.loads(command(workshop, "generate", str(run.folder), "--text", text, "--json").stdout)["answers"]
    assert len(answers) == 2 and answers[0] == said[0]
    assert loralab.generate(str(run.saved), text).answers == [said[0]], "a single text, and the adapter alone"
    model, tokenizer = loralab.load_model(str(workshop / "base"), "float32", "cpu")
    assert loralab.generate(model, tokenizer, ["a text"], max_new_tokens=3) == [
        loralab.generate(model, tokenizer, ["a text"], max_new_tokens=3)[0]
    ]


def test_a_comparison_and_its_plan(workshop: Path, tmp_path: Path) -> None:
    tree = json.loads((workshop / "tiny.yaml").read_text())
    found = loralab.compare(tree, [*spelt(FEW), "variants=[zero-shot, lora-4]"], out=tmp_path / "compared")
    assert [row.variant for row in found.rows][:2] == ["zero-shot", "lora-4"] and not found.failures
    assert found["lora-4"].metrics["rouge1"].p_vs_first is not None and found["zero-shot"].trainable == 0
    assert (
        json.loads((tmp_path / "compared/results.json").read_text())["rows"][1]["trainable"]
        == found["lora-4"].trainable
    )
    assert "data:image/png" in found._repr_html_() and "lora-4" in str(found)
    planned = loralab.plan(loralab.load_recipe(workshop / "tiny.yaml"), {"lora.rank": 2})
    assert planned.variants[1]["trainable"] == found["lora-4"].trainable // 2 and "lora-4" in str(planned)


def test_files_are_scored(tmp_path: Path) -> None:
    rows = [{"reference": "the cat sat", "prediction_a": "the cat sat", "prediction_b": "a dog"} for _ in range(3)]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    found = loralab.score(tmp_path / "answers.jsonl")
    assert found.systems["prediction_a"]["rouge1"].value == 100 and found.pairs[0]["a"] == "prediction_a"
    assert loralab.score([tmp_path / "answers.jsonl"], ["chrf"], predictions=["prediction_b"]).systems.keys() == {
        "prediction_b"
    }


@pytest.mark.parametrize(
    "overrides", [{"lora.rank": 16}, {"lora": {"rank": 16}}, ["lora.rank=16"], "lora.rank=16"], ids=str
)
def test_overrides_are_given_in_any_of_these_ways(overrides: Any, workshop: Path) -> None:
    from loralab.config.loading import recipe_of

    for recipe in (
        workshop / "tiny.yaml",
        loralab.load_recipe(workshop / "tiny.yaml"),
        json.loads((workshop / "tiny.yaml").read_text()),
    ):
        assert recipe_of(recipe, overrides).lora.rank == 16


def test_mistakes_are_the_commands_own(workshop: Path) -> None:
    with pytest.raises(RecipeError, match=r"lora\.rnak: unknown key\. Did you mean 'rank'\?"):
        loralab.train(workshop / "tiny.yaml", {"lora.rnak": 4})
    with pytest.raises(RecipeError, match="There is no recipe 'quikstart'"):
        loralab.plan("quikstart")
    with pytest.raises(UserError):
        loralab.generate(workshop / "nothing-here", ["a"])


# LoRASpec by PEFT's names


def test_pefts_names_mean_what_they_mean_there() -> None:
    ours = loralab.LoRASpec(rank=4, alpha=8, dropout=0.1, rules=("q", "v"))
    assert loralab.LoRASpec(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q", "v"]) == ours
    assert loralab.LoRASpec(target_modules="all-linear", init_lora_weights=True).rules == ("all-linear",)
    assert loralab.LoRASpec(target_modules=r"decoder.*\.q").rules == (r"re:decoder.*\.q",)
    assert loralab.LoRASpec(init_lora_weights="gaussian").init == "gaussian"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 4, "r": 8}, "rank is given twice, as PEFT's r too"),
        ({"lora_alfa": 3}, r"^LoRASpec has no 'lora_alfa'\. Did you mean 'lora_alpha'\?"),
        ({"rank": 0}, "^LoRASpec: rank: expected greater than 0; got 0"),
        ({"rank": "4"}, "^LoRASpec: rank: expected a valid integer; got '4'"),
        ({"init_lora_weights": False}, "init_lora_weights is False; expected True or one of"),
        ({"init_lora_weights": "pissa"}, "init: expected 'kaiming', 'gaussian'"),
    ],
    ids=str,
)
def test_an_unknown_name_or_value_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loralab.LoRASpec(**fields)
    assert "pydantic" not in str(caught.value) and "\n" not in str(caught.value)


# Off for a while, and off for good


@pytest.fixture
def model(workshop: Path) -> torch.nn.Module:
    return loralab.load_model(str(workshop / "base"), "float32", "cpu")[0].eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, labels=ids).logits
    return found


def attached(model: torch.nn.Module, name: str, **fields: Any) -> Any:
    adapter = loralab.attach(model, loralab.LoRASpec(rank=2, **fields), name)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return adapter


def test_disabled_gives_the_base_back_for_a_while(model: torch.nn.Module) -> None:
    plain = logits(model)
    first, second = attached(model, "first", rules=["q"]), attached(model, "second", rules=["v"], tune_vectors=True)
    with_second = logits(model)
    with second.disabled():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), with_second)
    with pytest.raises(ZeroDivisionError), second.disabled():
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), with_second)
    with first.disabled():
        assert torch.equal(logits(model), with_second), "it was not active"


def test_unload_takes_an_adapter_off(model: torch.nn.Module) -> None:
    plain, names = logits(model), list(model.state_dict())
    first, second = (
        attached(model, "first", rules=["q", "v"]),
        attached(model, "second", rules=["v"], tune_vectors=True),
    )
    second.unload()
    first.enable()
    assert not torch.equal(logits(model), plain)
    with pytest.raises(UserError, match="'second' has been taken off its model"):
        second.enable()
    assert first.unload() is model
    assert torch.equal(logits(model), plain) and list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    attached(model, "first", rules=["q"])
