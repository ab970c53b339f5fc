"""Classifiers: what is trained, what is saved, and that PEFT, Transformers and our own commands compute the same with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    pipeline,
)

from loralab import LoRASpec, attach, load_adapter
from loralab.adapters import files as adapter
from loralab.config.loading import load_recipe
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import merge_saved
from loralab.metrics.labels import Labels
from loralab.models import bert, distilbert
from loralab.on_torch.engine import open_engine
from loralab.on_torch.models.heads import head_modules, head_parameters
from loralab.runs.record import read_record
from loralab.tasks import task_of
from loralab.training.datasets import read_run_datasets

NEG_POS = Labels(("neg", "pos"))
TEXTS = ["the film was good and two friends met", "a bad story", "it was a film"]


def stored(run: Path) -> dict[str, Any]:
    labels: dict[str, Any] = json.loads((run / "adapter/loralab.json").read_text())["labels"]
    return labels


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model.eval()
    with torch.inference_mode():
        found: torch.Tensor = model(**{
            key: value for key, value in tokenizer(TEXTS, padding=True, return_tensors="pt").items() if key != "token_type_ids"
        }).logits  # fmt: skip
    return found


# What is trained


def test_counts_are_the_published_ones() -> None:
    """66,955,010 is DistilBERT's size; S4's README rounds 27,648 and 442,368 to other numbers."""
    with torch.device("meta"):
        model = DistilBertForSequenceClassification(DistilBertConfig(**distilbert.SIZES["distilbert-base-uncased"]))
    assert sum(p.numel() for p in model.parameters()) == 66_955_010
    assert sum(dict(model.named_parameters())[name].numel() for name in head_parameters(model)) == 592_130
    assert attach(model, LoRASpec(rank=1)).trainable == 27_648
    assert attach(model, LoRASpec(rank=16), "second").trainable == 442_368


@pytest.mark.parametrize(("name", "total"), [("bert-base-uncased", 109_483_778), ("bert-large-uncased", 335_143_938)])
def test_sizes_are_the_published_ones(name: str, total: int) -> None:
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(BertConfig(**bert.SIZES[name]))
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize(
    ("family", "head", "rules"),
    [
        ("bert", ["bert.pooler.dense", "classifier"], {"query", "key", "value"}),
        ("distilbert", ["pre_classifier", "classifier"], {"q_lin", "k_lin", "v_lin"}),
        ("roberta", ["classifier.dense", "classifier.out_proj"], {"query", "value"}),
    ],
)
def test_lora_stays_out_of_the_head(family: str, head: list[str], rules: set[str], bases: Path) -> None:
    model: Any = AutoModelForSequenceClassification.from_pretrained(bases / family)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in head_parameters(model))
    assert list(owners) == head and head_modules(model)
    assert {name.rpartition(".")[2] for name in attach(model, LoRASpec(rank=1)).updates} == rules
    wide = attach(model, LoRASpec(rank=1, rules=["all-linear"]), "wide")
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name.removesuffix(".base") for name in linear} - set(head)
    assert set(wide.updates) == kept


def test_what_each_method_trains(classifiers: dict[str, Path]) -> None:
    update, bert_head, distil_head = 2 * 3 * 2 * (16 + 16), 16 * 16 + 16 + 16 * 2 + 2, 16 * 16 + 16 + 16 * 2 + 2
    expected = {
        "bert lora": update + bert_head, "bert head": bert_head, "distilbert lora": update,
        "distilbert both": update + distil_head, "distilbert head after lora": distil_head,
        "distilbert lora after head after lora": update, "bert lora after head": update + bert_head,
    }  # fmt: skip
    assert {name: read_record(classifiers[name])["trainable"] for name in expected} == expected
    full = read_record(classifiers["bert full after lora"])
    assert full["trainable"] == full["total"]


def test_a_stage_leaves_what_it_does_not_train(classifiers: dict[str, Path]) -> None:
    first, head, last = (
        adapter.read_adapter(classifiers[f"distilbert {name}"] / "adapter")
        for name in ("lora", "head after lora", "lora after head after lora")
    )
    assert not first.tuned and head.tuned and set(head.tuned) == set(last.tuned)
    for module, arrays in first.updates.items():
        assert all(np.array_equal(arrays[part], head.updates[module][part]) for part in arrays)
        assert not np.array_equal(arrays["B"], last.updates[module]["B"])
    assert all(np.array_equal(head.tuned[name], last.tuned[name]) for name in head.tuned)


def test_labels_stand_in_the_adapter_in_the_order_of_the_outputs(classifiers: dict[str, Path]) -> None:
    assert stored(classifiers["bert lora"]) == {"names": ["neg", "pos"], "values": {}, "multi": False}
    named = {"names": ["NEGATIVE", "POSITIVE"], "values": {"neg": "NEGATIVE", "pos": "POSITIVE"}, "multi": False}
    assert stored(classifiers["distilbert lora"]) == named
    config = json.loads((classifiers["bert full after lora"] / "model/config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"} and config["problem_type"] == "single_label_classification"


def test_lora_on_the_top_alone_needs_no_gradients_below(bases: Path) -> None:
    recipe = load_recipe(bases / "distilbert.yaml", ["lora.rules=[layer.1.attention.q_lin]"])
    engine = open_engine(recipe, labels=NEG_POS)
    states: list[bool] = []
    layers = engine.model.get_submodule("distilbert.transformer.layer")
    for layer in layers.children():
        layer.register_forward_hook(lambda _, __, output: states.append(output.requires_grad))
    rows = read_run_datasets(recipe).training
    engine.train_step([task_of(recipe.data).encode(engine, rows, (20, 1), 0).collate(np.arange(4), 0)], 1e-3)
    assert states == [False, True]


# What is saved


@pytest.mark.parametrize("name", ["bert lora", "bert head", "distilbert both", "distilbert head after lora"])
def test_peft_loads_ours_with_the_head(name: str, classifiers: dict[str, Path], bases: Path) -> None:
    base = bases / name.split()[0]
    ours = AutoModelForSequenceClassification.from_pretrained(base)
    load_adapter(ours, classifiers[name] / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), classifiers[name] / "adapter"
    )
    torch.testing.assert_close(logits(ours, base), logits(theirs, base))
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    assert not torch.allclose(logits(plain, base), logits(theirs, base), atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_we_load_pefts_with_the_head(family: str, bases: Path, tmp_path: Path) -> None:
    """With `pre_classifier`, which PEFT saves only where it is told to."""
    torch.manual_seed(3)
    base = bases / family
    extra = {"bert": ["pooler"], "distilbert": ["pre_classifier"], "roberta": []}[family]
    rules = {"distilbert": ["q_lin"]}.get(family, ["query"])
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=rules, modules_to_save=extra, init_lora_weights=False)
    theirs = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForSequenceClassification.from_pretrained(base)
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours, base), logits(theirs, base))
    result, _ = run_request(
        tmp_path,
        GenerateRequest(texts=TEXTS, as_json=True),
        ["model.device=cpu", "model.dtype=float32"],
        str(base),
        None,
    )
    names = {"distilbert": ["NEGATIVE", "POSITIVE"]}.get(family, ["LABEL_0", "LABEL_1"])
    table = [list(each["probabilities"].values()) for each in result["answers"]]
    assert list(result["answers"][0]["probabilities"]) == names
    np.testing.assert_allclose(table, logits(theirs, base).softmax(-1).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert lora", "bert head", "distilbert head after lora"])
def test_a_merged_model_serves_transformers_pipeline(name: str, classifiers: dict[str, Path], tmp_path: Path) -> None:
    merge_saved(classifiers[name], tmp_path / "merged", None)
    serve = pipeline("text-classification", model=str(tmp_path / "merged"), top_k=None, device="cpu")
    theirs = [{each["label"]: each["score"] for each in text} for text in serve(TEXTS)]
    for trained in (classifiers[name], classifiers[name] / "adapter", tmp_path / "merged"):
        overrides = ["model.device=cpu", "model.dtype=float32"]
        result, words = run_request(trained, GenerateRequest(texts=TEXTS), overrides, None, None)
        assert [each["probabilities"] for each in result["answers"]] == [
            pytest.approx(each, abs=1e-5) for each in theirs
        ]
        assert [line.split()[0] for line in str(words).splitlines()] == [
            max(each, key=lambda k: each[k]) for each in theirs
        ]
