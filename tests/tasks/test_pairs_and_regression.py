"""Encoders that read two texts, and encoders that give a number, beside Transformers and SciPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from classifiers import WORDS, make_bases
from folders import write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workshop import loralab

from loralab import load_adapter
from loralab.config.loading import load_recipe
from loralab.errors import DataError, ModelError, RecipeError
from loralab.evaluation.score_files import Columns, score_files
from loralab.evaluation.scores import read_scores
from loralab.experiments.compare import compare
from loralab.inference.saved_model import evaluate_saved
from loralab.metrics import regression
from loralab.on_torch.engine import open_engine
from loralab.runs.record import read_lines
from loralab.tasks import task_of
from loralab.training.datasets import read_run_datasets
from loralab.training.train import train

LENGTH = 18


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and rows of two texts with a number, twice as many as are red, and a label that says whether both have one colour."""
    place = tmp_path_factory.mktemp("pairs")
    make_bases(place, data_folder / "tokenizers/bert-base-uncased")
    (place / "data").mkdir()
    for seed, (split, count) in enumerate({"train": 48, "validation": 14}.items()):
        generator, rows = np.random.default_rng(seed), []
        for _ in range(count):
            colours = generator.choice(["red", "blue"], 2)
            texts = [" ".join([colour, *generator.choice(WORDS, generator.integers(2, 12))]) for colour in colours]
            red = list(colours).count("red")
            rows.append(
                {
                    "premise": texts[0],
                    "hypothesis": texts[1],
                    "near": round(2 * red + 0.1 * generator.random(), 2),
                    "verdict": ["other", "same"][red != 1],
                }
            )
        write_jsonl(place / f"data/{split}.jsonl", rows)
    return place


def settings(place: Path, base: str, *more: str) -> list[str]:
    return [
        f"model.name={place / base}", "model.dtype=float32", "model.device=cpu", f"data.name={place / 'data'}",
        "data.source=premise", "data.text_pair=hypothesis", "data.labels={}", f"data.max_source_length={LENGTH}",
        "evaluation.split=validation", "validation.every=epoch", *more,
    ]  # fmt: skip


PAIRS = ("data.label=verdict",)
NUMBERS = ("data.label=near", "data.problem_type=regression", "evaluation.metrics=[regression]")


