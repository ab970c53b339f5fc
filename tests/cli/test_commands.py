"""The commands as a user types them, on real rows and tiny models: train, evaluate, generate, merge, compare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from tiny import make_t5
from transformers import AutoTokenizer, T5ForConditionalGeneration
from workshop import PROMPT, loralab

from loralab import load_adapter, load_model
from loralab.config.loading import load_recipe
from loralab.data.rows import Finding
from loralab.data.splits import read_split
from loralab.evaluation.prediction_files import Columns
from loralab.evaluation.score_files import score_files
from loralab.evaluation.scores import read_scores
from loralab.runs.listing import list_runs
from loralab.runs.record import read_lines
from loralab.training.train import train

PROMISED = {
    "variant",
    "method",
    "trainable",
    "total",
    "adapter_bytes",
    "seconds",
    "flops",
    "peak_memory_bytes",
    "metrics",
}


@pytest.fixture(scope="module")
def run(workshop: Path) -> dict[str, Any]:
    done = loralab(workshop, "train", "tiny.yaml", "--json")
    result: dict[str, Any] = json.loads(done.stdout)
    assert "loss" in done.stderr and "in 0:0" in done.stderr, "progress goes to stderr"
    return result


@pytest.fixture(scope="module")
def comparison(workshop: Path) -> tuple[dict[str, Any], Path]:
    done = loralab(workshop, "compare", "tiny.yaml", "--json", "--out", "side-by-side")
    assert "reusing tokens of 60 rows" in done.stderr, "by the second variant at the latest"
    return json.loads(done.stdout), workshop / "side-by-side"


def test_a_run_folder_is_complete(workshop: Path, run: dict[str, Any]) -> None:
    folder = workshop / run["run"]
    assert {file.name for file in folder.iterdir()} == {
        "recipe.yaml",
        "first_step.json",
        "metrics.jsonl",
        "validation.jsonl",
        "curves.png",
        "adapter",
        "predictions.jsonl",
        "record.json",
    }
    record = json.loads((folder / "record.json").read_text())
    assert (
        record["proof"]["reloaded_equal"] is True
        and record["proof"]["merged_error"] <= record["proof"]["merged_tolerance"] == 1e-4
    )
    steps = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, run["steps"] + 1))
    assert steps[0]["learning_rate"] == 1e-2 and steps[-1]["learning_rate"] == pytest.approx(1e-2 / run["steps"])
    assert np.mean([line["loss"] for line in steps[-3:]]) < steps[0]["loss"] - 0.2
    assert record["trainable"] == sum(np.prod(t.shape) for t in _adapter_tensors(folder / "adapter"))
    assert record["trained_on"]["rows"] == 60 and record["evaluated"]["rows"] == 12 and record["versions"]["torch"]
    assert load_recipe(folder / "recipe.yaml").training.epochs == 2


def test_a_run_is_listed_with_its_first_score(workshop: Path, run: dict[str, Any]) -> None:
    (listed,) = list_runs(workshop / run["run"])
    assert (listed.metric, listed.value) == ("rouge1", run["metrics"]["rouge1"]["value"])
    assert (listed.state, listed.adapter_bytes > 0) == ("finished", True)


def _adapter_tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())


def test_scores_are_those_of_the_predictions(workshop: Path, run: dict[str, Any]) -> None:
    rows = read_lines(workshop / run["run"] / "predictions.jsonl")
    scorer = RougeScorer(["rouge1", "rougeLsum"], use_stemmer=True)
    for row in rows:
        expected = scorer.score(row["references"][0], row["prediction"])
        assert row["rouge1"] == pytest.approx(100 * expected["rouge1"].fmeasure, abs=1e-6)  # stored with six digits
    assert run["metrics"]["rouge1"]["value"] == pytest.approx(
        np.mean([row["rouge1"] for row in rows]), abs=1e-6
    )  # stored with six digits
    tokens = np.array([row["target_tokens"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    assert run["metrics"]["loss"]["value"] == pytest.approx(
        (losses * tokens).sum() / tokens.sum(), abs=1e-6
    )  # stored with six digits
    assert run["metrics"]["loss"]["low"] < run["metrics"]["loss"]["value"] < run["metrics"]["loss"]["high"]
    assert rows[0]["prediction"] == rows[10]["prediction"] and rows[0]["source"] == rows[10]["source"]


def test_the_loss_is_transformers_with_pefts_adapter(workshop: Path, run: dict[str, Any]) -> None:
    """The number in the table, computed again by other people's code from what the run left on disk."""
    base = T5ForConditionalGeneration.from_pretrained(workshop / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(
        base, run["adapter"] if Path(run["adapter"]).is_absolute() else workshop / run["adapter"]
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(workshop / run["adapter"])
    for row in read_lines(workshop / run["run"] / "predictions.jsonl"):
        prompt = PROMPT.format(dialogue=row["source"])
        ids = tokenizer(prompt).input_ids
        if len(ids) > 160:
            continue
        labels = torch.tensor([tokenizer(row["references"][0]).input_ids])
        if labels.shape[1] > 24:
            labels = torch.cat([labels[:, :23], torch.tensor([[1]])], dim=1)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
        assert row["loss"] == pytest.approx(loss.item(), abs=2e-5)  # fp32 sums in another order over ten nats
        break
    else:
        pytest.fail("no row fits into 160 tokens uncut")


def test_the_same_recipe_gives_the_same_adapter(workshop: Path, run: dict[str, Any]) -> None:
    done = loralab(workshop, "train", str(Path(run["run"]) / "recipe.yaml"), "--json")
    again = json.loads(done.stdout)
    assert "data, train: reusing tokens of 60 rows" in done.stderr
    assert again["run"] != run["run"], "the next free folder"
    files = [workshop / result["adapter"] / "adapter_model.safetensors" for result in (run, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again["metrics"] == run["metrics"]


@pytest.mark.parametrize("what", ["run", "adapter"])
def test_evaluate_gives_the_runs_own_numbers(what: str, workshop: Path, run: dict[str, Any]) -> None:
    row = json.loads(loralab(workshop, "evaluate", run[what], "--json").stdout)
    assert row["metrics"] == run["metrics"] and row["trainable"] and row["method"] == "lora" and set(row) >= PROMISED


def test_generate_answers_texts(workshop: Path, run: dict[str, Any]) -> None:
    rows = read_lines(workshop / run["run"] / "predictions.jsonl")[:2]
    texts = [argument for row in rows for argument in ("--text", row["source"])]
    answers = json.loads(loralab(workshop, "generate", run["run"], *texts, "--json").stdout)["answers"]
    assert answers == [row["prediction"] for row in rows]
    short = json.loads(loralab(workshop, "generate", run["adapter"], *texts, "--max-new-tokens", "1", "--json").stdout)[
        "answers"
    ]
    assert all(len(a) <= len(b) for a, b in zip(short, answers, strict=True)) and short != answers


def test_merge_gives_a_model_for_transformers(workshop: Path, run: dict[str, Any]) -> None:
    told = json.loads(loralab(workshop, "merge", run["run"], "--out", "merged", "--json").stdout)
    assert told == {"model": "merged", "dtype": "float32"}, "as the base is stored"
    model, tokenizer = load_model(str(workshop / "base"), dtype="float32", device="cpu")
    load_adapter(model, workshop / run["adapter"])
    merged = T5ForConditionalGeneration.from_pretrained(workshop / "merged").eval()
    ids, labels = (torch.tensor([tokenizer(text).input_ids]) for text in ("Hello there, how are you?", "Fine."))
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids, labels=labels).logits, model(input_ids=ids, labels=labels).logits
        )
    assert AutoTokenizer.from_pretrained(workshop / "merged")("Hello").input_ids == tokenizer("Hello").input_ids


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_architecture_goes_the_same_way(method: str, workshop: Path) -> None:
    settings = [
        "model.name=bart",
        *(["lora.rules=[q_proj, v_proj]"] if method == "lora" else []),
        f"training.method={method}",
        "--out",
        f"bart-{method}",
    ]
    result = json.loads(loralab(workshop, "train", "tiny.yaml", *settings, "--json").stdout)
    steps = read_lines(workshop / result["run"] / "metrics.jsonl")
    assert np.mean([line["loss"] for line in steps[-3:]]) < steps[0]["loss"] - 0.1
    row = json.loads(loralab(workshop, "evaluate", result["run"], "--json").stdout)
    assert row["metrics"] == result["metrics"]
    if method == "lora":
        loralab(workshop, "merge", result["run"], "--out", "bart-merged")
        assert (workshop / "bart-merged/config.json").exists()


def test_a_single_file_with_faults_is_trained_on_and_told_of(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_lines(workshop / "data/train.jsonl")
    faults = [{"dialogue": " ", "summary": "x"}, {"dialogue": "x"}, rows[0], {**rows[1], "dialogue": "a<br />b\r\nc"}]
    (workshop / "single.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, *faults]), encoding="utf-8"
    )
    settings = [f"data.name={workshop / 'single.jsonl'}", "data.html_breaks=newline", "training.epochs=1"]
    folder, record = train(load_recipe(workshop / "tiny.yaml", settings), workshop / "single")
    told = capsys.readouterr().err
    parts = {
        split: read_split(load_recipe(folder / "recipe.yaml").data, split) for split in ("train", "validation", "test")
    }
    assert sum(map(len, parts.values())) == 62 and min(map(len, parts.values())) > 0
    assert (record["trained_on"]["rows"], record["evaluated"]["rows"]) == (
        len(parts["train"]),
        len(parts["validation"]),
    )
    assert record["evaluated"]["leaked"] == 0
    found = [about["findings"] for about in (record["trained_on"], record["evaluated"])]
    assert (
        "parted by a hash of the source: about 90 %" in record["evaluated"]["parted"]
        and record["evaluated"]["parted"] in told
    )
    assert {key: parts["train"].findings[key].rows for key in parts["train"].findings} == {
        key: finding["rows"] for key, finding in found[0].items() if not key.startswith("long")
    }
    numbers = {
        key: sorted(row for part in parts.values() for row in part.findings.get(key, Finding()).rows) for key in WANTED
    }
    assert numbers == WANTED
    assert found[0]["long_sources"]["count"] > 0 and found[1]["long_targets"]["count"] > 0
    assert f"{found[0]['long_sources']['count']} with a source over data.max_source_length, cut (rows " in told


WANTED = {"empty": [61], "missing": [62], "repeated": [63], "crlf": [64], "html_breaks": [64]}


# compare


def test_compare_prints_a_row_for_each_variant_and_floor(comparison: tuple[dict[str, Any], Path]) -> None:
    results, out = comparison
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["zero-shot", "lora-4", "full", "first two lines", "one sentence"]
    assert [row["method"] for row in rows.values()] == ["none", "lora", "full", "floor", "floor"]
    assert all(set(row) >= PROMISED for row in rows.values())
    assert (
        rows["full"]["trainable"] == rows["full"]["total"]
        and 0 < rows["lora-4"]["trainable"] < rows["full"]["trainable"]
    )
    assert rows["lora-4"]["adapter_bytes"] == (out / "lora-4/adapter/adapter_model.safetensors").stat().st_size
    assert rows["full"]["adapter_bytes"] == (out / "full/model/model.safetensors").stat().st_size
    for name, row in rows.items():
        assert set(row["metrics"]) == {"rouge1", "rouge2", "rougeL", "rougeLsum"} | (
            set() if row["method"] == "floor" else {"loss"}
        )
        assert all((m["p_vs_first"] is None) == (name == "zero-shot") for m in row["metrics"].values())
    assert rows["full"]["metrics"]["loss"]["value"] < rows["zero-shot"]["metrics"]["loss"]["value"]
    assert rows["lora-4"]["metrics"]["loss"]["p_vs_first"] < 0.05
    assert results == json.loads((out / "results.json").read_text()) and results["published"] == {
        "lora-4": {"rouge1": 40.81, "gflops": 2.45}
    }
    table = (out / "table.md").read_text()
    assert table.count("\n") == 7 + 4 + 5 and "| lora-4 | 2.45 |" in table, "scores, published figures, first steps"


def test_the_full_variants_model_is_evaluated_again(comparison: tuple[dict[str, Any], Path], workshop: Path) -> None:
    results, out = comparison
    row = json.loads(loralab(workshop, "evaluate", str(out / "full"), "--json").stdout)
    stored = next(row for row in results["rows"] if row["variant"] == "full")["metrics"]
    assert {name: m["value"] for name, m in row["metrics"].items()} == pytest.approx(
        {name: m["value"] for name, m in stored.items()}, abs=1e-6
    )  # six digits


def test_the_printed_table_fits_a_terminal(comparison: tuple[dict[str, Any], Path]) -> None:
    from loralab.reports.summary import report

    text = report(comparison[0])
    assert max(map(len, text.splitlines()[:-1])) <= 80, "all but the path in the last line"
    for expected in ("lora-4", "pub. 40.81", "one sentence", "ROUGE-Lsum", "is UNDER", "p<.001"):
        assert expected in text


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere"])
def test_a_comparison_looks_for_every_base_before_anything_runs(name: str, workshop: Path, tmp_path: Path) -> None:
    for settings in ([f"model.name={name}"], [f"variants.full.model.name={name}"]):
        done = loralab(tmp_path, "compare", str(workshop / "tiny.yaml"), *settings, "--out", "out", code=2)
        assert done.stderr.count(name) == 1 and "[1/" not in done.stderr, "said once, and before the first variant"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_comparison_needs_bases_with_config_and_weights(lost: str, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "base", tmp_path / "base")
    (tmp_path / "base" / lost).unlink()
    setting = f"variants.full.model.name={tmp_path / 'base'}"
    done = loralab(tmp_path, "compare", str(workshop / "tiny.yaml"), setting, "--out", "out", code=2)
    assert lost in done.stderr and "[1/" not in done.stderr, "said before the first variant"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failed_variant_is_reported_and_the_others_kept(workshop: Path) -> None:
    arguments = [
        "variants.lora-4.lora.rules=[nope]",
        "training.epochs=1",
        "variants=[zero-shot, lora-4]",
        "evaluation.metrics=[chrf, copied, names]",
        "--out",
        "with-failure",
    ]
    done = loralab(workshop, "compare", "tiny.yaml", *arguments, code=1)
    assert "lora-4 failed: exit code 2" in done.stderr and "matches no module" in done.stderr
    assert "failed" in done.stdout and "zero-shot" in done.stdout
    metrics = {
        row["variant"]: row["metrics"]
        for row in json.loads((workshop / "with-failure/results.json").read_text())["rows"]
    }
    assert set(metrics["zero-shot"]) == {"loss", "chrf", "copied_3grams", "new_names"} and not metrics["lora-4"]
    lead = {name: metric["value"] for name, metric in metrics["first two lines"].items()}
    assert lead["copied_3grams"] == 100 and lead["new_names"] == 0 and 0 < lead["chrf"] < 100
    assert "neither is better: copied 3-grams" in " ".join(done.stdout.split())


def test_scoring_a_runs_predictions_gives_the_runs_scores(workshop: Path, run: dict[str, Any]) -> None:
    results = score_files([workshop / run["run"]], Columns(), ["rouge"])
    assert [row["system"] for row in results["rows"]] == [Path(run["run"]).name]
    scores = results["rows"][0]["metrics"]
    assert {name: {**score, "p_vs_first": None} for name, score in scores.items()} == {
        name: metric for name, metric in run["metrics"].items() if name != "loss"
    }
    assert (results["examples"], results["groups"]) == (12, 10)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny.yaml", "lora.rnak=4"], "lora.rnak: unknown key. Did you mean 'rank'?"),
        (["train", "tiny.yaml", "lora.rules=[Attention.w]"], "The rule 'Attention.w' matches no module of this model."),
        (["train", "tiny.yaml", "data.source=dialog"], "no column 'dialog'"),
        (["train", "tiny.yaml", "evaluation.split=test"], "has no split 'test'"),
        (["train", "tiny.yaml", "model.name=./nowhere"], "There is no folder ./nowhere"),
        (["train", "tinny.yaml"], "There is no recipe file tinny.yaml"),
        (["train", "tiny.yaml", "--out", "data"], "data is there already and not empty"),
        (["train", "tiny.yaml", "data.name=empty"], "empty/train.jsonl: has no rows"),
        (["train", "tiny.yaml", "data.name=cut-off"], "cut-off/train.jsonl.gz, after line"),
        (["train", "tiny.yaml", "data.name=no-json"], "no-json/train.jsonl, line 2: not JSON"),
        (["evaluate", "base"], "loralab evaluate base data.name=FOLDER data.source=COLUMN"),
        (["evaluate", "data"], "data is neither a run"),
        (["evaluate", "nowhere"], "There is no folder nowhere"),
        (["generate", "base"], "Nothing to answer: give --text TEXT, --input FILE"),
        (["generate", "base", "--text", "a", "evaluation.beams=0"], "evaluation.beams: expected greater than 0; got 0"),
        (["compare", "tiny.yaml", "variants={}", "published={}"], "has no variants to compare"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], message: str, workshop: Path) -> None:
    done = loralab(workshop, *arguments, code=2)
    assert message in done.stderr and done.stdout == ""


def test_an_adapter_for_another_base_is_refused(workshop: Path, run: dict[str, Any], data_folder: Path) -> None:
    make_t5(workshop / "other", "untied", seed=5, tokenizer=data_folder / "tokenizers/t5", vocabulary=32128)
    done = loralab(workshop, "evaluate", run["adapter"], "--base", "other", code=2)
    assert "was trained on the base" in done.stderr and "have other values" in done.stderr


def test_a_base_that_has_moved_is_found_with_base(workshop: Path, run: dict[str, Any]) -> None:
    (workshop / "moved").symlink_to(workshop / "base")
    row = json.loads(loralab(workshop, "evaluate", run["run"], "--base", "moved", "--json").stdout)
    assert row["metrics"] == run["metrics"]


def test_a_run_that_has_not_finished_says_so(workshop: Path, run: dict[str, Any]) -> None:
    half = workshop / "half"
    half.mkdir()
    (half / "recipe.yaml").write_text((workshop / run["run"] / "recipe.yaml").read_text())
    assert "has not finished" in loralab(workshop, "evaluate", "half", code=2).stderr


def test_a_run_is_no_comparison_and_a_comparison_no_run(
    workshop: Path, run: dict[str, Any], comparison: tuple[dict[str, Any], Path]
) -> None:
    before = sorted((workshop / run["run"]).iterdir())
    done = loralab(workshop, "compare", run["run"], "--resume", code=2)
    assert f"is a training run, not a comparison. Go on with it: loralab train {run['run']} --resume" in done.stderr
    assert sorted((workshop / run["run"]).iterdir()) == before
    done = loralab(workshop, "train", "side-by-side", "--resume", code=2)
    assert "is a comparison, not a run. Go on with it: loralab compare side-by-side --resume" in done.stderr
    for command in (["evaluate", "side-by-side"], ["generate", "side-by-side", "--text", "a"]):
        done = loralab(workshop, *command, code=2)
        assert "Name one of its runs: side-by-side/full, side-by-side/lora-4, side-by-side/zero-shot." in done.stderr


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("record.json", b"{cut off", ["train", "RUN", "--resume"]),
        ("record.json", b"{}", ["train", "RUN", "--resume"]),
        ("record.json", b"\xff", ["train", "RUN", "--resume"]),
        ("recipe.yaml", b"name: \xff", ["evaluate", "RUN"]),
        ("adapter/loralab.json", b"{cut off", ["evaluate", "RUN"]),
        ("adapter/loralab.json", b'{"base": {"fingerprint": {"shared.weight": 3}}}', ["evaluate", "RUN"]),
        ("adapter/loralab.json", b'{"recipe": "tiny"}', ["evaluate", "RUN/adapter"]),
    ],
)
def test_a_damaged_file_is_named(
    file: str, content: bytes, command: list[str], workshop: Path, run: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(workshop / run["run"], copy)
    (copy / file).write_bytes(content)
    done = loralab(workshop, *(word.replace("RUN", str(copy)) for word in command), code=2)
    assert str(copy / file) in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "x" * 300], "File name too long"),
        (["train", "latin.yaml"], "latin.yaml is not text in UTF-8"),
        (
            ["train", "tiny.yaml", "training.method=none", "--out", "tiny.yaml/below"],
            "tiny.yaml/below: Not a directory",
        ),
        (["train", "tiny.yaml", "training.method=none", "--out", "/proc/below"], "/proc/below: No such file"),
    ],
)
def test_a_path_that_cannot_be_is_one_message(arguments: list[str], message: str, workshop: Path) -> None:
    (workshop / "latin.yaml").write_bytes("name: für\n".encode("latin-1"))
    assert message in loralab(workshop, *arguments, code=2).stderr


