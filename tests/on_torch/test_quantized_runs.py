"""Runs on an int8 base: training, its proof, going on, the best checkpoint, answers from the adapter alone, scores, merging."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dying import train_until
from safetensors.torch import load_file

from loralab import UserError, load_model
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.errors import MissingExtra
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved, merge_saved, open_trained
from loralab.on_torch.adapters.base import quantized_modules
from loralab.runs.find_saved_model import find_saved_model
from loralab.runs.record import read_lines
from loralab.training.train import train

FEW = ["model.quantize=int8", "data.max_train_rows=16", "training.save_every=2", "lora.dropout=0.1"]
FEW += ["validation.every=3", "validation.rows=4", "validation.keep=best", "optimizer.learning_rate=0.3"]


@pytest.fixture(scope="module")
def recipe(workshop: Path) -> Recipe:
    return load_recipe(workshop / "tiny.yaml", FEW)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rate that is far too high, so that the best checkpoint is not the last."""
    folder, record = train(recipe, tmp_path_factory.mktemp("int8") / "run")
    assert record["quantize"] == "int8" and record["proof"] == {
        "reloaded_equal": True, "merged_error": None, "merged_tolerance": None
    }  # fmt: skip
    return folder


def test_the_best_checkpoint_is_what_is_kept_and_scored(run: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    validation = record["validation"]
    assert validation["kept_step"] == validation["best"]["step"] < record["steps"]
    assert evaluate_saved(run, [], None)["metrics"] == record["metrics"]


def test_the_adapter_alone_gives_the_trained_models_answers(run: Path) -> None:
    recipe, saved = find_saved_model(run / "adapter", [], None)
    assert recipe.model.quantize == "int8" and saved == run / "adapter"
    rows = read_lines(run / "predictions.jsonl")
    result, _ = run_request(run / "adapter", GenerateRequest(texts=[row["source"] for row in rows]), [], None)
    assert result["answers"] == [row["prediction"] for row in rows]


def test_a_run_that_died_ends_as_if_it_had_not(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    train_until(5, recipe, tmp_path / "died")
    train(recipe, tmp_path / "died", resume=True)
    one, other = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, tmp_path / "died"))
    assert all((one[name] == other[name]).all() for name in one) and list(one) == list(other)
    assert read_lines(run / "predictions.jsonl") == read_lines(tmp_path / "died/predictions.jsonl")


def test_on_a_base_stored_otherwise_it_works_and_the_difference_is_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounded, plain = (evaluate_saved(run, [*extra], None)["metrics"]["loss"] for extra in ([], ["model.quantize=null"]))
    told = capsys.readouterr().err
    assert (
        told.count("The adapter was trained on a base that was stored as int8, and this one is stored as float32") == 1
    )
    assert rounded["value"] != plain["value"] and abs(rounded["value"] / plain["value"] - 1) < 0.05


def test_a_sample_greedy_and_drawn_from_the_adapter_alone(run: Path, workshop: Path) -> None:
    def ask(seed: int) -> tuple[dict[str, object], str]:
        question = GenerateRequest(sample="validation", seed=seed)
        result, words = run_request(run / "adapter", question, [], None, top_p=0.9)
        assert words is not None
        return result, words

    first, words = ask(7)
    assert ask(7) == (first, words)
    rows = {first["row"], *(ask(seed)[0]["row"] for seed in (1, 2))}
    assert len(rows) > 1, "another seed, another row"
    trained = {(row["source"], row["prediction"]) for row in read_lines(run / "predictions.jsonl")}
    assert (first["source"], first["greedy"]) in trained
    for part in ("Source:", "Reference:", "Greedy:", "Prediction:"):
        assert f"\n\n{part}\n" in words
    with pytest.raises(UserError, match="--seed changes nothing"):
        run_request(run, GenerateRequest(texts=["a"], seed=7), [], None)


def test_merged_into_the_original_weights(run: Path, workshop: Path, tmp_path: Path) -> None:
    merge_saved(run, tmp_path / "merged", None)
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", workshop / "base"))
    changed = {name.split(".")[-2] for name in base if not (merged[name] == base[name]).all()}
    assert changed == {"q", "v"} and list(merged) == list(base)
    model, _ = load_model(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert not quantized_modules(model)


def test_at_inference_nothing_is_prepared_for_training(run: Path) -> None:
    engine = open_trained(*find_saved_model(run, [], None))
    model = engine.model  # type: ignore[attr-defined]
    assert not model.training and quantized_modules(model)
    norms = {parameter.dtype for name, parameter in model.named_parameters() if "layer_norm" in name}
    assert norms == {model.shared.weight.dtype}, "norms stay in the compute dtype"
    base, _ = load_model(engine.recipe.model.name, "float32", "cpu", "int8")  # type: ignore[attr-defined]
    engine.adapter.disable()  # type: ignore[attr-defined]
    kept, fresh = model.state_dict(), base.state_dict()
    for name, tensor in fresh.items():
        place = name if name in kept else ".".join([*name.split(".")[:-1], "base", name.split(".")[-1]])
        assert (kept[place] == tensor).all()


@pytest.mark.parametrize("method", ["lora", "head"])
def test_classifiers_on_a_packed_base(method: str, bases: Path, tmp_path: Path) -> None:
    overrides = ["model.quantize=int8", f"training.method={method}", "training.epochs=1"]
    folder, record = train(load_recipe(bases / "bert.yaml", overrides), tmp_path / "run")
    assert record["proof"]["reloaded_equal"] and record["proof"]["merged_error"] is None
    assert evaluate_saved(folder, [], None)["metrics"] == record["metrics"]


def test_without_bitsandbytes_no_run_begins(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    no_rows = recipe.model_copy(update={"data": recipe.data.model_copy(update={"name": str(tmp_path / "none")})})
    with pytest.raises(MissingExtra, match=r"loralab\[quantize\]"):  # not that there are no rows: it comes first
        train(no_rows, tmp_path / "run")
    assert not (tmp_path / "run").exists()
