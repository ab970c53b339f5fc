"""Steps predicted without numbers, against PyTorch's own counters of real ones, on models that are drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from counting import flops_of, peak_of
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from loralab import LoRASpec
from loralab.config.loading import load_recipe
from loralab.config.training import OptimizerSettings
from loralab.engine import BatchShape, StepSettings, TracedModel, trace
from loralab.models.gpt2 import GPT2Config
from loralab.models.gpt2 import config_json as gpt2_json
from loralab.models.lookup import Base
from loralab.models.t5 import T5Config
from loralab.models.t5 import config_json as t5_json
from loralab.on_torch.adapters.attach import attach
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops.dropout import set_dropout
from loralab.on_torch.profiling.meter import Meter
from loralab.on_torch.training.forward import token_losses
from loralab.on_torch.training.optimizer import Optimizer


@dataclass
class Case:
    """A model and a batch, real and to be traced."""

    real: nn.Module
    base: Base
    spec: LoRASpec | None
    """None trains everything."""
    settings: StepSettings
    rate: float
    """Dropout of the model."""
    shape: BatchShape

    def traced(self, folder: Path) -> TracedModel:
        data = "data={name: x, source: a, label: b}" if self.base.labels else "data={name: x, source: a, target: b}"
        overrides = [data, "model.name=drawn", f"model.dropout={self.rate}"]
        if self.spec is None:
            overrides.append("training.method=full")
        else:
            spec = self.spec
            overrides += [f"lora.rank={spec.rank}", f"lora.rules=[{', '.join(spec.rules or ())}]"]
            overrides += [f"lora.dropout={spec.dropout}", f"lora.use_dora={str(spec.use_dora).lower()}"]
        (folder / "r.yaml").write_text("{}")
        return trace(load_recipe(folder / "r.yaml", overrides), self.base)


def draw_t5(dice: random.Random) -> Case:
    heads, size, width = dice.choice([2, 4, 6]), dice.choice([8, 16, 32]), dice.choice([32, 48, 64, 96, 128])
    gated, tied = dice.random() < 0.5, dice.random() < 0.5
    config = T5Config(
        width, size, dice.choice([1, 2, 4]) * width, dice.randint(1, 4), dice.randint(1, 4), heads, dice.randint(60, 3000),
        feed_forward_proj="gated-gelu" if gated else "relu", tie_word_embeddings=tied, scale_decoder_outputs=tied,
    )  # fmt: skip
    rows, source, target = dice.randint(1, 8), dice.randint(10, 120), dice.randint(9, 60)
    shape = BatchShape(rows, source, target, rows > 1, rows * target - 2 * (rows > 1))
    rules = dice.choice([["q", "v"], ["q", "k", "v", "o"], ["all-linear"]])
    settings, rate = draw_settings(dice)
    model = T5(config).to(getattr(torch, settings.dtype))
    return Case(model, Base("t5", t5_json(config), "drawn"), draw_spec(dice, rules), settings, rate, shape)


BERT_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
DISTILBERT_KEYS = ("dim", "n_layers", "n_heads", "hidden_dim")


def draw_encoder(dice: random.Random) -> Case:
    family, heads = dice.choice(["bert", "distilbert"]), dice.choice([2, 4])
    width, layers, vocabulary = heads * dice.choice([8, 16, 32]), dice.randint(1, 4), dice.randint(60, 2000)
    inner, rules = dice.choice([2, 4]) * width, ["query", "key", "value"]
    model: nn.Module
    if family == "bert":
        names = dict(zip(BERT_KEYS, (width, layers, heads, inner), strict=True))
        model = BertForSequenceClassification(BertConfig(vocab_size=vocabulary, max_position_embeddings=128, **names))
    else:
        names, rules = dict(zip(DISTILBERT_KEYS, (width, layers, heads, inner), strict=True)), ["q_lin", "v_lin"]
        model = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=vocabulary, max_position_embeddings=128, **names)
        )
    rows, (settings, rate) = dice.randint(2, 8), draw_settings(dice)
    shape = BatchShape(rows, dice.randint(10, 120), 0, True, rows)
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    model = model.to(getattr(torch, settings.dtype))
    return Case(model, Base(family, config, "drawn", labels=2), draw_spec(dice, rules), settings, rate, shape)


def draw_gpt2(dice: random.Random) -> Case:
    heads, size = dice.choice([2, 4]), dice.choice([8, 16, 32])
    config = GPT2Config(
        heads * size, dice.randint(1, 4), heads, 200, dice.randint(60, 3000), tie_word_embeddings=dice.random() < 0.5
    )
    rows = dice.choice([1, *range(3, 9)])  # of two rows each would have some padding, and the sequence be shorter
    source, target = dice.randint(10, 80), dice.randint(9, 60)
    shape = BatchShape(rows, source, target, rows > 1, rows * target - 2 * (rows > 1))
    settings, rate = draw_settings(dice)
    rules = dice.choice([["c_attn"], ["all-linear"]])
    model = GPT2(config).to(getattr(torch, settings.dtype))
    return Case(model, Base("gpt2", gpt2_json(config), "drawn"), draw_spec(dice, rules), settings, rate, shape)


def draw_spec(dice: random.Random, rules: list[str]) -> LoRASpec | None:
    method, rank, dropout = (
        dice.choice(["lora", "lora", "dora", "full"]),
        dice.choice([1, 4, 16]),
        dice.choice([0, 0.05]),
    )
    return None if method == "full" else LoRASpec(rank=rank, rules=rules, dropout=dropout, use_dora=method == "dora")


def draw_settings(dice: random.Random) -> tuple[StepSettings, float]:
    """And the model's dropout."""
    dtype, rate = dice.choice(["float32", "bfloat16"]), dice.choice([0.0, 0.1])
    return StepSettings(dtype, "cpu", checkpointing=dice.random() < 0.2), rate


