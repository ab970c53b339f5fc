"""The recipes on SAMSum with large bases, each by overriding its base and its rows alone; a comparison's epochs and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.config.loading import load_recipe
from loralab.experiments import run_variants
from loralab.experiments.compare import compare
from loralab.experiments.variants import PlannedRun
from loralab.planning.predicted import predicted_and_measured
from loralab.reports.summary import report
from loralab.runs.record import read_record
from loralab.runs.validation_lines import best_of
from loralab.training.train import train

ROWS = {"train": 12, "validation": 4}
SIZE = "flan-t5-size-samsum"


@pytest.fixture(scope="module")
def finished(
    workshop: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Path]]:
    """Recipe -> results and folder. Its variants run in this process: what a process of their own is for is tested elsewhere."""

    def run(one: PlannedRun, _: Path) -> None:
        train(one.recipe, one.folder)

    done, base = {}, workshop / "base"
    place = tmp_path_factory.mktemp("samsum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_variants, "_run", run)
        for name in ("flan-t5-xxl-samsum", SIZE):
            overrides = [f"model.name={base}", f"data.name={data_folder / 'samsum'}", "evaluation.split=validation"]
            overrides += [f"data.max_{split}_rows={count}" for split, count in ROWS.items()]
            if name == SIZE:
                overrides += [
                    f"variants.xxl.model.name={base}",
                    "validation.patience=3",
                    "optimizer.learning_rate=1e-2",
                ]
            done[name] = compare(load_recipe(name, overrides), place / name), place / name
    return done


def test_they_run_at_a_small_size(finished: dict[str, tuple[dict[str, Any], Path]]) -> None:
    for name, (results, out) in finished.items():
        recipe = load_recipe(name)
        assert results["failures"] == {} and results["published"] == recipe.published != {}
        for variant in recipe.variants:
            record = read_record(out / variant)
            assert record["lengths"] == read_record(out / next(iter(recipe.variants)))["lengths"]
            assert record["proof"]["reloaded_equal"]
        table = (out / "table.md").read_text()
        assert all(f"{figures['rouge1']:.2f}" in table for figures in recipe.published.values())


def test_the_metric_after_every_epoch_is_a_table_and_a_picture_with_the_best_marked(
    finished: dict[str, tuple[dict[str, Any], Path]],
) -> None:
    results, out = finished[SIZE]
    text = report(results)
    table = text[text.rindex("After each epoch") :]
    assert text.count("After each epoch (* best)") == 2, "loss, and the first score"
    assert (out / "epochs.png").stat().st_size > 1000
    for variant in ("xl", "xxl"):
        lines = results["epochs"][variant]
        best, kept = best_of(lines, "rouge1"), read_record(out / variant)["validation"]
        assert best is not None and kept["kept_step"] == best["step"]
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        assert f"{best['rouge1']:.2f}*" in table
    published = load_recipe(SIZE).published_epochs
    shown = max(len(results["epochs"][variant]) for variant in published)
    for figures in published.values():
        assert all(f"{figure:.2f}" in table for figure in figures["rouge1"][:shown])
    assert [max(figures["rouge1"]) for figures in published.values()] == [54.05, 53.17]


def test_it_stops_early_where_it_is_told_to(finished: dict[str, tuple[dict[str, Any], Path]]) -> None:
    _, out = finished[SIZE]
    records = [read_record(out / variant)["validation"] for variant in ("xl", "xxl")]
    for record in records:
        measured = [line["rouge1"] for line in record["validations"]]
        since = len(measured) - 1 - measured.index(max(measured))
        assert record["stopped_early"] is (since == 3 and len(measured) < 10)
    assert any(record["stopped_early"] for record in records)


def test_the_first_step_stands_predicted_beside_measured(finished: dict[str, tuple[dict[str, Any], Path]]) -> None:
    for results, out in finished.values():
        text, stored = report(results), json.loads((out / "results.json").read_text())
        assert "first step: predicted" in text and "first step: predicted" in (out / "table.md").read_text()
        assert max(map(len, text.splitlines())) <= 80
        for row in stored["rows"]:
            if row["method"] == "floor":
                continue
            found = row["predicted"]
            assert found["trainable"][0] == found["trainable"][1] == row["trainable"]
            assert found["flops"][0] == found["flops"][1] == row["flops"]
            assert found["peak_bytes"][0] == pytest.approx(found["peak_bytes"][1], rel=0.15)


def test_what_was_not_trained_has_no_prediction(workshop: Path, tmp_path: Path) -> None:
    recipe = load_recipe(workshop / "tiny.yaml")
    assert predicted_and_measured(recipe, {}, tmp_path) is None
    (tmp_path / "first_step.json").write_text('{"flops": 1, "peak_bytes": 1, "batches": []}')
    assert predicted_and_measured(recipe, {"dtype": "float32", "device": "cpu"}, tmp_path) is None
