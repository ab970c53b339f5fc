"""`loralab plan`: published counts, what fits, what is said where something is not known, and real steps beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_t5, ours
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from loralab import attach
from loralab import models as families
from loralab.cli import app
from loralab.config.loading import load_recipe, shipped_recipes
from loralab.config.model import ModelSettings
from loralab.engine import ModelFacts, trace
from loralab.errors import ModelError, RecipeError, TargetError
from loralab.models.lookup import find_base
from loralab.planning.plan import PlanOptions, label_count, lengths_of, plan
from loralab.planning.report import operations, report
from loralab.planning.sizes import sizes_of
from loralab.runs.environment import Machine, this_machine

LARGE = Machine("cpu", "a large machine", 10**13, 10**13, False)

# Parameters of the published files; of classifiers with two labels.
TOTALS = {
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856, "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352, "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200, "bert-base-uncased": 109_483_778,
    "bert-large-uncased": 335_143_938, "distilbert-base-uncased": 66_955_010,
}  # fmt: skip
# recipe, variant -> trained, and base and updates together
PUBLISHED = {
    ("t5-small-xsum", "lora-8"): (589_824, 61_096_448),
    ("t5-small-xsum", "lora-32"): (2_359_296, 62_865_920),
    ("t5-small-xsum", "full"): (60_506_624, 60_506_624),
    ("flan-t5-xxl-samsum", "lora-16"): (18_874_368, 11_154_206_720),
    ("flan-t5-size-samsum", "xl"): (18_874_368, 2_868_631_552),
    ("flan-t5-size-samsum", "xxl"): (37_748_736, 11_173_081_088),
    ("flan-t5-base-dialogsum", "lora-16"): (1_769_472, 249_347_328),
    ("distilbert-imdb", "head"): (592_130, 66_955_010),
    ("distilbert-imdb", "lora-1"): (27_648, 66_982_658),
    ("distilbert-imdb", "lora-16"): (442_368, 67_397_378),
}


def planned(name: str | Path, *overrides: str, machine: Machine = LARGE, **asked: Any) -> dict[str, dict[str, Any]]:
    """Variant -> its row."""
    return {
        row["variant"]: row for row in plan(load_recipe(name, overrides), PlanOptions(**asked), machine)["variants"]
    }


def facts_of(name: str | Path, labels: int | None = None) -> ModelFacts:
    """Of a model that no step changes."""
    recipe = load_recipe("own-data", ["training.method=none"])
    return trace(recipe, find_base(ModelSettings(name=str(name)), labels)).facts


# Counts


@pytest.mark.parametrize("name", TOTALS)
def test_published_models_have_their_published_parameters(name: str) -> None:
    labels = 2 if "bert" in name else None
    assert facts_of(f"somebody/{name}", labels).base_parameters == TOTALS[name]
    assert not find_base(ModelSettings(name=f"somebody/{name}"), labels).brings_head or labels is None


def test_every_published_size_has_a_plan() -> None:
    for family, sizes in families.SIZES.items():
        for name in sizes:
            assert find_base(ModelSettings(name=name), 2 if "bert" in family else None).family == family


def test_the_published_experiments_train_what_they_say() -> None:
    for recipe in dict.fromkeys(recipe for recipe, _ in PUBLISHED):
        for variant, row in planned(recipe).items():
            if (recipe, variant) in PUBLISHED:
                assert (row["trainable"], row["total"]) == PUBLISHED[recipe, variant]
    xxl = planned("flan-t5-xxl-samsum")["lora-16"]
    assert f"{xxl['trainable_percent']:.2f}" == "0.17" and xxl["values_bytes"] == 75_497_472
    assert planned("t5-small-xsum")["full"]["flops_per_step"] == pytest.approx(373.8e9, rel=1e-3)


SPECS = {
    "plain": ["lora.rules=[q, v]"],
    "vectors": ["lora.tune_vectors=true"],
    "dora": ["lora.use_dora=true", "lora.rules=all-linear"],
    "pattern": ["lora.rank_pattern={SelfAttention.q: 2}"],
    "whole": ["lora.modules_to_save=[lm_head]"],
    "embedding": ["lora.rules=[q, relative_attention_bias]"],
}


@pytest.mark.parametrize("case", SPECS)
def test_counts_and_file_are_those_of_a_real_adapter(case: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "base", "untied")
    overrides = [f"model.name={folder}", "data={name: x, source: a, target: b}", "lora.rank=3", *SPECS[case]]
    (tmp_path / "r.yaml").write_text("{}")
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    adapter = attach(ours(folder), recipe.spec())
    adapter.save(tmp_path / "adapter")
    sizes = sizes_of(trace(recipe, find_base(recipe.model, label_count(recipe))).facts, "lora", "float32")
    assert (sizes.trainable, sizes.total) == (adapter.trainable, adapter.total)
    assert sizes.saved_bytes == (tmp_path / "adapter/adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("setting", ["lora.rules=[q, shared]", "lora.modules_to_save=[shared]"])
def test_what_cannot_be_trained_is_not_planned(setting: str) -> None:
    with pytest.raises(TargetError, match="'shared' shares its weight"):
        planned("t5-small-xsum", "variants={one: {}}", "published={}", setting)


def test_the_weights_beside_a_config_say_whether_the_head_is_its_own(tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "base", "untied")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert facts_of(folder).base_parameters == sum(p.numel() for p in ours(folder).parameters())


# Whether it fits


def test_the_cheapest_change_is_named_and_works() -> None:
    one = ["variants={lora-8: {}}", "published={}"]
    need = planned("t5-small-xsum", *one)["lora-8"]["memory_bytes"]["peak"]
    said = []
    for share in (0.8, 0.5, 0.2):
        machine = replace(LARGE, free=int(need * share) + 600_000_000)
        row = planned("t5-small-xsum", *one, machine=machine)["lora-8"]
        assert row["fits"] is False and row["remedy"]["peak"] <= machine.room
        again = planned("t5-small-xsum", *one, *row["remedy"]["overrides"], machine=machine)["lora-8"]
        assert again["fits"] is True and again["memory_bytes"]["peak"] == row["remedy"]["peak"]
        said.append(row["remedy"]["overrides"])
    assert said[0] == ("model.dtype=bfloat16",)
    assert said[1] == ("training.batch_size=1", "training.accumulate=4")
    assert len(said[2]) > 2, "several changes together"


def test_what_cannot_fit_is_not_said_to() -> None:
    found = plan(load_recipe("flan-t5-xxl-samsum"), machine=replace(LARGE, free=2_000_000_000))
    (row,) = found["variants"]
    assert row["fits"] is False and row["remedy"] is None
    assert "nor would it by any of" in " ".join(report(found).split())


def test_a_quantised_base_takes_its_packed_bytes() -> None:
    rows = {q: planned("flan-t5-xxl-samsum", f"model.quantize={q}")["lora-16"] for q in ("int8", "nf4", "null")}
    base = rows["int8"]["base_bytes"]
    assert base["float32"] == 2 * base["bfloat16"] == 4 * 11_135_332_352
    assert base["nf4"] < 0.6 * base["int8"] < 0.6 * 0.52 * base["bfloat16"]
    for quantize, row in rows.items():
        assert row["memory_bytes"]["weights"] == base["bfloat16" if quantize == "null" else quantize]


@pytest.mark.parametrize("how", [["int8"], ["nf4"], ["int8", "model.quantize_except=[wo]"]], ids=" ".join)
def test_real_steps_on_a_quantised_base_stand_beside_the_prediction(how: list[str], tmp_path: Path) -> None:
    config = {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 300,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text("{}")
    overrides = [f"model.name={tmp_path}", f"model.quantize={how[0]}", *how[1:], "data={name: x, source: a, target: b}"]
    overrides += [
        "data.max_source_length=40",
        "data.max_target_length=12",
        "training.batch_size=3",
        "model.dtype=bfloat16",
    ]
    (row,) = planned(tmp_path / "r.yaml", *overrides, measure=True).values()
    assert row["flops_per_step"] == row["measured"]["flops"]
    assert row["memory_bytes"]["peak"] == pytest.approx(row["measured"]["peak_bytes"], rel=0.15)
    plain = planned(tmp_path / "r.yaml", *overrides, "model.quantize=null", "model.quantize_except=[]")["r"]
    assert row["memory_bytes"]["weights"] < plain["memory_bytes"]["weights"]


def test_this_machine_says_what_it_has() -> None:
    machine = this_machine("cpu")
    assert machine.kind == "cpu" and machine.memory >= machine.free > machine.room >= 0


# What is not known


def test_percentiles_are_the_published_ones_where_the_data_is_away_and_it_is_said() -> None:
    recipe = load_recipe("flan-t5-xxl-samsum")
    found = lengths_of(recipe)
    assert (found.source, found.target, found.rows) == (255, 50, 14_732)
    assert "p85 taken as 255 tokens" in found.notes[0] and "not at hand" in found.notes[0]
    with pytest.raises(RecipeError, match=r"max_source_length is p85.*data\.expected\.source_length=256"):
        plan(load_recipe("flan-t5-xxl-samsum", ["data.expected=null"]), machine=LARGE)


def test_percentiles_are_the_rows_own_where_they_are_here(workshop: Path) -> None:
    overrides = ["data.max_source_length=p85", "data.expected={source_length: 9999, train_rows: 9}"]
    found = lengths_of(load_recipe(workshop / "tiny.yaml", overrides))
    assert found.rows == 60 and 50 < found.source < 1000 and found.notes == ()


def test_a_name_that_nobody_knows_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"'google/flan-t5-bse' is none of .*'flan-t5-base'.*model\.name=config\.json"):
        find_base(ModelSettings(name="google/flan-t5-bse"), None)


def test_an_unknown_architecture_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    data = "data={name: x, source: a, target: b}"
    (tmp_path / "r.yaml").write_text("{}")
    for content, message in (
        ("{}", "no model's config"),
        ('{"model_type": "lama"}', "no architecture 'lama'.*'llama'"),
    ):
        file.write_text(content)
        with pytest.raises(ModelError, match=message):
            planned(tmp_path / "r.yaml", f"model.name={file}", data)


def test_the_command_says_so_and_exits_with_2(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "flan-t5-base-dialogsum", "model.name=nobody/nothing"])
    assert isinstance(done.exception, ModelError) and done.stdout == ""


def test_a_rule_without_a_module_is_refused() -> None:
    with pytest.raises(TargetError, match="matches no module"):
        planned("t5-small-xsum", "lora.rules=[quack]")


OTHERS = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=90, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=90, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_architecture_is_counted_from_its_config_alone(name: str, tmp_path: Path) -> None:
    model = OTHERS[name]()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "r.yaml").write_text("{}")
    overrides = ["data={name: x, source: a, target: b, max_source_length: 20, max_target_length: 8}", "lora.rank=2"]
    asked = [f"model.name={tmp_path / 'config.json'}", *overrides, "training.batch_size=2", "model.dtype=float32"]
    (row,) = planned(tmp_path / "r.yaml", *asked).values()
    adapter = attach(model, load_recipe(tmp_path / "r.yaml", asked).spec())
    assert (row["trainable"], row["total"]) == (adapter.trainable, adapter.total)
    assert row["flops_per_step"] > 0 and row["memory_bytes"]["peak"] > row["memory_bytes"]["weights"] > 0


@pytest.mark.parametrize("name", OTHERS)
def test_real_steps_of_any_other_architecture_stand_beside_the_prediction(name: str, tmp_path: Path) -> None:
    OTHERS[name]().config.save_pretrained(tmp_path)
    (tmp_path / "r.yaml").write_text("{}")
    overrides = ["data={name: x, source: a, target: b, max_source_length: 20, max_target_length: 8}", "lora.rank=2"]
    asked = [f"model.name={tmp_path / 'config.json'}", *overrides, "training.batch_size=3", "model.dtype=float32"]
    (row,) = planned(tmp_path / "r.yaml", *asked, measure=True).values()
    assert row["flops_per_step"] == row["measured"]["flops"]
    assert row["memory_bytes"]["peak"] == pytest.approx(row["measured"]["peak_bytes"], rel=0.1)  # of a few kilobytes


def test_a_class_whose_step_needs_numbers_is_told_with_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks(self: LlamaForCausalLM, input_ids: torch.Tensor, **_: Any) -> None:
        raise ValueError(f"the first token is {int(input_ids[0, 0])}")

    monkeypatch.setattr(LlamaForCausalLM, "forward", looks)
    OTHERS["llama"]().config.save_pretrained(tmp_path)
    (tmp_path / "r.yaml").write_text("{}")
    data = "data={name: x, source: a, target: b, max_source_length: 20, max_target_length: 9}"
    recipe = load_recipe(tmp_path / "r.yaml", [f"model.name={tmp_path}", data, "lora.rank=2"])
    found = plan(recipe, machine=LARGE)
    (row,) = found["variants"]
    assert row["trainable"] > 0 and row["total"] > row["trainable"] and row["adapter_bytes"] > 0
    assert row["flops_per_step"] is None and row["fits"] is None and row["inference_bytes"] is None
    assert any("cannot be run without numbers" in note and "counts alone" in note for note in found["notes"])
    assert "counts alone are known" in " ".join(report(found).split())


# Inference


def test_inference_needs_room_for_weights_keys_and_values() -> None:
    rows = {q: planned("flan-t5-xxl-samsum", f"model.quantize={q}")["lora-16"] for q in ("int8", "nf4")}
    for quantize, row in rows.items():
        weights = row["base_bytes"][quantize] + row["memory_bytes"]["adapter"]
        new = load_recipe("flan-t5-xxl-samsum").evaluation.max_new_tokens
        batch = 32768 // (255 + new)
        kept = 2 * 24 * 64 * 64 * batch * (255 + new) * 2  # keys and values of 24 layers, in bfloat16
        assert weights + kept < row["inference_bytes"] < weights + 1.5 * kept
    assert rows["nf4"]["inference_bytes"] < rows["int8"]["inference_bytes"]
    one, four = (planned("t5-small-xsum", f"evaluation.beams={beams}")["lora-8"] for beams in (1, 4))
    assert one["inference_bytes"] != four["inference_bytes"]


# Time, money, words


def test_a_price_needs_a_time() -> None:
    with pytest.raises(RecipeError, match="--price-per-hour needs a time"):
        planned("t5-small-xsum", price_per_hour=1.0)
    row = planned("t5-small-xsum", tokens_per_second=10_000, price_per_hour=2.0)["lora-8"]
    assert row["hours"] == pytest.approx(204_045 * 576 / 10_000 / 3600)
    assert row["price"] == pytest.approx(2 * row["hours"])


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if "expected" in shipped_recipes()[name]])
def test_what_is_said_fits_a_terminal(recipe: str) -> None:
    found = plan(load_recipe(recipe), machine=LARGE)
    text = report(found)
    assert max(map(len, text.splitlines())) <= 80
    assert json.loads(json.dumps(found))["variants"][0]["memory_bytes"]["peak"] > 0
    for row in found["variants"]:
        if "saves" in row:
            memory, flops = (f"{100 * row['saves'][key]:.0f} %" for key in ("memory", "flops"))
            said = f"On this model {row['variant']} saves {memory} of the memory and at most {flops} of the time"
            assert said in " ".join(text.split())


def test_operations_have_units() -> None:
    assert [operations(n) for n in (373.763e9, 19.07e15, None)] == ["373.8 GFLOP", "19.1 PFLOP", "-"]


def test_real_steps_stand_beside_the_prediction(workshop: Path) -> None:
    overrides = ["training.tokens_per_batch=400", "model.device=cpu"]
    found = plan(load_recipe(workshop / "tiny.yaml", overrides), PlanOptions(measure=True, price_per_hour=1.0), LARGE)
    rows = {row["variant"]: row for row in found["variants"]}
    assert "measured" not in rows["zero-shot"]
    for name in ("lora-4", "full"):
        measured = rows[name]["measured"]
        assert rows[name]["flops_per_step"] == pytest.approx(measured["flops"], rel=0.1)
        assert rows[name]["memory_bytes"]["peak"] == pytest.approx(measured["peak_bytes"], rel=0.15)
        assert rows[name]["price"] > 0 and measured["seconds"] > 0
    text = report(found)
    assert "Predicted, measured" in text and "of the time, measured" in " ".join(text.split())
    assert torch.is_grad_enabled()
