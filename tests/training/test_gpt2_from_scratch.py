"""A GPT-2 from random weights: how its weights begin, its tokenizer, and a run on packed texts with its resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import train_until
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig

import loralab.experiments.run_variants
from loralab import load_model
from loralab.builtin_data import corpus, documentation
from loralab.config.loading import load_recipe, recipe_from_tree
from loralab.config.model import ModelSizes
from loralab.config.recipe import Recipe
from loralab.config.training import OptimizerSettings
from loralab.data.sequence_packing import encode_packed
from loralab.data.splits import read_split
from loralab.data.tokenizer_training import GPT2 as GPT2_TOKENS
from loralab.data.tokenizer_training import train_tokenizer
from loralab.errors import DataError, RecipeError
from loralab.evaluation.scores import read_scores
from loralab.evaluation.scores_in_words import run_summary
from loralab.experiments.compare import compare
from loralab.metrics.compression import AFTER, ALONE
from loralab.models.gpt2 import SIZES, config_json, deviation, new_config
from loralab.on_torch.engine import open_engine
from loralab.on_torch.loading.random_init import write_model
from loralab.on_torch.training.optimizer import Optimizer
from loralab.reports.summary import report
from loralab.runs.record import read_lines
from loralab.training.train import train

SMALL = {"d_model": 32, "layers": 2, "heads": 2, "positions": 96}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"][:3000] for row in corpus.rows("test")[:8]]


# Sizes and weights


def test_sizes_make_a_config() -> None:
    config = new_config("gpt2", ModelSizes(**SMALL, d_ff=80), 640, 3, 4, None)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions, config.inner) == (32, 2, 2, 96, 80)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (640, 3, 4)
    for name, published in SIZES.items():
        assert new_config(f"openai-community/{name}", None, 50257, 50256, 50256, None) == published
    for sizes, message in (
        (SMALL | {"heads": 5}, "heads 5 does not divide model.sizes.d_model 32"),
        (SMALL | {"d_kv": 8}, r"model\.sizes\.d_kv is for T5"),
    ):
        with pytest.raises(RecipeError, match=message):
            new_config("gpt2", ModelSizes(**sizes), 640, 0, 0, None)
    with pytest.raises(RecipeError, match="Did you mean 'gpt2-medium'"):
        new_config("gpt2-mediun", None, 640, 0, 0, None)


def test_weights_begin_as_in_transformers(tmp_path: Path) -> None:
    config = new_config("gpt2", ModelSizes(d_model=128, layers=3, heads=4, positions=256), 1024, 0, 0, None)
    write_model(config, 3, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(TheirConfig(**config_json(config))).state_dict()
    assert set(ours) == set(theirs) - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        spread = deviation(name, config)
        if spread is None:
            assert torch.equal(tensor, theirs[name])
            continue
        error = 5 * spread / np.sqrt(2 * tensor.numel())  # 5 deviations of a sample's deviation
        assert abs(float(tensor.std()) - spread) < error and abs(float(theirs[name].std()) - spread) < error, name
    write_model(config, 3, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_tokenizer_is_gpt2_s_in_shape_and_loses_nothing(texts: list[str], tmp_path: Path) -> None:
    train_tokenizer(texts, 512, tmp_path, GPT2_TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 512 and tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    for text in [*texts, "  two  spaces\t\r\n\n ü 漢字 🙂 \x00 '''"]:
        ids = tokenizer(text)["input_ids"]
        assert 0 not in ids and tokenizer.decode(ids) == text
    with pytest.raises(RecipeError, match=r"must be at least 257: 256 bytes, 1 special token and 0 sentinels"):
        train_tokenizer(texts, 200, tmp_path, GPT2_TOKENS)
    with pytest.raises(DataError, match=r"model\.vocabulary asks for 9000"):
        train_tokenizer(["too little"], 9000, tmp_path, GPT2_TOKENS)


def test_decay_is_of_matrices_alone(tmp_path: Path) -> None:
    """Biases, norms and embeddings move only by their gradient, here none; a matrix shrinks by rate times decay."""
    write_model(new_config("gpt2", ModelSizes(**SMALL), 640, 0, 0, None), 0, tmp_path)
    train_tokenizer(["a b c " * 50], 258, tmp_path, GPT2_TOKENS)
    model, _ = load_model(str(tmp_path), dtype="float32", device="cpu")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    optimizer = Optimizer(list(model.parameters()), [], OptimizerSettings(weight_decay=0.5), embeddings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    decayed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    assert decayed == {name for name in before if name.endswith(matrices)}
    for name in decayed:
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * (1 - 0.1 * 0.5))


# A run


@pytest.fixture
def settings(texts: list[str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "texts").mkdir()
    for split, part in (("train", texts[:5]), ("validation", [*texts[5:7], "x = 1"]), ("test", texts[7:])):
        (tmp_path / f"texts/{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return {
        "name": "tiny",
        "model": {
            "name": "gpt2", "init": "random", "sizes": SMALL, "tokenizer": "train", "vocabulary": 512,
            "dtype": "float32", "device": "cpu",
        },
        "data": {"name": str(tmp_path / "texts"), "source": None, "target": "text", "packing": True, "max_target_length": 64},
        "training": {"method": "full", "epochs": 3, "tokens_per_batch": 512, "save_every": 4},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 3, "schedule": "cosine"},
        "validation": {"every": 6, "samples": 2},
        "evaluation": {"split": "validation", "max_new_tokens": 8, "sample": True, "top_k": 20},
    }  # fmt: skip


def recipe(settings: dict[str, Any], *overrides: str) -> Recipe:
    return recipe_from_tree(settings, overrides, "here")


def test_a_run_from_nothing_learns_counts_bytes_and_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, record = train(recipe(settings), tmp_path / "whole")
    lines, validations = read_lines(whole / "metrics.jsonl"), read_lines(whole / "validation.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(512), abs=0.3), "at first every token is as likely as another"
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[0]["loss"] - 0.5
    assert record["proof"]["reloaded_equal"]

    texts = [json.loads(line)["text"] for line in (tmp_path / "texts/validation.jsonl").read_text().splitlines()]
    num_bytes = sum(len(text.encode()) for text in texts)
    rows = read_lines(whole / "predictions.jsonl")
    assert sum(row["bytes"] for row in rows) == pytest.approx(num_bytes) and {row["row"] for row in rows} == {1, 2, 3}
    nats, tokens = sum(row["loss"] * row["target_tokens"] for row in rows), sum(row["target_tokens"] for row in rows)
    bits = record["metrics"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5) and bits["low"] < bits["value"]
    assert record["metrics"]["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    assert validations[-1]["bits_per_byte"] == pytest.approx(bits["value"]), "the same texts"
    assert read_scores(whole).summary()["bits_per_byte"]["value"] == pytest.approx(bits["value"], rel=1e-5)
    assert set(record["floors"]) == {AFTER, ALONE} and AFTER in run_summary(record)

    samples = read_lines(whole / "samples.jsonl")
    assert [line["step"] for line in samples] == [step for line in validations for step in [line["step"]] * 2]
    assert (
        texts[0].startswith(samples[0]["prompt"]) and samples[0]["prompt"] and samples[-1]["text"] != samples[1]["text"]
    )

    train_until(10, recipe(settings), tmp_path / "killed")
    killed, again = train(recipe(settings), tmp_path / "killed", resume=True)
    for file in ("model/model.safetensors", "model/tokenizer.json", "predictions.jsonl", "samples.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert again["metrics"] == record["metrics"] and again["floors"] == record["floors"]

    ours, tokenizer = load_model(str(whole / "model"), dtype="float32", device="cpu")
    theirs = GPT2LMHeadModel.from_pretrained(whole / "model").eval()
    ids = torch.tensor([tokenizer("def f(x):\n    return x")["input_ids"]])
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_a_comparison_has_the_floors_as_rows(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variants are trained in this process here."""

    def run(each: Any, folder: Path) -> None:
        train(each.recipe, each.folder)

    monkeypatch.setattr(loralab.experiments.run_variants, "_run", run)
    small = ["training.epochs=1", "validation={every: null}", "variants={one: {}}"]
    results = compare(recipe(settings, *small), tmp_path / "out")
    rows = {row["variant"]: row["metrics"]["bits_per_byte"]["value"] for row in results["rows"]}
    assert list(rows) == ["one", AFTER, ALONE] and results["failures"] == {}
    text = report(results)
    assert "bits/byte" in text and all(f"{value:.3f}" in text for value in rows.values())
    assert ("one is UNDER" in text) == (rows["one"] > rows[AFTER] or rows["one"] > rows[ALONE])


