"""Our GPT-2 in training: 100 steps beside Transformers and PEFT, the published DialogSum recipe, and the perplexity of plain texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dying import train_until
from folders import write_jsonl
from joined import joined
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_gpt2, make_tokenizer, their_gpt2
from torch import nn
from transformers import AutoTokenizer

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.batches import Batch, plan_batches
from loralab.data.splits import read_split
from loralab.data.tokenization import encode
from loralab.evaluation.scores import read_scores
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved, merge_saved
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.models.gpt2 import GPT2
from loralab.runs.record import read_lines
from loralab.training.lr_schedule import rate_at
from loralab.training.train import train

STEPS = 100
EVERYWHERE = ["c_attn", "c_proj", "c_fc"]
SETTINGS = [
    "model.dtype=float32", "model.device=cpu", "model.dropout=0", "lora.dropout=0", "data.max_source_length=48",
    "data.max_target_length=12", "evaluation.split=validation", "evaluation.max_new_tokens=6", "validation.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, workshop: Path) -> Path:
    """A random GPT-2 that knows the words of 60 real dialogues."""
    rows = [json.loads(line) for line in (workshop / "data/train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(
        [
            "Summarize the following conversation. Summary:",
            *(row[key] for row in rows for key in ("dialogue", "summary")),
        ]
    )
    place = make_gpt2(tmp_path_factory.mktemp("gpt2") / "base", len(tokenizer))
    tokenizer.save_pretrained(place)
    return place


def recipe(base: Path, workshop: Path, *overrides: str) -> Recipe:
    """The published experiment on other rows, with another model."""
    places = [f"model.name={base}", f"data.name={workshop / 'data'}"]
    methods = [each for each in overrides if each.startswith("training.method=")]
    lora = [f"lora.rules=[{', '.join(EVERYWHERE)}]"] if methods[-1:] in ([], ["training.method=lora"]) else []
    return load_recipe("flan-t5-base-dialogsum", [*places, *lora, *SETTINGS, *overrides])


# Beside Transformers and PEFT


class Peers:
    """PEFT on Transformers' GPT-2, with PyTorch's AdamW and clipping, as in everybody's script."""

    def __init__(self, engine: TorchEngine, settings: Recipe) -> None:
        self.settings = settings
        self.model: nn.Module = their_gpt2(Path(settings.model.name))
        if engine.adapter is not None:
            config = LoraConfig(
                r=16, lora_alpha=32, target_modules=EVERYWHERE, fan_in_fan_out=True, task_type="CAUSAL_LM"
            )
            self.model = get_peft_model(self.model, config)
            theirs = dict(self.model.named_parameters())
            with torch.no_grad():
                for module, update in engine.adapter.updates.items():
                    for part in "AB":
                        theirs[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(getattr(update, part))
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)

    def step(self, batch: Batch, step: int) -> float:
        loss = self.model.train()(**joined(batch)).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate_at(step, STEPS, self.settings.optimizer)
        self.optimizer.step()
        return float(loss.detach())


def batches(settings: Recipe, engine: TorchEngine) -> Iterator[Batch]:
    """Epochs of real rows, four at a time."""
    encoded = encode(read_split(settings.data, "train"), engine.tokenizer, engine.prompt, 48, 12)
    lengths = encoded.source_lengths, encoded.target_lengths
    for epoch in range(STEPS):
        for rows in plan_batches(*lengths, tokens_per_batch=None, batch_size=4, seed=1, epoch=epoch):
            yield encoded.collate(rows, engine.pad_id)


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-3), ("full", 1e-3)])
def test_one_hundred_steps_are_pefts(method: str, rate: float, base: Path, workshop: Path) -> None:
    settings = recipe(base, workshop, f"training.method={method}", f"optimizer.learning_rate={rate}")
    engine = open_engine(settings)
    assert isinstance(engine.model, GPT2)
    peers = Peers(engine, settings)
    losses = np.array(
        [
            (engine.train_step([batch], rate_at(step, STEPS, settings.optimizer)).loss, peers.step(batch, step))
            for step, batch in zip(range(STEPS), batches(settings, engine), strict=False)
        ]
    )
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 1e-4
    assert len(losses) == STEPS and losses[-15:, 0].mean() < losses[:15, 0].mean() - 0.5, "and something was learnt"


# The published recipe


