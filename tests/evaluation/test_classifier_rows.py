"""Classifiers measured, taught by states that were computed once, and given bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import write_rows
from folders import write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from loralab import load_adapter
from loralab.config.loading import load_recipe
from loralab.errors import DataError, ModelError, RecipeError
from loralab.evaluation.prediction_files import Columns
from loralab.evaluation.score_files import report, score_files
from loralab.evaluation.scores import read_scores
from loralab.inference.saved_model import evaluate_saved
from loralab.metrics.labels import Labels
from loralab.metrics.significance import mcnemar
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading.load import model_folder
from loralab.runs.record import read_lines, read_record
from loralab.tasks import task_of
from loralab.training.datasets import read_run_datasets
from loralab.training.train import train

NEG_POS = Labels(("neg", "pos"))
TEXTS = ["the film was good and two friends met", "a bad story", "it was a film"]


# What is measured


def test_a_saved_run_is_evaluated_as_it_was(classifiers: dict[str, Path]) -> None:
    for name in ("bert lora", "bert head", "distilbert lora", "bert full after lora"):
        record, again = read_record(classifiers[name]), evaluate_saved(classifiers[name], [], None)
        values = [{key: metric["value"] for key, metric in row["metrics"].items()} for row in (record, again)]
        assert values[0] == pytest.approx(values[1], abs=1e-3)
        assert set(values[0]) == {"loss", "accuracy", "precision", "recall", "f1", "f1_macro", "ece"}
        summary = read_scores(classifiers[name]).summary()
        assert {key: metric["value"] for key, metric in summary.items()} == pytest.approx(values[0], abs=1e-3)
    assert read_record(classifiers["bert lora"])["labels"]["per_label"]["pos"]["rows"] == 12
    assert (classifiers["bert lora"] / "confusion.png").stat().st_size > 1000


def test_the_losses_are_transformers(classifiers: dict[str, Path], bases: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifiers["bert full after lora"] / "model").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(bases / "bert")
    for row in read_lines(classifiers["bert full after lora"] / "predictions.jsonl")[:4]:
        ids = tokenizer(row["source"], return_tensors="pt", truncation=True, max_length=20)
        label = torch.tensor([["neg", "pos"].index(row["references"][0])])
        with torch.inference_mode():
            assert float(model(**ids, labels=label).loss) == pytest.approx(row["loss"], abs=1e-5)


def test_several_labels_a_row(bases: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    cells = [[], ["a"], ["a", "b"], ["c"]]
    rows = [{"text": f"the film was {'good ' * (n % 4)}story", "label": cells[n % 4]} for n in range(32)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", rows)
    run, record = train(load_recipe(bases / "bert.yaml", [f"data.name={tmp_path}/data"]), tmp_path / "run")
    assert set(record["metrics"]) == {
        "loss",
        "accuracy",
        "precision_macro",
        "recall_macro",
        "f1_macro",
        "f1_micro",
        "ece",
    }
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        bases / "bert", num_labels=3, problem_type="multi_label_classification"
    )
    load_adapter(model, run / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(bases / "bert")
    line = read_lines(run / "predictions.jsonl")[2]
    with torch.inference_mode():
        found = model.eval()(**tokenizer(line["source"], return_tensors="pt"), labels=torch.tensor([[1.0, 1.0, 0.0]]))
    assert list(line["probabilities"].values()) == pytest.approx(found.logits.sigmoid()[0].tolist(), abs=1e-5)
    assert line["loss"] == pytest.approx(float(found.loss), abs=1e-5) and line["references"] == ['["a", "b"]']


def test_the_floor_is_the_label_that_most_training_rows_have(classifiers: dict[str, Path], bases: Path) -> None:
    recipe = load_recipe(bases / "distilbert.yaml")
    datasets, labels = read_run_datasets(recipe), read_record(classifiers["distilbert lora"])["labels"]
    floors = task_of(recipe.data).floors(
        datasets.training, datasets.evaluated, ["classification"], Labels.from_json(labels)
    )
    ((name, floor),) = floors.items()
    assert name == "always NEGATIVE"
    values = {key: metric["value"] for key, metric in floor.summary().items()}
    assert values == pytest.approx(
        {"accuracy": 50, "precision": 0, "recall": 0, "f1": 0, "f1_macro": 100 / 3, "ece": 50}
    )
    assert floor.groups == read_scores(classifiers["distilbert lora"]).groups


def test_two_runs_are_scored_against_each_other(classifiers: dict[str, Path]) -> None:
    folders = [classifiers["bert lora"], classifiers["bert head"]]
    results = score_files(folders, Columns(), ["classification"])
    for row, run in zip(results["rows"], folders, strict=True):
        expected = read_record(run)["metrics"]
        assert row["metrics"] == {
            name: pytest.approx({key: expected[name][key] for key in ("value", "low", "high")})
            for name in row["metrics"]
        }
        assert set(row["metrics"]) == set(expected) - {"loss"}
    (pair,) = [pair for pair in results["pairs"] if pair["metric"] == "accuracy"]
    right = [np.array([line["accuracy"] > 0 for line in read_lines(run / "predictions.jsonl")]) for run in folders]
    assert pair["p_mcnemar"] == mcnemar(*right).p
    assert "McNemar's test, bert lora against bert head" in " ".join(report(results).split())


# Features of a frozen encoder


UNDER_HEAD = ["training.method=head", "model.dropout=0"]
UNDER_LAYER = ["lora.rules=[layer.1.*]", "lora.rank=2", "model.dropout=0"]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("overrides", [UNDER_HEAD, UNDER_LAYER], ids=["head", "top layer"])
def test_training_is_the_same_from_states_that_were_computed_once(
    overrides: list[str], family: str, bases: Path
) -> None:
    recipe = load_recipe(bases / f"{family}.yaml", overrides)
    trained: list[list[torch.Tensor]] = []
    for once in (True, False):
        engine: TorchEngine = open_engine(recipe, labels=NEG_POS)
        encoded = task_of(recipe.data).encode(engine, read_run_datasets(recipe).training, (20, 1), 0)
        if once:
            engine.cache_frozen_features(encoded, lambda done: None)
            (lowest,) = [module for name, module in engine.model.named_modules() if name.endswith("layer.0.attention")]
            lowest.register_forward_pre_hook(lambda *_: pytest.fail("a step ran the frozen part"))
        for step in range(8):
            engine.train_step([encoded.collate(np.arange(8 * step, 8 * step + 8), 0)], 1e-2)
        trained.append([parameter.detach().clone() for parameter in engine.parameters])
    assert trained[0]
    # rows stand in other batches: sums in another order
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "computed"),
    [
        (["lora.rules=[layer.1.*]", "model.dropout=0"], True),
        (["lora.rules=[layer.*]", "model.dropout=0"], False),
        (["lora.rules=[layer.1.*]"], False),  # dropout in the frozen part, as in all of the model
        (["lora.rules=[layer.1.*]", "model.dropout=0", "lora.bias=all"], False),
        (["training.method=full", "model.dropout=0"], False),
    ],
)
def test_only_what_no_training_changes_is_computed_once(overrides: list[str], computed: bool, bases: Path) -> None:
    engine: TorchEngine = open_engine(load_recipe(bases / "bert.yaml", overrides), labels=NEG_POS)
    encoded = task_of(engine.recipe.data).encode(engine, read_run_datasets(engine.recipe).training, (20, 1), 0)
    engine.cache_frozen_features(encoded, lambda done: None)
    assert (engine._features is not None) == computed


def test_states_are_found_again_until_a_weight_changes(bases: Path, cache: Path) -> None:
    recipe = load_recipe(bases / "bert.yaml", ["training.method=head"])
    for changed, entries in ((False, 1), (False, 1), (True, 2)):
        engine: TorchEngine = open_engine(recipe, labels=NEG_POS)
        if changed:
            with torch.no_grad():
                engine.model.get_parameter("bert.embeddings.word_embeddings.weight")[2000].add_(1)
        engine.cache_frozen_features(
            task_of(recipe.data).encode(engine, read_run_datasets(recipe).training, (20, 1), 0), lambda done: None
        )
        assert len(list(cache.glob("features-*"))) == entries


def test_dropout_in_the_frozen_part_is_there_on_demand(bases: Path) -> None:
    for wanted in (False, True):
        recipe = load_recipe(bases / "bert.yaml", ["training.method=head", f"training.frozen_dropout={wanted}".lower()])
        engine: TorchEngine = open_engine(recipe, labels=NEG_POS)
        encoded = task_of(recipe.data).encode(engine, read_run_datasets(recipe).training, (20, 1), 0)
        engine.cache_frozen_features(encoded, lambda done: None)
        engine.train_step([encoded.collate(np.arange(4), 0)], 1e-3)
        assert engine.model.get_submodule("bert.embeddings.dropout").training == wanted
        assert engine.model.get_submodule("dropout").training
        assert (engine._features is None) == wanted


# Bad input


def test_names_in_one_split_and_numbers_in_the_other(bases: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    write_rows(tmp_path / "data", (0, 1), {"validation": 12})
    recipe = bases / "bert.yaml"
    with pytest.raises(
        DataError, match=r"validation: 12 rows have labels .*'0' \(6 rows\).*Numbers stand in one place"
    ):
        read_run_datasets(load_recipe(recipe, [f"data.name={tmp_path}/data"]))
    both = "data.labels={0: neg, 1: pos, neg: neg, pos: pos}"
    labels = read_run_datasets(load_recipe(recipe, [f"data.name={tmp_path}/data", both])).labels
    assert labels is not None and labels.names == ("neg", "pos")


def test_further_data_are_of_labels_too(bases: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "more", counts={"train": 20, "test": 8})
    more = f"{{name: {tmp_path}/more, source: text, label: label, max_source_length: 99}}"
    overrides = ["training.method=head", f"mixture.more={more}", f"forgetting.more={more}"]
    _, record = train(load_recipe(bases / "bert.yaml", overrides), tmp_path / "run")
    assert record["forgetting"]["more"]["before"]["value"] != record["forgetting"]["more"]["after"]["value"]
    assert record["steps"] == 2 * 6  # (64 + 20) / 16
    texts = more.replace("label: label", "target: text")
    for block in ("mixture", "forgetting"):
        with pytest.raises(RecipeError, match=rf"{block}\.more: it and data have not the same task"):
            load_recipe(bases / "bert.yaml", [f"{block}.more={texts}"])
        with pytest.raises(RecipeError, match=rf"{block}\.more: labels mean nothing here; data\.labels says"):
            load_recipe(bases / "bert.yaml", [f"{block}.more={more}", f"{block}.more.labels={{a: neg, b: pos}}"])
    write_rows(tmp_path / "other", ("cat", "dog"), {"train": 20, "test": 8})
    for block in ("mixture", "forgetting"):
        recipe = load_recipe(bases / "bert.yaml", [f"{block}.more={more.replace('/more', '/other')}"])
        with pytest.raises(DataError, match=rf"{block}\.more: .*labels that the model was not trained on"):
            train(recipe, tmp_path / block)


def test_an_adapter_whose_labels_are_not_the_datas(classifiers: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path / "data", ("sad", "glad"))
    with pytest.raises(
        DataError, match=r"24 rows have labels that the model was not trained on: 'sad' \(12 rows\), 'glad'"
    ):
        evaluate_saved(classifiers["bert lora"], [f"data.name={tmp_path}/data"], None)
    renamed = [f"data.name={tmp_path}/data", "data.labels={sad: neg, glad: pos}"]
    assert evaluate_saved(classifiers["bert lora"], renamed, None)["labels"]["names"] == ["neg", "pos"]


def test_a_training_set_of_one_label(bases: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", ("good", "good"))
    with pytest.raises(DataError, match=r"all 64 have the label 'good', and there is nothing to choose between"):
        read_run_datasets(load_recipe(bases / "bert.yaml", [f"data.name={tmp_path}/data"]))


def test_texts_beyond_the_positions_are_cut_and_counted(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "data")
    with (tmp_path / "data/train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "good " * 600, "label": "pos"}) + "\n")
    recipe = load_recipe(
        bases / "bert.yaml", [f"data.name={tmp_path}/data", "data.max_source_length=512", "training.epochs=1"]
    )
    _, record = train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert "the model has 24 positions: texts are cut to 24 tokens" in said and "cut (row 65)" in said
    assert record["lengths"][0] == 24


def test_a_head_of_other_labels_is_begun_anew(bases: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", ("cat", "dog"))
    recipe = load_recipe(bases / "distilbert.yaml", [f"data.name={tmp_path}/data"])
    engine: TorchEngine = open_engine(recipe, labels=Labels(("cat", "dog")))
    kept = AutoModelForSequenceClassification.from_pretrained(bases / "distilbert")
    assert not torch.equal(engine.model.get_parameter("classifier.weight"), kept.classifier.weight)
    assert "Head: freshly initialised, trained and saved with the adapter. Labels: cat, dog." in engine.summary
    again: TorchEngine = open_engine(recipe, labels=Labels(("cat", "dog")))
    assert torch.equal(engine.model.get_parameter("classifier.weight"), again.model.get_parameter("classifier.weight"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metrics=[rouge]", "with data.label only classification is measured"),
        ("evaluation.beams=4", "evaluation.beams means nothing with data.label"),
        ("optimizer.scale_parameter=true", "scale_parameter is for training.method full"),
    ],
)
def test_settings_of_writing_do_not_go_with_labels(override: str, message: str, bases: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(bases / "bert.yaml", [override])


def test_a_head_needs_labels(workshop: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"training\.method head: for classifiers only; name the column of the labels"
    ):
        load_recipe(workshop / "tiny.yaml", ["training.method=head"])


def test_a_base_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_package/model").mkdir(parents=True)
    (tmp_path / "a_package/__init__.py").write_text("raise AssertionError('it was imported')")
    (tmp_path / "a_package/model/config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_folder("package:a_package/model") == tmp_path / "a_package/model"
    with pytest.raises(ModelError, match=r"the package has no folder 'modle'\. Folders of models in it: model"):
        model_folder("package:a_package/modle")
    with pytest.raises(ModelError, match="no package 'b_package' is installed here"):
        model_folder("package:b_package/model")
