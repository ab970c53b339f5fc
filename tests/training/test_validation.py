"""Measuring while training: that it changes nothing, what it measures, the best weights, early stopping, and data without the split."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.loading import load_recipe
from loralab.config.recipe import ValidationSettings
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.data.tokenization import encode
from loralab.data.training_rows import read_training_rows
from loralab.errors import RecipeError, Stopped
from loralab.inference.saved_model import evaluate_saved
from loralab.on_torch.engine import open_engine
from loralab.runs.record import read_lines
from loralab.runs.validation_lines import best_of
from loralab.training.loop import run_steps
from loralab.training.train import train
from loralab.training.validation import Validator, epochs_done, make_validator, read_choosing_rows, run_out

QUICK = ["training.epochs=1", "training.method=lora", "lora.dropout=0.1"]


def trained(workshop: Path, out: Path, *overrides: str) -> dict[str, Any]:
    """The record of a short run."""
    return train(load_recipe(workshop / "tiny.yaml", [*QUICK, *overrides]), out)[1]


def weights(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def steps(run: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def watched(workshop: Path) -> tuple[Path, dict[str, Any]]:
    """A run that is measured often, on every row that its report is of."""
    run = workshop / "watched"
    return run, trained(workshop, run, "validation.every=5", "validation.metrics=[rouge]", "validation.rows=null")


def test_training_goes_on_as_if_nothing_had_been_measured(watched: tuple[Path, dict[str, Any]], workshop: Path) -> None:
    record = trained(workshop, workshop / "unwatched", "validation.every=null")
    assert weights(watched[0]) == weights(workshop / "unwatched") and steps(watched[0]) == steps(workshop / "unwatched")
    assert record["validation"] is None and not (workshop / "unwatched/validation.jsonl").exists()
    assert len(watched[1]["validation"]["validations"]) > 3


def test_what_is_drawn_aside_is_not_missed(workshop: Path) -> None:
    engine = open_engine(load_recipe(workshop / "tiny.yaml"))
    torch.manual_seed(0)
    expected = torch.rand(5)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError), engine.preserve_rng():
        torch.rand(3)
        raise RuntimeError("a measurement that is broken off")
    assert torch.equal(torch.rand(5), expected)


def test_the_last_validation_is_the_report_where_the_rows_are_the_same(watched: tuple[Path, dict[str, Any]]) -> None:
    run, record = watched
    lines = read_lines(run / "validation.jsonl")
    assert lines == record["validation"]["validations"] and lines[-1]["step"] == record["steps"]
    for name in ("loss", "rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert lines[-1][name] == pytest.approx(record["metrics"][name]["value"], rel=1e-12)
    assert [line["step"] for line in lines] == [*range(5, record["steps"], 5), record["steps"]]
    assert lines[-1]["epoch"] == 1 and lines[0]["epoch"] == pytest.approx(5 / record["steps"], abs=5e-5)  # four digits
    assert record["validation"]["held_out"] == 0 and record["validation"]["stopped_early"] is False


def test_the_best_weights_are_those_that_are_kept(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six rows are soon learnt by heart; what is saved, proven and reported is the model of the best validation."""
    wild = ["data.max_train_rows=6", "training.epochs=12", "optimizer.learning_rate=0.1", "optimizer.schedule=constant"]
    wild += ["validation.rows=null", "evaluation.split=train"]
    record = trained(workshop, workshop / "best", *wild, "validation.keep=best")
    told, lines = capsys.readouterr().err, record["validation"]["validations"]
    best = min(lines, key=lambda line: line["loss"])
    assert best["step"] < record["steps"] and lines[-1]["loss"] > best["loss"] + 0.1, "else this shows nothing"
    assert record["validation"]["best"] == {"step": best["step"], "value": best["loss"]}
    assert record["validation"]["kept_step"] == best["step"]
    measured = evaluate_saved(workshop / "best", ["evaluation.split=validation"], None)["metrics"]
    assert measured["loss"]["value"] == pytest.approx(best["loss"], rel=1e-12)
    assert record["proof"]["reloaded_equal"] and f"The weights are those of step {best['step']}" in told

    stopped = trained(workshop, workshop / "patient", *wild, "validation.patience=3")["validation"]
    losses = [line["loss"] for line in lines]
    since_best = [i - int(np.argmin(losses[: i + 1])) for i in range(len(losses))]
    expected = since_best.index(3)
    assert stopped["stopped_early"] and stopped["kept_step"] == stopped["validations"][-1]["step"]
    assert [line["loss"] for line in stopped["validations"]] == [line["loss"] for line in lines[: expected + 1]]
    assert len(steps(workshop / "patient")) == lines[expected]["step"] < record["steps"]


