"""Training from random weights: the sizes, the weights' statistics, the tokenizer, and a whole run with its resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import train_until
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5ForConditionalGeneration
from transformers import T5Config as TheirConfig

from loralab import load_model
from loralab.builtin_data import corpus
from loralab.config.loading import recipe_from_tree
from loralab.config.model import ModelSizes
from loralab.config.recipe import Recipe
from loralab.data.tokenizer_training import train_tokenizer
from loralab.errors import DataError, ModelError, RecipeError
from loralab.models.t5 import SIZES, config_json, deviation, new_config
from loralab.on_torch.loading.random_init import write_model
from loralab.runs.record import read_lines, read_record
from loralab.training.train import train

SMALL = {"d_model": 64, "d_ff": 96, "layers": 3, "decoder_layers": 2, "heads": 4}


# Sizes


def test_sizes_make_a_config() -> None:
    config = new_config("t5", ModelSizes(**SMALL), 640, 0, 1)
    assert (
        config.d_model,
        config.d_kv,
        config.d_ff,
        config.num_layers,
        config.num_decoder_layers,
        config.num_heads,
    ) == (64, 16, 96, 3, 2, 4)
    assert config.gated and config.tie_word_embeddings and config.scale_decoder_outputs and config.vocab_size == 640
    untied = new_config("t5", ModelSizes(**SMALL, feed_forward="relu", tie_embeddings=False, d_kv=8), 640, 0, 1)
    assert not untied.gated and not untied.scale_decoder_outputs and untied.d_kv == 8
    assert new_config("t5", ModelSizes(d_model=64, d_ff=96, layers=3, heads=4), 640, 0, 1).num_decoder_layers == 3


@pytest.mark.parametrize("name", SIZES)
def test_published_names_have_their_sizes(name: str) -> None:
    assert new_config(name, None, 32128, 0, 1) == SIZES[name] == new_config(f"google/{name}", None, 32128, 0, 1)
    assert new_config(name, ModelSizes(layers=2), 32128, 0, 1).num_decoder_layers == 2


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("t5", None, "lacks model.sizes.d_model, model.sizes.d_ff, model.sizes.layers, model.sizes.heads"),
        (
            "t5",
            {"d_model": 64, "d_ff": 96, "heads": 4},
            "lacks model.sizes.layers. Give them, or take a published name: t5-small",
        ),
        ("t5", SMALL | {"heads": 5}, "model.sizes.heads 5 does not divide model.sizes.d_model 64"),
        ("t5-smal", None, "'t5-smal' has no sizes to begin with at random. Did you mean 't5-small'"),
    ],
)
def test_wrong_sizes_are_told(name: str, sizes: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        new_config(name, ModelSizes(**sizes) if sizes else None, 640, 0, 1)


# Weights


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_weights_begin_as_in_transformers(feed_forward: str, tmp_path: Path) -> None:
    sizes = ModelSizes(d_model=256, d_ff=384, layers=2, heads=4, d_kv=32, feed_forward=feed_forward)
    config = new_config("t5", sizes, 1024, 0, 1)
    write_model(config, 3, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(TheirConfig(**config_json(config))).state_dict()
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert set(ours) == set(theirs) - copies
    for name, tensor in ours.items():
        spread = deviation(name, config)
        if spread is None:
            assert torch.equal(tensor, theirs[name]) and (tensor == 1).all()
            continue
        error = 5 * spread / np.sqrt(2 * tensor.numel())  # 5 deviations of a sample's deviation
        assert abs(float(tensor.std()) - spread) < error and abs(float(theirs[name].std()) - spread) < error, name
        assert abs(float(tensor.mean())) < 5 * spread / np.sqrt(tensor.numel())
    write_model(config, 3, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_folder_with_equal_logits(tied: bool, tmp_path: Path, texts: list[str]) -> None:
    write_model(new_config("t5", ModelSizes(**SMALL, tie_embeddings=tied), 640, 0, 1), 0, tmp_path)
    train_tokenizer(texts, 640, tmp_path)
    ours, tokenizer = load_model(str(tmp_path), dtype="float32", device="cpu")
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = tokenizer(["def f(x):", "class Box:"], return_tensors="pt", padding=True)
    labels = torch.tensor([[5, 6, 7, 1], [8, 9, 1, -100]])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids, mask, labels=labels).logits, theirs(ids, mask, labels=labels).logits)


# The tokenizer


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"][:6000] for row in corpus.rows("test")[:8]]


def test_the_tokenizer_is_t5_s_in_shape_and_loses_nothing(texts: list[str], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        train_tokenizer(texts, 640, tmp_path / folder)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 640 and tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]) == list(range(639, 539, -1))
    for text in [*texts, "  two  spaces\t\r\n\n ü 漢字 🙂 \x00 '''", "", " "]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1 and 2 not in ids and tokenizer.decode(ids[:-1]) == text
    answer = tokenizer(["<extra_id_0>Return a <extra_id_1>"])["input_ids"]
    assert tokenizer.batch_decode(answer, skip_special_tokens=True) == ["Return a "]
    with pytest.raises(RecipeError, match=r"model\.vocabulary is 300; it must be at least 359"):
        train_tokenizer(texts, 300, tmp_path / "c")
    with pytest.raises(DataError, match=r"give 3.. tokens, and model\.vocabulary asks for 640"):
        train_tokenizer(["too little"], 640, tmp_path / "c")


# A run


@pytest.fixture
def settings(texts: list[str], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "documents").mkdir()
    for split, part in (("train", texts[:6]), ("validation", texts[6:])):
        (tmp_path / f"documents/{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return {
        "name": "tiny",
        "model": {
            "name": "t5", "init": "random", "sizes": SMALL, "tokenizer": "train", "vocabulary": 640,
            "dtype": "float32", "device": "cpu",
        },
        "data": {
            "name": str(tmp_path / "documents"), "source": "text", "objective": "mixed",
            "max_source_length": 96, "max_target_length": 48,
        },
        "training": {"method": "full", "epochs": 3, "tokens_per_batch": 1024, "save_every": 4},
        "optimizer": {"learning_rate": 3e-2, "scale_parameter": True, "warmup_ratio": 0.1},
        "evaluation": {"split": "validation"},
    }  # fmt: skip


def recipe(settings: dict[str, Any], *overrides: str) -> Recipe:
    return recipe_from_tree(settings, overrides, "here")


def test_a_run_from_nothing_learns_and_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, record = train(recipe(settings), tmp_path / "whole")
    lines = read_lines(whole / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(640), abs=1.0), "at first every token is as likely as another"
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[0]["loss"] - 1
    assert record["proof"]["reloaded_equal"] and record["metrics"]["loss"]["value"] < lines[0]["loss"] - 1
    files = {
        "recipe.yaml",
        "metrics.jsonl",
        "validation.jsonl",
        "curves.png",
        "first_step.json",
        "model",
        "predictions.jsonl",
        "record.json",
    }
    assert {path.name for path in whole.iterdir()} == files
    measured = read_lines(whole / "validation.jsonl")[-1]["loss"]
    assert measured == pytest.approx(record["metrics"]["loss"]["value"]), "the same rows under the same masks"

    train_until(6, recipe(settings), tmp_path / "killed")
    assert (tmp_path / "killed/base/tokenizer.json").exists()
    killed, again = train(recipe(settings), tmp_path / "killed", resume=True)
    for file in ("model/model.safetensors", "model/tokenizer.json", "model/config.json", "predictions.jsonl"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert again["metrics"] == record["metrics"] == read_record(killed)["metrics"]

    model, tokenizer = load_model(str(whole / "model"), dtype="float32", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == record["total"] and len(tokenizer) == 640


def test_a_tokenizer_that_is_there(settings: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    settings["model"] |= {"tokenizer": str(data_folder / "tokenizers/t5"), "vocabulary": None}
    settings["data"] |= {"objective": "span-corruption", "max_train_rows": 2}
    run, record = train(recipe(settings, "training.epochs=1"), tmp_path / "run")
    config = json.loads((run / "model/config.json").read_text())
    assert config["vocab_size"] == 32128, "32,100 tokens, rounded up as in the published checkpoints"
    assert record["total"] > 32128 * 64


def test_mistakes_leave_nothing_behind(settings: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    settings["model"] |= {"tokenizer": str(data_folder / "tokenizers/gpt2"), "vocabulary": None}
    with pytest.raises(ModelError, match="no padding token or no end token"):
        train(recipe(settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    settings["model"] |= {"tokenizer": "train", "sizes": {}}
    with pytest.raises(RecipeError, match=r"lacks model\.sizes\.d_model"):
        train(recipe(settings), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"max_source_length 8 .* too short"):
        train(
            recipe(settings, "data.max_source_length=8", "model.sizes={layers: 2}", "model.name=t5-small"),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.method=lora"], "model.init random goes with training.method full, not lora"),
        (["model.tokenizer=null", "model.vocabulary=null"], "init random needs a tokenizer"),
        (["model.tokenizer=google/x"], "vocabulary is the size of a tokenizer that is trained"),
        (["model.init=pretrained"], "sizes and tokenizer and vocabulary mean nothing for pretrained weights"),
        (["data.target=summary"], "target means nothing with an objective"),
        (["data.prompt=Do: {source}"], "prompt means nothing with an objective"),
        (["data.max_source_length=p85"], "numbers of tokens, no percentiles"),
        (["data.objective=null"], "data.target: missing; name the column"),
        (["evaluation.metrics=[rouge]"], "with data.objective only the loss is measured"),
        (["training.method=lora", "model={name: x}"], "optimizer.scale_parameter is for training.method full"),
        (["model.sizes.layer=3"], "model.sizes.layer: unknown key. Did you mean 'layers'"),
    ],
)
def test_settings_that_contradict_each_other_are_mistakes(
    overrides: list[str], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(settings, *overrides)
