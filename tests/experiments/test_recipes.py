"""The recipes of the published experiments, each from its first line to its table: the real data, a tiny base, a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loralab.config.loading import load_recipe
from loralab.experiments.compare import compare
from loralab.reports.summary import remarks, report
from loralab.runs.record import read_lines, read_record

# recipe -> its data, and what makes it small
EXPERIMENTS = {
    "t5-small-xsum": ("xsum", ["data.max_source_length=96", "data.max_target_length=32"]),
    "flan-t5-base-dialogsum": ("dialogsum", ["data.max_source_length=160", "data.max_target_length=32"]),
    "flan-t5-xl-samsum-lr": ("samsum", ["optimizer.warmup_steps=10", "training.epochs=2"]),
}
ROWS = 24


@pytest.fixture(scope="module", params=EXPERIMENTS)
def experiment(
    request: pytest.FixtureRequest, workshop: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], Path]:
    """(the recipe's name, results, the comparison's folder)"""
    data, small = EXPERIMENTS[request.param]
    overrides = [f"model.name={workshop / 'base'}", "model.dtype=float32", f"data.name={data_folder / data}"]
    overrides += [f"data.max_train_rows={ROWS}", "data.max_validation_rows=6", "evaluation.split=validation", *small]
    out = tmp_path_factory.mktemp("experiments") / request.param
    return request.param, compare(load_recipe(request.param, [*overrides, "evaluation.max_new_tokens=6"]), out), out


def test_every_variant_is_trained_scored_and_told(experiment: tuple[str, dict[str, Any], Path]) -> None:
    name, results, out = experiment
    recipe = load_recipe(name, [])
    variants = [row["variant"] for row in results["rows"] if row["method"] != "floor"]
    assert variants == list(recipe.variants) and results["failures"] == {}
    for row in results["rows"]:
        figures = row["metrics"]["rouge2"]
        assert 0 <= figures["low"] <= figures["value"] <= figures["high"] <= 100
        assert ("loss" in row["metrics"]) is (row["method"] != "floor")
    for variant in variants:
        record = read_record(out / variant)
        trained = recipe.variant(variant).training.method != "none"
        assert len(read_lines(out / variant / "predictions.jsonl")) == 6
        assert (out / variant / "metrics.jsonl").exists() is trained
        assert not trained or record["proof"]["reloaded_equal"]
    text = report(results)
    assert all(variant in text for variant in variants) and max(map(len, text.splitlines())) <= 80
    assert {"table.md", "table.tex", "samples.md", "results.json", "losses.png"} <= {
        file.name for file in out.iterdir()
    }


def test_published_figures_stand_beside_ours(experiment: tuple[str, dict[str, Any], Path]) -> None:
    name, results, out = experiment
    published = load_recipe(name, []).published
    assert results["published"] == published and published
    table = (out / "table.md").read_text()
    assert all(f"{figures['rouge1']:.2f}" in table for figures in published.values())
    if name == "t5-small-xsum":
        said = " ".join(remarks(results))
        assert "over 100 times too low" in said and "full 373.8" in said and "rank 8 factored 267.9" in said
        assert "2.45" in table and "1.85" in table, "compute and memory as published"