@pytest.mark.parametrize("when", ["validating", "after"])
def test_a_stop_while_measuring_measures_again(when: str, workshop: Path, tmp_path: Path) -> None:
    """Ctrl-C does not wait for a long validation; going on ends as if it had not been pressed."""
    recipe = load_recipe(
        workshop / "tiny.yaml",
        [*QUICK, "data.max_train_rows=12", "validation.every=2", "validation.keep=best", "training.save_every=100"],
    )
    rows = read_training_rows(recipe)
    choosing = read_choosing_rows(recipe, len(rows))

    def course(out: Path, make: Callable[..., Validator]) -> Any:
        engine = open_engine(recipe)
        encoded = encode(rows, engine.tokenizer, Prompt(recipe.data.prompt, recipe.data.source), 160, 24)
        validator = make_validator(recipe, choosing, engine, (160, 24))
        assert validator is not None
        done = run_steps(engine, recipe, encoded, out, make(**vars(validator)))
        return engine.optimizer.state(), [{**line, "seconds": 0} for line in done.validations]

    class Interrupted(Validator):
        def measure(self, engine: Any, check: Callable[[], None]) -> dict[str, Any]:
            if engine.optimizer.adamw.state and (times.append(1) or len(times)) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().measure(engine, check if when == "validating" else lambda: None)

    times: list[int] = []
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for folder in (whole, halved):
        folder.mkdir()
    expected = course(whole, Validator)
    with pytest.raises(Stopped, match="Stopped after step"):
        course(halved, Interrupted)
    assert len(read_lines(halved / "validation.jsonl")) == (1 if when == "validating" else 2)
    state, validations = course(halved, Validator)
    assert validations == expected[1] and steps(whole) == steps(halved)
    assert state.keys() == expected[0].keys()
    assert all(state[name].equal(tensor) for name, tensor in expected[0].items())


def test_data_without_the_split_is_trained_on_all_the_same(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(workshop / "data/train.jsonl", tmp_path / "train.jsonl")
    here = [f"data.name={tmp_path}", "evaluation.split=train"]
    assert read_choosing_rows(load_recipe(workshop / "tiny.yaml", here), 60) is None
    assert "has no split 'validation': nothing is measured while training" in capsys.readouterr().err
    for setting, word in (("keep=best", "keep: best"), ("patience=3", "patience: 3")):
        recipe = load_recipe(workshop / "tiny.yaml", [*here, f"validation.{setting}"])
        held_out = read_choosing_rows(recipe, 60)
        assert held_out is not None and held_out.held_out == 6
        assert f"validation.{word}: the split 'validation' is not there, so the first 6" in capsys.readouterr().err
        with pytest.raises(RecipeError, match="9 training rows are too few to hold out a tenth"):
            read_choosing_rows(recipe, 9)
    variant = ["validation.keep=best", "variants={zero-shot: {training.method: none}}", "published={}"]
    untrained = load_recipe(workshop / "tiny.yaml", [*here, *variant]).variant("zero-shot")
    assert read_choosing_rows(untrained, 60) is None, "zero-shot inherits the block and has no use for it"


def test_the_sample_is_the_first_rows(workshop: Path) -> None:
    whole = read_split(load_recipe(workshop / "tiny.yaml").data, "validation")
    for override, count in (("validation.rows=3", 3), ("data.max_validation_rows=2", 2), ("validation.rows=null", 12)):
        choosing = read_choosing_rows(load_recipe(workshop / "tiny.yaml", [override]), 60)
        assert choosing is not None and choosing.rows.examples == whole.examples[:count]


def test_rows_that_choose_are_never_those_reported(workshop: Path) -> None:
    """The report is on the validation split: the first training rows choose, and are not trained on."""
    record = trained(workshop, workshop / "held-out", "data.max_train_rows=40", "validation.keep=best")
    chosen, told = record["validation"], record["trained_on"]
    assert (chosen["split"], chosen["rows"], chosen["held_out"]) == ("train", 4, 4)
    assert (told["split"], told["rows"], record["evaluated"]["split"]) == ("train", 36, "validation")


def lines(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss, "rouge1": loss} for step, loss in enumerate(losses, 1)]