def test_accumulated_batches_weigh_each_token_the_same(
    settings: dict[str, Any], tmp_path: Path, texts: list[str]
) -> None:
    """Rows of unequal numbers of tokens, as one batch and as two: the same loss and the same gradient."""
    write_model(new_config("gpt2", ModelSizes(**SMALL), 512, 0, 0, None), 0, tmp_path / "base")
    train_tokenizer(texts, 512, tmp_path / "base", GPT2_TOKENS)
    settings["model"] = {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu", "dropout": 0.0}
    steps = []
    for parts in ([[0, 1, 2]], [[0], [1, 2]]):
        engine = open_engine(recipe(settings))
        split = encode_packed(read_split(engine.recipe.data, "train"), engine.tokenizer, 64, 0)
        rows = split.rows_of(0)[np.argsort(split.lengths_of(split.rows_of(0))[0])][[0, -2, -1]]  # a short one, two full
        batches = [split.collate(rows[part], 0) for part in parts]
        steps.append(engine.train_step(batches, 1e-2))
    assert batches[0].num_target_tokens != batches[1].num_target_tokens
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-5)
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-5)


def test_gpt2_s_own_tokenizer(settings: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    settings["model"] |= {"tokenizer": str(data_folder / "tokenizers/gpt2"), "vocabulary": None}
    few = ["training.epochs=1", "validation={every: null}", "data.max_train_rows=1", "data.max_validation_rows=1"]
    run, _ = train(recipe(settings, *few), tmp_path / "run")
    config = json.loads((run / "model/config.json").read_text())
    assert config["vocab_size"] == 50304, "50,257 tokens, rounded up to a multiple of 64"
    assert config["bos_token_id"] == config["eos_token_id"] == 50256


# Mistakes


def test_a_row_longer_than_the_positions_is_told_before_anything_is_read(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(
        RecipeError, match=r"A packed row has 128 tokens \(data.max_target_length\), and the model has 96"
    ):
        train(recipe(settings, "data.max_target_length=128", "data.name=/not/there"), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"132 in all, and the model has 96 positions.*max_new_tokens to 64 or less"):
        train(recipe(settings, "evaluation.max_new_tokens=100"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_packing_is_not_for_an_encoder_decoder(settings: dict[str, Any], tmp_path: Path) -> None:
    t5 = ["model.name=t5-small", "model.sizes={d_model: 32, d_ff: 64, layers: 1, heads: 2}", "validation={every: null}"]
    with pytest.raises(RecipeError, match=r"data\.packing is for decoder-only models"):
        train(recipe(settings, *t5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=text"], "packing is for plain texts: set source to null"),
        (["data.max_target_length=p85"], "with packing max_target_length is a number of tokens"),
        (["data.max_source_length=64"], "max_source_length mean nothing with packing"),
        (["data.long_rows=skip"], "long_rows mean nothing with packing"),
        (["data.packing=false"], "validation.samples 2: they go on with plain texts"),
        (["validation.samples=21"], "less than or equal to 20"),
        (
            ["mixture={more: {name: x, source: null, target: text, packing: true}}"],
            "data.packing and mixture are both given",
        ),
        (["evaluation.metrics=[rouge]"], "only the loss is measured"),
    ],
)
def test_settings_that_contradict_each_other_are_mistakes(
    overrides: list[str], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(settings, *overrides)


# The shipped recipe and its data


def test_the_shipped_recipe_fits_together() -> None:
    shipped = load_recipe("gpt2-from-scratch", [])
    assert shipped.model.sizes is not None and shipped.model.sizes.positions is not None
    assert shipped.data.row_length <= shipped.model.sizes.positions and shipped.evaluation.split == "test"


def test_documentation_is_the_prose_of_the_code() -> None:
    source = 'class A:\n    """First.\n\n    More.\n    """\n\n    def f(self):\n        "Second."\n\n\ndef g():\n    return 1\n'
    assert documentation.prose_of(source) == "First.\n\nMore.\n\nSecond."
    assert documentation.prose_of("# A title\n\nnot python at all") == "# A title\n\nnot python at all"
    code, prose = corpus.rows("test"), documentation.rows("test")
    assert 0 < len(prose) <= len(code) and {row["origin"] for row in prose} == {"python"}
    assert all(len(row["text"]) >= documentation.SHORTEST for row in prose)