@pytest.mark.parametrize("lost", ["predictions.jsonl", "adapter"])
def test_a_finished_run_has_all_its_files(lost: str, workshop: Path, run: dict[str, Any]) -> None:
    copy = workshop / f"without-{lost}"
    shutil.copytree(workshop / run["run"], copy, ignore=shutil.ignore_patterns(lost))
    done = loralab(workshop, "train", copy.name, "--resume", code=2)
    assert f"has finished, but these are there no more: {lost}. Put them back" in done.stderr


def test_a_comparison_needs_all_files_of_its_runs(workshop: Path, comparison: tuple[dict[str, Any], Path]) -> None:
    _, out = comparison
    (out / "lora-4/predictions.jsonl").rename(out / "aside")
    done = loralab(workshop, "compare", out.name, "--resume", code=2)
    (out / "aside").rename(out / "lora-4/predictions.jsonl")
    assert "side-by-side/lora-4 has finished, but these are there no more: predictions.jsonl" in done.stderr
    (out / "full/model").rename(workshop / "aside")  # the table needs no weights, which are large
    done = loralab(workshop, "compare", out.name, "--resume")
    (workshop / "aside").rename(out / "full/model")
    assert done.stderr.count("It has finished already.") == 3


def test_commands_to_copy_fit_what_is_there(workshop: Path, run: dict[str, Any]) -> None:
    done = loralab(workshop, "merge", run["run"], "--out", "data", code=2)
    assert "data is there already and not empty. Give another --out, or remove it." in done.stderr
    done = loralab(workshop, "train", "tiny.yaml", "training.method=none", "--out", "blank und ü")
    assert "Try it: loralab generate 'blank und ü' --text" in done.stdout
    done = loralab(workshop, "train", "tiny.yaml", "--out", "blank und ü", code=2)
    assert "goes on with `loralab train 'blank und ü' --resume`" in done.stderr


def test_without_metrics_the_loss_alone_is_measured(workshop: Path, tmp_path: Path) -> None:
    recipe = load_recipe(workshop / "tiny.yaml", ["evaluation.metrics=[]", "training.method=none"])
    folder, record = train(recipe, tmp_path / "run")
    lines = read_lines(folder / "predictions.jsonl")
    assert set(record["metrics"]) == {"loss"} and len(lines) == 12
    assert all("prediction" not in line and line["loss"] > 0 for line in lines), "nothing was written"
    assert read_scores(folder).summary()["loss"]["value"] == pytest.approx(record["metrics"]["loss"]["value"])