def test_which_is_the_best() -> None:
    assert best_of(lines(3.0, 1.0, None, 2.0), "loss") == {"step": 2, "loss": 1.0, "rouge1": 1.0}
    assert best_of(lines(3.0, 1.0, None, 3.0), "rouge1") == {"step": 1, "loss": 3.0, "rouge1": 3.0}, (
        "the first of equals"
    )
    assert best_of(lines(None), "loss") is None and best_of([], "loss") is None


@pytest.mark.parametrize(
    ("losses", "stops"),
    [((), False), ((3, 2, 1), False), ((1, 2), False), ((1, 2, 3), True), ((1, 1, 1), True), ((None, None), True)],
)
def test_patience_is_counted_from_the_best(losses: tuple[float | None, ...], stops: bool) -> None:
    assert run_out(lines(*losses), ValidationSettings(patience=2)) is stops
    assert not run_out(lines(*losses), ValidationSettings())


def test_epochs_are_counted_in_steps() -> None:
    ends = [4, 10]
    assert [epochs_done(step, ends) for step in (0, 1, 4, 7, 10)] == [0, 0.25, 1, 1.5, 2]
    due = {every: Validator(ValidationSettings(every=every), None, None, 1, None).due for every in ("epoch", 3)}  # type: ignore[arg-type]
    assert [step for step in range(11) if due["epoch"](step, ends, [], step == 10)] == ends
    assert [step for step in range(11) if due[3](step, ends, [], step == 10)] == [3, 6, 9, 10]
    assert not due[3](6, ends, [{"step": 6}], False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.metric=rouge2", "the metric 'rouge2' is not measured. Add rouge to validation.metrics."),
        ("validation.metric=los", "the metric 'los' is not measured. Did you mean 'loss'?"),
        ("validation.metrics=[rogue]", "unknown metric 'rogue'. Did you mean 'rouge'?"),
        ("validation.every=0", "validation.every: expected 'epoch' or greater than 0"),
        ("validation.evry=5", "validation.evry: unknown key. Did you mean 'every'?"),
        ("training.trackers=[tensorbord]", "expected 'tensorboard' or 'wandb'"),
    ],
)
def test_mistakes_in_the_block(override: str, message: str, workshop: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(workshop / "tiny.yaml", [override])
    assert message in str(caught.value)


def test_what_is_neither_better_nor_worse_chooses_nothing(workshop: Path) -> None:
    with pytest.raises(RecipeError, match="of 'length_ratio' neither more nor less is better"):
        load_recipe(workshop / "tiny.yaml", ["validation.metrics=[length]", "validation.metric=length_ratio"])


@pytest.mark.parametrize("setting", ["keep=best", "patience=2"])
def test_choosing_needs_validations(setting: str, workshop: Path) -> None:
    with pytest.raises(RecipeError, match="needs validations, but every is null"):
        load_recipe(workshop / "tiny.yaml", ["validation.every=null", f"validation.{setting}"])
    load_recipe(
        workshop / "tiny.yaml", ["validation.metrics=[rouge]", "validation.metric=rouge2", "validation.keep=best"]
    )
