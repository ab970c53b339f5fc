"""stories260K, a real small Llama, through every command, and beside PEFT step by step."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import index, read, write_jsonl
from joined import joined
from peft import LoraConfig, PeftModel, get_peft_model
from stories import make_stories
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab import LoRASpec, attach, generate, load_adapter, load_model
from loralab.config.loading import load_recipe
from loralab.data.batches import Batch
from loralab.data.tokenization import encode
from loralab.errors import RecipeError
from loralab.evaluation.rows import leaked_rows
from loralab.experiments.compare import compare
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved, merge_saved
from loralab.on_torch.engine import open_engine
from loralab.runs.record import read_lines, read_record
from loralab.training.lr_schedule import rate_at
from loralab.training.train import train

NAMES, ANIMALS = ("Lily", "Tom", "Max", "Sue", "Ben", "Mia"), ("cat", "dog", "bird", "frog", "fish")
THINGS, PLACES = ("ball", "hat", "cake", "toy"), ("park", "house", "tree")


def story(name: str, animal: str, thing: str, place: str) -> tuple[str, str]:
    """(how it begins, how it goes on), in the words of the model's own stories."""
    begins = f"Once upon a time, there was a little {animal} named {name}. {name} had a red {thing}."
    goes_on = f"One day, {name} lost the {thing} in the {place}. The {animal} was sad. A big girl saw the {thing}"
    return begins, f"{goes_on} and gave it back. {name} was happy."


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and stories of which every seventh is kept for validation."""
    place = tmp_path_factory.mktemp("stories")
    make_stories(place / "model", data_folder)
    (place / "data").mkdir()
    rows = [story(*words) for words in itertools.product(NAMES, ANIMALS, THINGS, PLACES)]
    for split, chosen in {"train": [r for i, r in enumerate(rows) if i % 7], "validation": rows[::7][:20]}.items():
        lines = [
            json.dumps({"begins": begins, "goes_on": goes_on, "all": f"{begins} {goes_on}"})
            for begins, goes_on in chosen
        ]
        (place / f"data/{split}.jsonl").write_text("\n".join(lines))
    recipe = {
        "model": {"name": str(place / "model"), "dtype": "float32", "device": "cpu"},
        "data": {
            "name": str(place / "data"), "source": "begins", "target": "goes_on", "max_source_length": 64, "max_target_length": 96,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"split": "validation", "max_new_tokens": 32},
        "variants": {"zero-shot": {"training.method": "none"}, "lora": {}},
    }  # fmt: skip
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place


@pytest.fixture(scope="module")
def compared(place: Path) -> tuple[dict[str, Any], Path]:
    environment = {"OMP_NUM_THREADS": "1"}
    os.environ |= environment
    results = compare(load_recipe(place / "recipe.yaml", ["data.max_train_rows=160"]), place / "compared")
    return {row["variant"]: row for row in results["rows"]}, place / "compared"


def test_the_loss_on_text_of_its_kind_falls(compared: tuple[dict[str, Any], Path]) -> None:
    rows, out = compared
    before, after = (rows[name]["metrics"]["loss"] for name in ("zero-shot", "lora"))
    assert after["high"] < 0.5 * before["low"] and after["p_vs_first"] < 0.05
    assert rows["lora"]["metrics"]["rouge1"]["low"] > rows["zero-shot"]["metrics"]["rouge1"]["high"]
    assert read_record(out / "lora")["proof"]["reloaded_equal"]
    assert read_record(out / "lora")["proof"]["merged_error"] < 1e-4


def test_the_loss_is_transformers_with_pefts_adapter(compared: tuple[dict[str, Any], Path], place: Path) -> None:
    """Source and target as one text, the source's tokens masked, by other people's code."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = PeftModel.from_pretrained(base, compared[1] / "lora/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(compared[1] / "lora/adapter")
    for row in read_lines(compared[1] / "lora/predictions.jsonl")[:5]:
        source = tokenizer(row["source"]).input_ids
        target = [*tokenizer(row["references"][0], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([source + target]), labels=labels).loss)
            written = model.generate(
                input_ids=torch.tensor([source]), max_new_tokens=32, do_sample=False, pad_token_id=0
            )
        assert row["loss"] == pytest.approx(loss, abs=1e-5) and row["target_tokens"] == len(target)
        assert row["prediction"] == tokenizer.decode(written[0, len(source) :], skip_special_tokens=True).strip()


def test_the_other_commands_work_on_the_run(compared: tuple[dict[str, Any], Path], place: Path) -> None:
    rows, out = compared
    again = evaluate_saved(out / "lora", [], None)
    assert again["metrics"]["loss"]["value"] == pytest.approx(
        rows["lora"]["metrics"]["loss"]["value"], abs=1e-6
    )  # six digits
    first = read_lines(out / "lora/predictions.jsonl")[0]
    assert run_request(out / "lora", GenerateRequest(texts=[first["source"]]), [], None, None)[0] == {
        "answers": [first["prediction"]]
    }
    merge_saved(out / "lora", place / "merged", None)
    merged = AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    model, tokenizer = load_model(str(place / "model"), dtype="float32", device="cpu")
    load_adapter(model, out / "lora/adapter")
    ids = torch.tensor([tokenizer(first["source"]).input_ids])
    with torch.no_grad():
        logits = merged(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)  # logits up to 20, and W + sBA is rounded once