@pytest.fixture(scope="module")
def trained(base: Path, workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("dialogsum") / "run"
    return train(recipe(base, workshop, "optimizer.learning_rate=1e-2", "training.tokens_per_batch=512"), out)


def test_gpt2_gets_its_row_of_the_dialogsum_table(trained: tuple[Path, dict[str, Any]], base: Path) -> None:
    """ROUGE with intervals, and the loss and the answer that Transformers with PEFT's adapter gives, the prompt left out of it."""
    out, record = trained
    assert {"loss", "rouge1", "rouge2", "rougeL"} <= set(record["metrics"]) and "perplexity" not in record["metrics"]
    assert record["proof"]["reloaded_equal"] and record["proof"]["merged_error"] < 1e-4
    model = PeftModel.from_pretrained(their_gpt2(base), out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    for row in read_lines(out / "predictions.jsonl")[:3]:
        source = tokenizer(f"Summarize the following conversation.\n\n{row['source']}\n\nSummary: ").input_ids
        target = [*tokenizer(row["references"][0]).input_ids, 1]
        if len(source) > 48 or len(target) > 12:
            continue
        labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([source + target]), labels=labels).loss)
            ids = torch.tensor([source])
            written = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
            )
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["prediction"] == tokenizer.decode(written[0, len(source) :], skip_special_tokens=True).strip()


def test_the_other_commands_work_on_the_run(trained: tuple[Path, dict[str, Any]], base: Path, tmp_path: Path) -> None:
    out, record = trained
    again = evaluate_saved(out, [], None)["metrics"]
    assert again["loss"]["value"] == pytest.approx(
        record["metrics"]["loss"]["value"], abs=1e-6
    )  # six digits are stored
    row = read_lines(out / "predictions.jsonl")[0]
    assert run_request(out, GenerateRequest(texts=[row["source"]]), [], None, None)[0] == {
        "answers": [row["prediction"]]
    }
    merge_saved(out, tmp_path / "merged", None)
    model = PeftModel.from_pretrained(their_gpt2(base), out / "adapter").eval()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(their_gpt2(tmp_path / "merged")(input_ids=ids).logits, model(input_ids=ids).logits)


# Plain texts


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for texts without a source, of the words that the base knows."""
    place, numbers = tmp_path_factory.mktemp("plain"), np.random.default_rng(0)
    words = sorted(AutoTokenizer.from_pretrained(base).get_vocab())[50:80]
    for split, count in (("train", 60), ("validation", 20)):
        rows = [
            {"text": " ".join(words[(start + i) % 30] for i in range(8))} for start in numbers.integers(0, 30, count)
        ]
        write_jsonl(place / f"{split}.jsonl", rows)
    data = [
        f"data.name={place}",
        "data.source=null",
        "data.target=text",
        "data.prompt='{source}'",
        "evaluation.metrics=[]",
    ]
    return [
        *data,
        "variants=[lora-16]",
        "optimizer.learning_rate=1e-2",
        "training.method=full",
        "training.tokens_per_batch=64",
        "training.epochs=4",
        "data.duplicate_rows=keep",
    ]


def test_plain_texts_get_a_perplexity_with_an_interval(
    plain: list[str], base: Path, workshop: Path, tmp_path: Path
) -> None:
    out, record = train(recipe(base, workshop, *plain), tmp_path / "run")
    loss, perplexity = (record["metrics"][name] for name in ("loss", "perplexity"))
    bounds = {
        key: pytest.approx(math.exp(loss[key]), rel=1e-12) for key in ("value", "low", "high")
    }  # exp of another library
    assert perplexity == bounds | {"p_vs_first": None}
    assert perplexity["low"] < perplexity["value"] < perplexity["high"] < 0.2 * len(AutoTokenizer.from_pretrained(base))
    rows = read_lines(out / "predictions.jsonl")
    tokens = np.array([row["target_tokens"] for row in rows])
    mean = sum(row["loss"] * row["target_tokens"] for row in rows) / tokens.sum()
    assert perplexity["value"] == pytest.approx(math.exp(mean), rel=1e-5)
    before = evaluate_saved(base, [*plain[:4], "evaluation.metrics=[]", *SETTINGS], None)["metrics"]
    assert before["perplexity"]["low"] > perplexity["high"]
    scores = read_scores(out)
    again = scores.summary(scores)
    assert (
        again["perplexity"]["value"] == pytest.approx(perplexity["value"], rel=1e-5)
        and again["perplexity"]["p_vs_first"] == 1
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    method: str, plain: list[str], base: Path, workshop: Path, tmp_path: Path
) -> None:
    """With GPT-2's own dropout and LoRA's."""
    dropout = ["model.dropout=0.1", "training.save_every=2", f"training.method={method}"]
    dropout += ["lora.dropout=0.1"] if method == "lora" else []
    settings = recipe(base, workshop, *plain, *dropout)
    _, expected = train(settings, tmp_path / "whole")
    train_until(5, settings, tmp_path / "stopped")
    _, found = train(settings, tmp_path / "stopped", resume=True)
    assert found["metrics"] == expected["metrics"]
    losses = [[line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) > 5
