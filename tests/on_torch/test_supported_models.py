"""Which checkpoints a recipe can train, how their rows are written down, and where LoRA goes when nobody says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_RULES
from safetensors.torch import load_file, save_file
from tiny import make_t5
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    ViTConfig,
    ViTForImageClassification,
)

from loralab import LoRASpec, attach, load_model
from loralab.config.data import DataSettings
from loralab.config.loading import load_recipe
from loralab.data.prompts import Prompt
from loralab.data.tokenization import encode_sources, encode_targets
from loralab.errors import ModelError, RecipeError
from loralab.on_torch.engine import TorchEngine
from loralab.on_torch.loading.supported_models import check_supported
from loralab.on_torch.ops.dropout import set_dropout
from loralab.tasks import task_of

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def named(name: str, model_type: str, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [name], "model_type": model_type, **config}))
    return folder


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a masked model": (
        lambda folder: saved(BertForMaskedLM(BertConfig(**SIZES)), folder),
        r"is a BertForMaskedLM, which recipes cannot train: it fills gaps in a text.*Name one of these as model\.name",
    ),
    "a base without a head": (
        lambda folder: saved(LlamaModel(LlamaConfig(**SIZES)), folder),
        r"is a LlamaModel, .*has no language-model head.*whose config\.json says LlamaForCausalLM",
    ),
    "an encoder": (
        lambda folder: named("T5EncoderModel", "t5", folder),
        r"is a T5EncoderModel, .*says T5ForConditionalGeneration",
    ),
    "a classifier": (
        lambda folder: named("Qwen2ForSequenceClassification", "qwen2", folder),
        r"chooses among labels.*says Qwen2ForCausalLM.*loralab\.attach puts LoRA on any",
    ),
    "a vision model": (
        lambda folder: saved(ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4)), folder),
        r"is a ViTForImageClassification, .*reads pictures or sound.*Name one of these",
    ),
    "one without a name": (
        lambda folder: named("", "llama", folder),
        r"a model without a class in its config\.json, .*LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_architecture_that_cannot_be_trained_says_why(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        check_supported(make(tmp_path / "model"))


def test_a_run_refuses_it_before_it_reads_a_weight(tmp_path: Path) -> None:
    named("BertForMaskedLM", "bert", tmp_path / "model")
    data = ["data.name=x", "data.source=a", "data.target=b"]
    (tmp_path / "r.yaml").write_text("model: {name: " + str(tmp_path / "model") + "}")
    with pytest.raises(ModelError, match="BertForMaskedLM, which recipes cannot train"):
        TorchEngine(load_recipe(tmp_path / "r.yaml", data), str(tmp_path / "model"), None)


def test_those_that_write_pass(tmp_path: Path, workshop: Path) -> None:
    check_supported(saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "llama"))
    check_supported(make_t5(tmp_path / "t5"))
    check_supported(workshop / "bart")


def test_a_head_that_the_files_lack_is_no_random_head(tmp_path: Path, data_folder: Path) -> None:
    folder = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 of the weights that a LlamaForCausalLM has, such as lm_head\.weight"
    ):
        load_model(str(folder), dtype="float32", device="cpu")


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
    "bloom": lambda: BloomConfig(vocab_size=40, hidden_size=8, n_layer=1, n_head=2),
    "falcon": lambda: FalconConfig(**{**SIZES, "ffn_hidden_size": 8}),
    "bart": lambda: BartConfig(
        vocab_size=40, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, encoder_layers=0
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_default_rules_are_pefts(family: str) -> None:
    adapter = attach(AutoModelForCausalLM.from_config(CONFIGS[family]()), LoRASpec(rank=2))
    assert {name.rpartition(".")[2] for name in adapter.updates} == set(PEFTS_RULES[family])
    assert all(f".{rule} " in str(adapter) for rule in PEFTS_RULES[family])


def test_dropout_reaches_rates_that_are_plain_numbers() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    ids = torch.randint(0, 40, (2, 9))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    set_dropout(model, 0.0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


# How rows are written down


def settings(**changes: Any) -> DataSettings:
    return DataSettings(**{"name": "x", "source": "text", "target": "title", **changes})


def test_a_causal_row_has_no_end_before_its_target_and_no_start_in_it(data_folder: Path) -> None:
    """T5's tokenizer ends every text, BERT's begins and ends it, GPT-2's does neither."""
    for name in ("t5", "gpt2", "bert-base-uncased"):
        tokenizer: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name)
        tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
        prompt = task_of(settings(prompt="Text: {text} Title:")).prompt(tokenizer, causal=True)
        bare = tokenizer("Text: Hello there. Title:", add_special_tokens=False).input_ids
        start = [tokenizer.cls_token_id] if name.startswith("bert") else []
        assert encode_sources(["Hello there."], tokenizer, prompt, 50) == ([start + bare], 0)
        target = tokenizer("A title", add_special_tokens=False).input_ids
        assert encode_targets(["A title"], tokenizer, 50, prompt) == ([[*target, tokenizer.eos_token_id]], 0)
        assert encode_targets(["A title"], tokenizer, 2, prompt) == ([[target[0], tokenizer.eos_token_id]], 1)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_cut_source_fills_its_room_and_keeps_the_prompt(name: str, data_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name)
    prompt = Prompt("Text: {source} Title:", causal=True)
    text = "one two three four five six seven eight nine ten"
    length = len(tokenizer(prompt.fill(text), add_special_tokens=False).input_ids)
    for limit in (length - 1, length - 4):
        (ids,), cut = encode_sources([text], tokenizer, prompt, limit)
        assert cut == 1 and limit - 1 <= len(ids) <= limit and tokenizer.decode(ids).endswith(" Title:")
    assert encode_sources([text], tokenizer, prompt, length)[1] == 0


def test_without_a_source_a_text_begins_with_the_start_token(data_folder: Path) -> None:
    gpt2: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers/gpt2")
    t5: Any = AutoTokenizer.from_pretrained(data_folder / "tokenizers/t5")
    for tokenizer, start in ((gpt2, gpt2.bos_token_id), (t5, t5.eos_token_id)):
        prompt = task_of(settings(source=None)).prompt(tokenizer, causal=True)
        assert encode_sources([""], tokenizer, prompt, 8) == ([[start]], 0)
        fixed = task_of(settings(source=None, prompt="A story: {source}")).prompt(tokenizer, causal=True)
        assert tokenizer.decode(encode_sources([""], tokenizer, fixed, 8)[0][0]).strip() == "A story:"


@pytest.mark.parametrize(
    ("source", "lengths", "new", "causal", "message"),
    [
        ("text", (90, 10), 11, True, "90 tokens of the source and 11 of the answer, 101 in all, and the model has 100"),
        ("text", (90, 10), 10, True, None),
        (
            "text",
            (101, 10),
            10,
            False,
            "A row may have 101 tokens, and the model has 100 positions. Lower data.max_source",
        ),
        ("text", (100, 100), 100, False, None),
        (None, (512, 99), 10, True, None),
        (None, (512, 100), 10, True, "1 tokens of the source and 100 of the answer"),
    ],
)
def test_rows_must_fit_the_positions(
    source: str | None, lengths: tuple[int, int], new: int, causal: bool, message: str | None
) -> None:
    if message is None:
        task_of(settings(source=source)).check_lengths(lengths, new, causal, 100)
    else:
        with pytest.raises(RecipeError) as caught:
            task_of(settings(source=source)).check_lengths(lengths, new, causal, 100)
        assert message in str(caught.value) and "evaluation.max_new_tokens" in str(caught.value)
    task_of(settings(source=source)).check_lengths(lengths, new, causal, None)