def test_disabled_the_model_is_the_base_bit_for_bit(compared: tuple[dict[str, Any], Path], place: Path) -> None:
    texts = ["Once upon a time, there was a little dog", "Lily and Tom went to the park. They saw"]
    base, tokenizer = load_model(str(place / "model"), dtype="float32", device="cpu")
    model, _ = load_model(str(place / "model"), dtype="float32", device="cpu")
    adapter = load_adapter(model, compared[1] / "lora/adapter")
    ids = torch.tensor([tokenizer(texts[0]).input_ids])

    def seen(model: nn.Module) -> tuple[Tensor, list[str]]:
        with torch.no_grad():
            return model(input_ids=ids).logits, generate(model, tokenizer, texts, max_new_tokens=40)

    expected, words = seen(base)
    changed, other_words = seen(model)
    assert not torch.equal(changed, expected) and other_words != words
    adapter.disable()
    assert torch.equal(seen(model)[0], expected) and seen(model)[1] == words
    assert words[0].startswith("named Max. Max loved to play with his toys"), "a story, as the model tells them"


def test_whole_texts_are_learnt_without_a_source(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "data.source=null",
        "data.target=all",
        "data.max_target_length=128",
        "data.max_train_rows=60",
        "evaluation.metrics=[]",
    ]
    out, record = train(load_recipe(place / "recipe.yaml", settings), place / "whole")
    losses = [line["loss"] for line in read_lines(out / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    row = read_lines(out / "predictions.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert row["source"] == "" and row["target_tokens"] == len(tokenizer(row["references"][0]).input_ids), (
        "all, and an end for <s>"
    )
    assert record["metrics"]["loss"]["low"] < record["metrics"]["loss"]["high"], "the rows are resampled one by one"
    assert record["evaluated"]["leaked"] == 0
    messages = capsys.readouterr().err
    assert "model.layers.*.self_attn.q_proj" in messages, "what is adapted is named"
    assert "pad" not in messages and "attention mask" not in messages


def test_texts_without_a_source_are_parted_and_leak_by_themselves(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {i % 50}"} for i in range(60)])
    splits = [index(file, split, source=None, target="text") for split in ("train", "validation", "test")]
    texts = [{example.targets[0] for example in split} for split in splits]
    assert all(texts) and sum(map(len, texts)) == 50, "equal texts are together"
    assert leaked_rows(splits[0], splits[1]) == 0 and leaked_rows(splits[0], splits[0]) == len(splits[0])


def test_too_long_for_the_models_positions(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml", ["data.max_source_length=450"])
    with pytest.raises(
        RecipeError, match=r"450 tokens of the source and 96 of the answer, 546 in all, and the model has 512"
    ):
        train(recipe, place / "too-long")
    assert not (place / "too-long").exists()


# Beside PEFT


def batches(place: Path, steps: int) -> list[Batch]:
    engine = open_engine(load_recipe(place / "recipe.yaml"))
    rows = read(place / "data", source="begins", target="goes_on")
    encoded = encode(rows, engine.tokenizer, engine.prompt, 64, 96)
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0)).numpy()
    return [encoded.collate(order[4 * step : 4 * step + 4], engine.pad_id) for step in range(steps)]


def test_twenty_steps_are_pefts(place: Path) -> None:
    """LoRA, dropout 0, fp32: the same batches from the same start give the same losses."""
    steps = 20
    settings = load_recipe(place / "recipe.yaml", ["optimizer.learning_rate=1e-3", "lora.rules=[q_proj, v_proj]"])
    engine = open_engine(settings)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    peft = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    theirs = dict(peft.named_parameters())
    with torch.no_grad():
        for module, update in engine.adapter.updates.items():  # type: ignore[union-attr]
            for part in "AB":
                theirs[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(getattr(update, part))
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    ours, expected = [], []
    for step, batch in enumerate(batches(place, steps)):
        optimizer.param_groups[0]["lr"] = rate = rate_at(step, steps, settings.optimizer)
        ours.append(engine.train_step([batch], rate).loss)
        loss = peft.train()(**joined(batch)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4
    assert expected[-1] < expected[0] - 0.1


def test_adapters_go_both_ways(place: Path, tmp_path: Path) -> None:
    """The rules of a recipe without rules are those of PEFT's own table."""
    model, tokenizer = load_model(str(place / "model"), dtype="float32", device="cpu")
    adapter = attach(model, LoRASpec(rank=4, alpha=8))
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "model"), LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert set(adapter.updates) == {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in peft.named_parameters()
        if name.endswith("lora_A.default.weight")
    }
    ids = torch.tensor([tokenizer("Once upon a time").input_ids])
    torch.manual_seed(0)
    for parameters in (adapter.parameters(), [p for p in peft.parameters() if p.requires_grad]):
        for parameter in parameters:
            nn.init.normal_(parameter, std=0.05)
    adapter.save(tmp_path / "ours")
    peft.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), tmp_path / "ours")
    other, _ = load_model(str(place / "model"), dtype="float32", device="cpu")
    load_adapter(other, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
        torch.testing.assert_close(other(input_ids=ids).logits, peft.eval()(input_ids=ids).logits)