@dataclass
class Steps:
    """Real steps of a case, again and again."""

    step: Callable[[], None]
    there: list[Tensor]


def real_steps(case: Case) -> Steps:
    """After a first step, so that the optimizer has its moments."""
    torch.manual_seed(0)
    model, shape = case.real, case.shape
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(
                -0.05, 0.05
            )  # our embeddings begin without values, and no step is taken where the loss is none
    set_dropout(model, case.rate)
    if case.settings.checkpointing:
        family_of(model).checkpoint_activations(model)
    if case.spec is None:
        parameters = list(model.parameters())
    else:
        parameters = attach(model.requires_grad_(False), case.spec).parameters()
    ids, labels = torch.randint(2, 60, (shape.rows, shape.source)), torch.randint(2, 60, (shape.rows, shape.target))
    mask = torch.ones_like(ids)
    if shape.target:
        labels[-1, shape.target - (shape.rows * shape.target - shape.target_tokens) :] = -100
    else:
        labels = torch.zeros(shape.rows, 1, dtype=torch.long)
        model.config.problem_type = "single_label_classification"  # type: ignore[union-attr]
    if shape.padded:
        mask[0, -2:] = 0
    optimizer = Optimizer(parameters, [], OptimizerSettings())

    def step() -> None:
        model.train()
        token_losses(model, ids, mask, labels).mean().backward()
        optimizer.step(1e-3)

    step()
    there = [*model.parameters(), *model.buffers(), *parameters, *optimizer.state_tensors(), ids, mask, labels]
    return Steps(step, there)


CASES = [(draw_t5, seed) for seed in range(12)] + [
    (draw, seed) for draw in (draw_encoder, draw_gpt2) for seed in range(7)
]


@pytest.mark.parametrize(("draw", "seed"), CASES)
def test_a_step_takes_what_was_predicted(draw: Callable[[random.Random], Case], seed: int, tmp_path: Path) -> None:
    case = draw(random.Random(seed))
    traced, total = case.traced(tmp_path), sum(parameter.numel() for parameter in case.real.parameters())
    assert traced.facts.base_parameters == total
    predicted = traced.step_cost(case.settings, [case.shape])
    steps = real_steps(case)
    assert predicted.flops == flops_of(steps.step)
    assert predicted.peak == pytest.approx(peak_of(steps.step, steps.there), rel=0.01)


def test_the_meter_sees_what_pytorchs_counters_see() -> None:
    for seed in range(3):
        steps = real_steps(draw_t5(random.Random(seed)))
        with Meter(steps.there) as meter:
            steps.step()
        assert meter.flops == flops_of(steps.step)
        assert meter.peak == peak_of(steps.step, steps.there)


def test_the_first_step_holds_no_moments_and_later_ones_do(tmp_path: Path) -> None:
    case = replace(draw_t5(random.Random(3)), spec=None)
    traced = case.traced(tmp_path)
    first, later = (traced.step_cost(case.settings, [case.shape], first) for first in (True, False))
    assert first.flops == later.flops and first.peak < later.peak
    assert first.optimizer == later.optimizer > 0


def test_two_batches_take_twice_the_products_and_hardly_more_memory(tmp_path: Path) -> None:
    case = draw_t5(random.Random(5))
    traced = case.traced(tmp_path)
    one, two = (traced.step_cost(case.settings, [case.shape] * count) for count in (1, 2))
    assert two.flops == 2 * one.flops
    assert one.peak <= two.peak <= 1.2 * one.peak
