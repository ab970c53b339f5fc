"""A comparison with everything in it: two seeds, a variant that starts from another, a pilot, one that fails, and a second
life with a changed recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from workshop import loralab

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.errors import AdapterError, RecipeError, RunError
from loralab.evaluation.scores import read_scores
from loralab.experiments.compare import compare
from loralab.experiments.variants import plan_runs
from loralab.on_torch.engine import open_engine
from loralab.reports.summary import report
from loralab.runs.record import read_lines, read_record
from loralab.training.starting_point import starting_point

VARIANTS = {
    "base": {"training.method": "none"},
    "later": {"training.start_from": "lora"},
    "lora": {},
    "piloted": {"training.method": "full", "optimizer.learning_rate": "pilot", "training.seed": 1},
    "broken": {"training.method": "lora", "lora.rules": ["nothing"], "training.seed": 1},
    "after-broken": {"training.start_from": "broken", "training.seed": 1},
}
SETTINGS = [
    "training.seed=[1, 2]", "training.epochs=2", "data.max_train_rows=40", "validation.metrics=[rouge]", "lora.dropout=0.1",
    f"variants={json.dumps(VARIANTS)}", "published={}",
]  # fmt: skip


def recipe(workshop: Path, *overrides: str) -> Recipe:
    return load_recipe(workshop / "tiny.yaml", [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def everything(workshop: Path) -> tuple[dict[str, Any], Path]:
    out = workshop / "everything"
    done = loralab(workshop, "compare", "tiny.yaml", *SETTINGS, "--json", "--out", "everything", code=1)
    return json.loads(done.stdout), out


def row_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["variant"] == name)


def test_seeds_are_runs_of_their_own_and_their_mean_is_shown(everything: tuple[dict[str, Any], Path]) -> None:
    results, out = everything
    row = row_of(results, "lora")
    assert row["seeds"] == [1, 2] and row_of(results, "base")["seeds"] == [1], "a base that is not trained has one"
    records = [read_record(out / f"lora/seed-{seed}") for seed in (1, 2)]
    losses = [record["metrics"]["loss"]["value"] for record in records]
    assert losses[0] != losses[1] and row["metrics"]["loss"]["value"] == pytest.approx(sum(losses) / 2)
    assert row["metrics"]["loss"]["low"] < min(losses) and max(losses) < row["metrics"]["loss"]["high"]
    assert row["seconds"] == pytest.approx(sum(record["seconds"] for record in records) / 2)


def test_a_variant_goes_on_from_another_of_its_own_seed(everything: tuple[dict[str, Any], Path]) -> None:
    results, out = everything
    for seed in (1, 2):
        before, after = (read_lines(out / f"{name}/seed-{seed}/metrics.jsonl") for name in ("lora", "later"))
        assert after[0]["loss"] < before[0]["loss"] - 0.05, "the second training begins where the first has led"
    assert row_of(results, "later")["seconds_before"] == pytest.approx(row_of(results, "lora")["seconds"])


def test_a_pilot_chooses_on_rows_that_are_not_reported(everything: tuple[dict[str, Any], Path]) -> None:
    results, out = everything
    pilot = row_of(results, "piloted")["pilot"]
    losses = {point["learning_rate"]: point["loss"] for point in pilot["points"]}
    assert len(losses) >= 5 and pilot["chosen"] == min(losses, key=lambda rate: losses[rate])
    record = read_record(out / "piloted")
    assert (record["validation"]["split"], record["validation"]["held_out"]) == ("train", 4)
    assert max(line["learning_rate"] for line in read_lines(out / "piloted/metrics.jsonl")) == pilot["chosen"]


def test_the_pilot_leaves_no_trace_in_the_training(everything: tuple[dict[str, Any], Path], workshop: Path) -> None:
    """The same rate given by hand, on the same rows: the same steps, bit for bit."""
    _, out = everything
    chosen = read_record(out / "piloted")["pilot"]["chosen"]
    settings = ["training.method=full", "training.seed=1", f"optimizer.learning_rate={chosen}", "validation.keep=best"]
    loralab(
        workshop,
        "train",
        "tiny.yaml",
        *(each for each in SETTINGS[1:] if not each.startswith("lora.")),
        *settings,
        "--out",
        "by-hand",
    )
    first, second = (
        [(line["loss"], line["grad_norm"]) for line in read_lines(run / "metrics.jsonl")]
        for run in (out / "piloted", workshop / "by-hand")
    )
    assert first == second


def test_failures_are_told_and_the_others_kept(everything: tuple[dict[str, Any], Path]) -> None:
    results, _ = everything
    assert results["failures"] == {
        "broken": "exit code 2, see above",
        "after-broken": "it starts from broken, which failed",
    }
    assert row_of(results, "broken")["failed"] and row_of(results, "after-broken")["failed"]
    assert {row["variant"] for row in results["rows"] if row["metrics"]} >= {"base", "lora", "later", "piloted"}


def test_the_files_for_people(everything: tuple[dict[str, Any], Path]) -> None:
    results, out = everything
    for picture in ("losses", "epochs", "cost", "pilot"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    samples = (out / "samples.md").read_text()
    predictions = read_lines(out / "lora/seed-1/predictions.jsonl")
    assert samples.count("## Row") == len({row["source"] for row in predictions})
    assert all("\n    " + row["references"][0].splitlines()[0] in samples for row in predictions)
    table = (out / "table.tex").read_text()
    assert table.count(r"\\") == len(results["rows"]) + 1 and r"p$<$.001" in table
    text = report(results)
    assert max(map(len, text.splitlines())) <= 80 and text.count("reference ") >= 3
    assert "lora/seed-1" not in text and "mean of 2 seeds" in text


def test_going_on_runs_only_what_has_changed(everything: tuple[dict[str, Any], Path], workshop: Path) -> None:
    """A new rate for one variant: it is trained anew, and what starts from it; the others stay, byte for byte."""
    _, out = everything
    kept = {path: path.stat().st_mtime_ns for name in ("base", "piloted") for path in out.glob(f"{name}/**/*.json*")}
    runs = plan_runs(recipe(workshop, "variants.lora.optimizer.learning_rate=2e-3"), out)
    states = {run.name: run.state for run in runs}
    assert (
        states["lora/seed-1"] == "changed"
        and states["later/seed-1"] == states["base"] == states["piloted"] == "finished"
    )
    changed = [*SETTINGS, "variants.lora.optimizer.learning_rate=2e-3", "--out", "everything", "--resume", "--json"]
    results = json.loads(loralab(workshop, "compare", "tiny.yaml", *changed, code=1).stdout)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name for path in (out / "replaced").iterdir()) == [
        f"{name}-seed-{seed}-1" for name in ("later", "lora") for seed in (1, 2)
    ]
    rates = {line["learning_rate"] for line in read_lines(out / "lora/seed-1/metrics.jsonl")}
    assert max(rates) == 2e-3 and row_of(results, "lora")["metrics"]
    old, new = (read_scores(place).values["loss"] for place in (out / "replaced/later-seed-1-1", out / "later/seed-1"))
    assert (old != new).any()


def test_the_order_of_variants_and_what_cannot_be(workshop: Path) -> None:
    order = list(dict.fromkeys(run.variant for run in plan_runs(recipe(workshop), Path("out"))))
    assert order.index("lora") < order.index("later") and order.index("broken") < order.index("after-broken")
    for overrides, message in (
        (["variants.lora.training.start_from=later"], "lora.* start from one another in a circle"),
        (["variants.replaced={}"], "cannot be called 'replaced'"),
        (["variants.later.training.start_from=lorra"], "neither a variant nor a folder.*lora"),
        (
            ["variants.later.training.seed=7"],
            r"later with seed 7 starts from lora, which is run with the seeds \[1, 2\]",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            compare(recipe(workshop, *overrides), workshop / "never")
    assert not (workshop / "never").exists()


def test_what_a_training_cannot_start_from(everything: tuple[dict[str, Any], Path], workshop: Path) -> None:
    _, out = everything
    with pytest.raises(RunError, match="has trained nothing"):
        starting_point(load_recipe(workshop / "tiny.yaml", [f"training.start_from={out / 'base'}"]))
    for override, message in (("lora.rules=[q]", "differ in"), ("lora.alpha=16", "has rank 4 and scale 2")):
        with pytest.raises(AdapterError, match=message):
            open_engine(load_recipe(workshop / "tiny.yaml", [override]), None, out / "lora/seed-1/adapter")
    full, adapter = starting_point(load_recipe(workshop / "tiny.yaml", [f"training.start_from={out / 'piloted'}"]))
    assert adapter is None and full.model.name == str(out / "piloted/model"), (
        "a model that was trained whole is the base"
    )


def test_a_list_of_seeds_is_for_compare(workshop: Path) -> None:
    done = loralab(workshop, "train", "tiny.yaml", "training.seed=[1, 2]", code=2)
    assert "training.seed is the list [1, 2]. A training has one" in done.stderr