@pytest.mark.parametrize("kind", [PAIRS, NUMBERS], ids=["labels", "numbers"])
@pytest.mark.parametrize("base", ["bert", "roberta", "distilbert"])
def test_logits_losses_and_gradients_of_pairs_are_transformers(base: str, kind: tuple[str, ...], place: Path) -> None:
    """Long pairs are cut as `truncation=True` cuts them; BERT is told which token is of which text."""
    recipe = load_recipe("minilm-imdb", settings(place, base, *kind, "training.method=full", "model.dropout=0"))
    datasets = read_run_datasets(recipe)
    engine = open_engine(recipe, labels=datasets.labels)
    encoded = task_of(recipe.data).encode(engine, datasets.evaluated, (LENGTH, 1), 0)
    batch = encoded.collate(np.arange(8), engine.pad_id)
    tokenizer: Any = AutoTokenizer.from_pretrained(place / base)
    rows = read_lines(place / "data/validation.jsonl")[:8]
    inputs = tokenizer(
        [row["premise"] for row in rows], [row["hypothesis"] for row in rows], truncation=True, max_length=LENGTH,
        padding=True, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(torch.from_numpy(batch.source_ids), inputs["input_ids"])
    assert batch.token_types is not None and torch.equal(torch.from_numpy(batch.token_types), inputs["token_type_ids"])
    assert encoded.findings["long_sources"].count > 0
    if base == "distilbert":
        inputs.pop("token_type_ids")  # its forward knows no types
    other = engine.model
    wanted = (
        torch.tensor([[row["near"]] for row in rows])
        if kind is NUMBERS
        else torch.tensor([["other", "same"].index(row["verdict"]) for row in rows])
    )
    other.eval()
    found = other(**inputs, labels=wanted)
    np.testing.assert_allclose(engine.logits(batch), found.logits.detach().double().numpy(), rtol=1.3e-6, atol=1e-5)
    assert engine.losses(batch).mean() == pytest.approx(float(found.loss.detach()), rel=1e-5)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A comparison of zero-shot and LoRA on numbers of pairs."""
    variants = ["variants={zero-shot: {training.method: none}, lora: {training.method: lora, lora.rules: all-linear}}"]
    more = ["training.epochs=20", "training.batch_size=8", "optimizer.learning_rate=1e-2", "validation.metric=pearson",
            "validation.metrics=[regression]", "model.dropout=0"]  # fmt: skip
    recipe = load_recipe("minilm-imdb", settings(place, "bert", *NUMBERS, *more, *variants))
    compare(recipe, place / "compared")
    return place / "compared"


def test_numbers_are_learnt_scored_and_told(trained: Path, place: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert results["failures"] == {}
    rows = {row["variant"]: row["metrics"] for row in results["rows"]}
    (floor,) = [name for name in rows if name.startswith("always")]
    assert set(rows["lora"]) == {"loss", "pearson", "spearman", "mse", "mae"} and set(rows[floor]) == {"mse", "mae"}
    assert rows["lora"]["mse"]["value"] < 0.8 * rows[floor]["mse"]["value"] < rows["zero-shot"]["mse"]["value"]
    assert rows["lora"]["loss"]["value"] == pytest.approx(rows["lora"]["mse"]["value"], rel=1e-4)
    lines = read_lines(trained / "lora/predictions.jsonl")
    given, true = (
        [float(text) for text in texts]
        for texts in ([x["prediction"] for x in lines], [x["references"][0] for x in lines])
    )
    assert rows["lora"]["pearson"]["value"] == pytest.approx(100 * scipy.stats.pearsonr(given, true).statistic)
    assert rows["lora"]["spearman"]["value"] == pytest.approx(100 * scipy.stats.spearmanr(given, true).statistic)
    low, high = rows["lora"]["pearson"]["low"], rows["lora"]["pearson"]["high"]
    assert low < rows["lora"]["pearson"]["value"] < high <= 100
    again = evaluate_saved(trained / "lora", [], None)["metrics"]
    assert {name: metric["value"] for name, metric in again.items()} == pytest.approx(
        {name: metric["value"] for name, metric in rows["lora"].items()}, rel=1e-4
    )
    summary = read_scores(trained / "lora").summary()
    assert summary["pearson"]["value"] == pytest.approx(rows["lora"]["pearson"]["value"], rel=1e-6)
    assert "Pearson" in (trained / "table.md").read_text()
    first = read_lines(place / "data/validation.jsonl")[0]
    assert lines[0]["source"] == f"{first['premise']}\n{first['hypothesis']}"


def test_the_adapter_alone_answers_pairs_as_transformers_does(trained: Path, place: Path, tmp_path: Path) -> None:
    rows = read_lines(place / "data/validation.jsonl")[:3]
    texts = [word for row in rows for word in ("--text", row["premise"], "--text-pair", row["hypothesis"])]
    answers = json.loads(loralab(tmp_path, "generate", str(trained / "lora/adapter"), *texts, "--json").stdout)[
        "answers"
    ]
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        place / "bert", num_labels=1, problem_type="regression"
    )
    load_adapter(model, trained / "lora/adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(place / "bert")
    for row, answer in zip(rows, answers, strict=True):
        ids = tokenizer(row["premise"], row["hypothesis"], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            assert answer["number"] == pytest.approx(float(model.eval()(**ids).logits), abs=1e-5)
    write_jsonl(tmp_path / "in.jsonl", [*rows, {"premise": "a film", "hypothesis": " "}])
    loralab(tmp_path, "generate", str(trained / "lora"), "--input", "in.jsonl", "--out", "out.jsonl")
    written = read_lines(tmp_path / "out.jsonl")
    assert [line["prediction"] for line in written][3] == ""
    assert [float(line["prediction"]) for line in written[:3]] == pytest.approx(
        [each["number"] for each in answers], abs=1e-5
    )
    told = loralab(tmp_path, "generate", str(trained / "lora"), "--text", "a film", code=2).stderr
    assert "expected a --text-pair for each --text; got 1 and 0" in told


def test_a_merged_regression_is_transformers_own(trained: Path, place: Path, tmp_path: Path) -> None:
    loralab(tmp_path, "merge", str(trained / "lora"), "--out", "merged")
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    lines, rows = read_lines(trained / "lora/predictions.jsonl"), read_lines(place / "data/validation.jsonl")
    for line, row in zip(lines[:3], rows, strict=False):
        ids = tokenizer(row["premise"], row["hypothesis"], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            assert float(line["prediction"]) == pytest.approx(float(model(**ids).logits), abs=1e-4)
    single = ["--text", rows[0]["premise"]]
    assert json.loads(loralab(tmp_path, "generate", "merged", *single, "--json").stdout)["answers"][0].keys() == {
        "number"
    }


def test_pairs_of_labels_run_to_the_end(place: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "minilm-imdb", settings(place, "roberta", *PAIRS, "training.method=head", "training.epochs=1", "variants={}")
    )
    folder, record = train(recipe, tmp_path / "run")
    assert record["labels"]["names"] == ["other", "same"] and record["proof"]["reloaded_equal"]
    row = json.loads(loralab(tmp_path, "generate", str(folder), "--sample", "validation:1", "--json").stdout)
    assert row["label"] in ("other", "same") and "\n" in row["source"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.label=null", "data.target=verdict"], "text_pair is for encoders with a head"),
        (["data.prompt=Say: {premise}"], "prompt means nothing with text_pair"),
        (["data.max_source_length=p90"], "max_source_length is a number of tokens"),
        (["data.problem_type=regression", "data.labels={0: a, 1: b}"], "labels mean nothing with problem_type regression"),
        (["data.problem_type=regression", "evaluation.metrics=[classification]"], "only regression is measured"),
        ([*NUMBERS[1:], "training.label_smoothing=0.1"], "label_smoothing means nothing"),
        (["data.problem_type=rank"], "regression"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_error(given: list[str], message: str, place: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("minilm-imdb", settings(place, "bert", "data.label=verdict", *given))


def test_bad_numbers_and_missing_columns(place: Path, tmp_path: Path) -> None:
    def read(*more: str) -> Any:
        return read_run_datasets(load_recipe("minilm-imdb", settings(place, "bert", *NUMBERS, *more)))

    with pytest.raises(DataError, match=r"column 'verdict' holds '(same|other)' \(str\), where a number is needed"):
        read("data.label=verdict")
    with pytest.raises(DataError, match=r"no column 'hypotheses' \(Did you mean 'hypothesis'\?\)"):
        read("data.text_pair=hypotheses")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", [{"premise": "a", "hypothesis": "b", "near": 2}] * 4)
    with pytest.raises(DataError, match=r"all rows have the number 2\.0"):
        read(f"data.name={tmp_path / 'data'}")


def test_a_number_may_be_what_pads_other_labels(place: Path) -> None:
    """-100 marks padding in labels of tokens."""
    recipe = load_recipe("minilm-imdb", settings(place, "bert", *NUMBERS))
    datasets = read_run_datasets(recipe)
    engine = open_engine(recipe, labels=datasets.labels)
    batch = task_of(recipe.data).encode(engine, datasets.evaluated, (LENGTH, 1), 0).collate(np.arange(3), 0)
    batch.labels[1] = -100
    losses = engine.losses(batch)
    assert losses == pytest.approx(((engine.logits(batch) - batch.labels) ** 2)[:, 0], rel=1e-5)


def test_correlations_are_scipys_and_ties_share_their_rank() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 50).astype(float), generator.normal(size=50)
    columns = regression.score([str(v) for v in x], [[str(v)] for v in y])
    values = {c.name: c.statistic(columns[c.name].sum(0)) for c in regression.COLUMNS if c.statistic}
    assert values["pearson"] == pytest.approx(100 * scipy.stats.pearsonr(x, y).statistic)
    assert values["spearman"] == pytest.approx(100 * scipy.stats.spearmanr(x, y).statistic)
    flat = regression.score(["1.5"] * 4, [["1"], ["2"], ["3"], ["4"]])
    assert regression.PEARSON.statistic is not None and regression.PEARSON.statistic(flat["pearson"].sum(0)) == 0
    with pytest.raises(DataError, match="prediction of row 1 is 'two', where a number is needed"):
        regression.score(["1", "two"], [["1"], ["2"]])


def test_files_of_numbers_are_scored(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "truth": n, "one": n + 0.5, "two": -n} for n in range(12)]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    found = score_files([tmp_path / "answers.jsonl"], Columns(("one", "two"), ("truth",), None, None), ["regression"])
    values = {
        row["system"]: {name: metric["value"] for name, metric in row["metrics"].items()} for row in found["rows"]
    }
    assert values["one"] == pytest.approx({"pearson": 100, "spearman": 100, "mse": 0.25, "mae": 0.5})
    assert values["two"]["pearson"] == pytest.approx(-100)


def test_a_tokenizer_with_other_types_is_refused() -> None:
    from loralab.data.text_pairs import _second

    assert (_second([0, 0, 1]), _second([0, 0])) == (2, 2)
    with pytest.raises(ModelError, match="the types 0, 1, 2; expected 0 for the first text"):
        _second([0, 1, 2])
