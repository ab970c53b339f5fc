"""The loss on other data before and after a training: against other people's code, by row, in tables, and after a kill."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import train_until
from folders import real_rows, write_jsonl
from peft import PeftModel
from stories import make_stories
from transformers import AutoModelForCausalLM, AutoTokenizer, T5ForConditionalGeneration

from loralab import cli
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.span_corruption import encode_documents
from loralab.data.splits import read_split
from loralab.errors import DataError, RecipeError
from loralab.evaluation import forgetting
from loralab.experiments.compare import compare
from loralab.experiments.variants import PlannedRun
from loralab.reports.summary import report
from loralab.runs.record import read_lines, read_record
from loralab.training.train import train

CHAT_PROMPT = "Chat: {dialogue}\nIn short: "
QUICK = ["training.epochs=1", "data.max_train_rows=20", "evaluation.metrics=[]", "validation.every=null"]


@pytest.fixture(scope="module")
def elsewhere(workshop: Path, data_folder: Path) -> dict[str, Any]:
    """Chats of SAMSum, of which one has two references, and reviews of IMDb as plain text."""
    chats = [row for row in real_rows(data_folder / "samsum", "validation") if len(row["dialogue"]) < 300][:9]
    chats.insert(4, chats[1] | {"summary": "They talk."})
    reviews = [{"review": row["text"]} for row in real_rows(data_folder / "imdb", "validation")[:4]]
    for name, split, rows in (
        ("chats", "test", chats),
        ("chats", "train", chats[:2]),
        ("reviews", "validation", reviews),
    ):
        (workshop / name).mkdir(exist_ok=True)
        write_jsonl(workshop / f"{name}/{split}.jsonl", rows)
    return {
        "chats": {
            "name": str(workshop / "chats"), "source": "dialogue", "target": "summary", "prompt": CHAT_PROMPT,
            "max_source_length": 256, "max_target_length": 64,
        },
        "general": {
            "name": str(workshop / "reviews"), "source": "review", "objective": "span-corruption", "rows": 3,
            "max_source_length": 64, "max_target_length": 32,
        },
    }  # fmt: skip


def recipe(workshop: Path, elsewhere: dict[str, Any], *overrides: str) -> Recipe:
    quick = QUICK[1:] if "training.method=none" in overrides else QUICK
    return load_recipe(workshop / "tiny.yaml", [*quick, f"forgetting={json.dumps(elsewhere)}", *overrides])


@pytest.fixture(scope="module")
def trained(workshop: Path, elsewhere: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    return train(recipe(workshop, elsewhere), workshop / "forgetful")


def theirs(model: Any, ids: list[int], labels: list[int]) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)


def test_the_numbers_are_transformers_and_pefts(
    trained: tuple[Path, dict[str, Any]], workshop: Path, elsewhere: dict[str, Any]
) -> None:
    """Row by row, of the base and of the base with the adapter; and their mean over target tokens."""
    run, record = trained
    settings = recipe(workshop, elsewhere).forgetting
    tokenizer = AutoTokenizer.from_pretrained(workshop / "base")
    chats = read_lines(workshop / "chats/test.jsonl")
    documents = read_split(settings["general"], "validation")
    chunks = encode_documents(documents, tokenizer, "span-corruption", 64, 32, seed=0)
    pairs = {
        "chats": [
            (tokenizer(CHAT_PROMPT.format(dialogue=row["dialogue"].replace("\r\n", "\n"))).input_ids, tokenizer(row["summary"]).input_ids)
            for row in chats
        ],
        "general": [(chunks.source(i).tolist(), chunks.target(i).tolist()) for i in range(len(chunks))],
    }  # fmt: skip
    lines = read_lines(run / "forgetting.jsonl")
    for when in ("before", "after"):
        model: Any = T5ForConditionalGeneration.from_pretrained(workshop / "base", dtype=torch.float32).eval()
        if when == "after":
            model = PeftModel.from_pretrained(model, run / "adapter").eval()
        for name, rows in pairs.items():
            mine = [line for line in lines if line["data"] == name]
            expected = np.array([theirs(model, *row) for row in rows])
            counts = np.array([len(labels) for _, labels in rows])
            assert [line["target_tokens"] for line in mine] == counts.tolist()
            np.testing.assert_allclose([line[when] for line in mine], expected, atol=1e-5)  # six digits are stored
            mean = (expected * counts).sum() / counts.sum()
            assert record["forgetting"][name][when]["value"] == pytest.approx(mean, abs=1e-5)
    assert [line["group"] for line in lines if line["data"] == "chats"] == [1, 2, 3, 4, 2, 6, 7, 8, 9, 10]
    about = record["forgetting"]["general"]
    assert (about["split"], about["rows"], about["chunks"], about["leaked"]) == ("validation", 3, len(chunks), 0)
    assert len(chunks) > 3 and record["forgetting"]["chats"]["split"] == "test"
    for name in pairs:
        of = record["forgetting"][name]
        assert of["difference"]["value"] == pytest.approx(of["after"]["value"] - of["before"]["value"])
        assert of["difference"]["low"] < of["difference"]["value"] < of["difference"]["high"]
        assert of["before"]["value"] != of["after"]["value"]


def test_training_goes_on_as_if_nothing_had_been_measured(
    trained: tuple[Path, dict[str, Any]], workshop: Path, elsewhere: dict[str, Any]
) -> None:
    plain, record = train(recipe(workshop, {}), workshop / "unforgetful")
    for file in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (plain / file).read_bytes() == (trained[0] / file).read_bytes()
    assert record["forgetting"] == {} and not (plain / "forgetting.jsonl").exists()


def test_before_is_before_also_after_a_kill(
    workshop: Path, elsewhere: dict[str, Any], tmp_path: Path, trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The second life measures again, with an empty cache, and not the weights of the checkpoint."""
    settings = recipe(workshop, elsewhere, "training.save_every=1")
    train_until(5, settings, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/step-00000005").exists()
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    _, record = train(settings, tmp_path / "run", resume=True)
    assert record["forgetting"] == trained[1]["forgetting"]


def in_this_process(run: PlannedRun, folder: Path) -> None:
    train(run.recipe, run.folder)


def test_a_comparison_has_a_column_for_each(
    workshop: Path, elsewhere: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: dict[str, Any] = {
        "base": {"training.method": "none"}, "lora": {}, "later": {"training.start_from": "lora", "training.seed": 1},
        "full": {"training.method": "full", "optimizer.learning_rate": 1e-3, "training.seed": 1},
    }  # fmt: skip
    measured: list[str] = []
    losses = forgetting._losses

    def counted(engine: Any, name: str, encoded: Any) -> Any:
        measured.append(name)
        return losses(engine, name, encoded)

    monkeypatch.setattr(forgetting, "_losses", counted)
    monkeypatch.setattr("loralab.experiments.run_variants._run", in_this_process)
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    given = [f"variants={json.dumps(variants)}", "published={}", "training.seed=[1, 2]"]
    results = compare(recipe(workshop, elsewhere, *given), tmp_path / "out")
    rows = {row["variant"]: row["forgetting"] for row in results["rows"]}
    # the base once; then after two seeds of lora, after full, before and after the later
    assert measured.count("general") == measured.count("chats") == 1 + 2 + 1 + 2
    for name in ("general", "chats"):
        base = rows["base"][name]
        assert base["before"] == base["after"]
        assert base["difference"] == {"value": 0, "low": 0, "high": 0, "p": 1}
        assert base["before"] == rows["lora"][name]["before"] == rows["full"][name]["before"]
        records = [read_record(tmp_path / f"out/lora/seed-{seed}")["forgetting"][name] for seed in (1, 2)]
        assert rows["later"][name]["before"] == pytest.approx(records[0]["after"], abs=1e-6)  # six digits are stored
        for when in ("after", "difference"):
            mean = np.mean([record[when]["value"] for record in records])
            assert rows["lora"][name][when]["value"] == pytest.approx(mean, abs=1e-6)  # six digits are stored
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"][1]["forgetting"] == rows["lora"]
    text = report(results)
    assert max(map(len, text.splitlines()[:-3])) <= 80, "all but the paths at the end"
    after, added = (rows["full"]["chats"][when]["value"] for when in ("after", "difference"))
    for file, shown in {"table.md": "loss on chats", "table.tex": "loss on general"}.items():
        written = (tmp_path / "out" / file).read_text()
        assert shown in written and f"{after:.3f} ({added:+.3f})" in written and "(+0.000)" in written
    assert f"{after:.3f} ({added:+.3f})" in text and "loss on general: 3 rows of" in text

    changed = recipe(workshop, elsewhere, *given, "variants.full.forgetting.chats.rows=2")
    with pytest.raises(RecipeError, match=r"variants.full changes forgetting"):
        compare(changed, tmp_path / "never")


def test_a_decoder_only_model_forgets_plain_text(data_folder: Path, tmp_path: Path) -> None:
    make_stories(tmp_path / "model", data_folder)
    (tmp_path / "data").mkdir()
    things = itertools.product(("Lily", "Tom", "Max"), ("cat", "dog", "bird"), ("ball", "hat"))
    rows = [{"text": f"Once upon a time, {name} had a {animal} and a {thing}."} for name, animal, thing in things]
    write_jsonl(tmp_path / "data/train.jsonl", [{"q": f"Yes? {row['text']}", "a": "No, no, no."} for row in rows])
    write_jsonl(
        tmp_path / "data/validation.jsonl",
        [{"q": "Hello.", "a": "No."}, *({"q": r["text"], "a": "No."} for r in rows[:3])],
    )
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text/test.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({
            "model": {"name": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
            "data": {"name": str(tmp_path / "data"), "source": "q", "target": "a", "max_source_length": 64, "max_target_length": 16},
            "forgetting": {
                "stories": {"name": str(tmp_path / "text"), "source": None, "target": "text", "max_target_length": 64, "rows": 5},
            },
            "lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-2}, "training": {"batch_size": 4, "epochs": 4},
            "evaluation": {"split": "validation", "metrics": []},
        })
    )  # fmt: skip
    run, record = train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for when in ("before", "after"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        if when == "after":
            model = PeftModel.from_pretrained(model, run / "adapter").eval()
        for line, row in zip(read_lines(run / "forgetting.jsonl"), rows[:5], strict=True):
            ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
            assert line[when] == pytest.approx(theirs(model, ids, ids), abs=1e-5)  # six digits are stored
    assert record["forgetting"]["stories"]["leaked"] == 0
    assert record["forgetting"]["stories"]["difference"]["value"] != 0


def test_the_ending_says_it_in_a_line(workshop: Path, elsewhere: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    given = [*QUICK[1:], f"forgetting={json.dumps(elsewhere)}", "training.method=none"]
    for as_json, out in ((False, "said"), (True, "written")):
        cli.train(str(workshop / "tiny.yaml"), given, out=tmp_path / out, as_json=as_json)
    said, _, written = capsys.readouterr().out.strip().rpartition("\n")
    of = {name: about["before"]["value"] for name, about in json.loads(written)["forgetting"].items()}
    expected = ", ".join(f"{name} {value:.3f} -> {value:.3f} (+0.000)" for name, value in of.items())
    assert f"\nforgot: {expected}\nTry it:" in said and list(of) == ["chats", "general"]
    assert forgetting.forgetting_in_words({}) == ""


def test_rows_that_are_trained_on_are_told(workshop: Path, elsewhere: dict[str, Any], tmp_path: Path) -> None:
    own = {"own": {"name": str(workshop / "data"), "source": "dialogue", "target": "summary", "rows": 11}}
    settings = recipe(
        workshop, own, "data.name=" + str(workshop / "chats"), "evaluation.split=test", "training.method=none"
    )
    assert train(settings, tmp_path / "apart")[1]["forgetting"]["own"]["leaked"] == 0
    settings = recipe(
        workshop, {"chats": elsewhere["chats"]}, "data.name=" + str(workshop / "chats"), "evaluation.split=test"
    )
    assert train(settings, tmp_path / "leaking")[1]["forgetting"]["chats"]["leaked"] == 3, (
        "one of them has two references"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["forgetting.chats.promt=x"], "forgetting.chats.promt: unknown key. Did you mean 'prompt'?"),
        (["forgetting.chats.rows=0"], "forgetting.chats.rows: expected greater than 0; got 0"),
        (["forgetting.chats.max_test_rows=5"], "forgetting.chats: max_test_rows means nothing here; rows says how many"),
        (["forgetting.chats.max_source_length=p85"], "forgetting.chats: max_source_length and max_target_length are numbers"),
        (["forgetting.chats.target=null"], "forgetting.chats.target: missing; name the column"),
        (["forgetting.new={source: text, target: title}"], "forgetting.new.name: missing; the recipe must give it"),
        (["forgeting={}"], "forgeting: unknown key. Did you mean 'forgetting'?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_block(overrides: list[str], message: str, workshop: Path, elsewhere: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(workshop, elsewhere, *overrides)
    assert message in str(caught.value) and str(caught.value).count("\n") == 1


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("forgetting.chats.target=sumary", DataError, r"forgetting.chats: .*no column 'sumary' \(Did you mean 'summary'"),
        ("forgetting.chats.name=./nowhere", DataError, "forgetting.chats: ./nowhere: there is no such folder"),
        ("forgetting.chats.name=no-held-out", DataError, "has neither a test nor a validation split.*The splits are: train"),
        ("forgetting.chats.source=null", RecipeError, "forgetting.chats: data.source is null.*is for decoder-only models"),
        ("forgetting.chats.prompt=Sum: {chat}", RecipeError, r"forgetting.chats: The prompt has an unknown placeholder"),
        ("forgetting.general.max_source_length=8", RecipeError, r"forgetting.general: .*max_source_length 8 .* too short"),
    ],
)  # fmt: skip
def test_mistakes_leave_nothing_behind(
    override: str, error: type[Exception], message: str, workshop: Path, elsewhere: dict[str, Any], tmp_path: Path
) -> None:
    (workshop / "no-held-out").mkdir(exist_ok=True)
    write_jsonl(workshop / "no-held-out/train.jsonl", [{"dialogue": "a", "summary": "b"}])
    with pytest.raises(error, match=message):
        train(
            recipe(workshop, elsewhere, override.replace("no-held-out", str(workshop / "no-held-out"))),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
