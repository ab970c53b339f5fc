"""PEFT's folders as its users leave them: modules left out, the base's embeddings saved along, embeddings of every kind; and
what its rules make of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import IDS, bert, edit_tensors, gpt2, hf_t5, logits, randomise, t5
from peft import LoraConfig, PeftModel, get_peft_model
from peft_folders import saved_with_embeddings
from tiny import make_t5
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from loralab import LoRASpec, attach, load_adapter
from loralab.adapters.files import read_adapter
from loralab.config.loading import load_recipe
from loralab.errors import AdapterError, TargetError, UserError
from loralab.inference.saved_model import merge_saved
from loralab.training.starting_point import starting_point

SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def gemma3() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, initializer_range=0.2
    )
    return Gemma3ForCausalLM(config).eval()


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, num_labels=3, pad_token_id=1)).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_t5(tmp_path / "base", "untied")


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "some layers": (bert, {"target_modules": ["query"], "layers_to_transform": [1]}),
    "one layer, by its pattern": (
        bert,
        {"target_modules": ["query"], "layers_to_transform": 0, "layers_pattern": "layer"},
    ),
    "modules left out": (bert, {"target_modules": ["query", "key"], "exclude_modules": ["layer.0.attention.self.key"]}),
    "left out by an expression": (
        bert,
        {"target_modules": r".*\.(query|key)", "exclude_modules": r".*\.0\..*\.query"},
    ),
    "all but the head": (bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "a head of the rule's name": (roberta, {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    "DoRA on an embedding": (gpt2, {"target_modules": ["wpe", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "an embedding that scales": (gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "DoRA on one that scales": (gemma3, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # of which this is a test
def test_an_adapter_goes_there_and_back(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    peft = get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "theirs")
    expected, model = logits(peft), make()
    adapter = load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(adapter.merge()), expected)
    adapter.save(tmp_path / "ours")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), expected)
    again = make()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_dora_on_an_embedding_begins_as_the_base() -> None:
    model, plain = gpt2(), logits(gpt2())
    attach(model, LoRASpec(rules=["wpe"], rank=4, use_dora=True))
    torch.testing.assert_close(logits(model), plain)


@pytest.mark.parametrize("case", [case for case in CASES if "DoRA" in case or "scales" in case])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_gradients_on_embeddings_are_pefts(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    peft, model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=6, **settings)).eval(), make()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path)
    adapter = load_adapter(model, tmp_path)
    for each in (peft, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    theirs = dict(peft.base_model.model.named_parameters())
    (target,) = [name for name in adapter.updates if name.endswith(("wpe", "embed_tokens"))]
    update = adapter.updates[target]
    parts = {"lora_embedding_A.default": update.A, "lora_embedding_B.default": update.B}
    if update.magnitude is not None:
        parts["lora_magnitude_vector.default.weight"] = update.magnitude
    for name, ours in parts.items():
        torch.testing.assert_close(ours.grad, theirs[f"{target}.{name}"].grad)


# The base's own weights beside LoRA


@pytest.mark.parametrize("make", [t5, hf_t5])
@pytest.mark.parametrize("layout", ["untied", "tied-unscaled"])
def test_copies_of_the_base_beside_lora_are_no_part_of_it(make: Any, layout: str, tmp_path: Path) -> None:
    model = make(make_t5(tmp_path / "base", layout))
    peft = saved_with_embeddings(tmp_path / "base", tmp_path / "a")
    assert {"lm_head.weight", "shared.weight"} <= set(read_adapter(tmp_path / "a").tuned)
    assert not load_adapter(model, tmp_path / "a").tuned
    torch.testing.assert_close(logits(model), logits(peft))
    assert not load_adapter(make(tmp_path / "base").to(torch.bfloat16), tmp_path / "a").tuned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_that_were_rounded_are_none_either(dtype: torch.dtype, tmp_path: Path) -> None:
    peft = saved_with_embeddings(make_t5(tmp_path / "base", "tied-unscaled"), tmp_path / "a")
    peft.to(dtype).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert not load_adapter(t5(tmp_path / "base"), tmp_path / "a").tuned


def test_a_head_that_is_no_copy_is_loaded(base: Path, tmp_path: Path) -> None:
    saved_with_embeddings(base, tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda tensors: tensors["base_model.model.lm_head.weight"].mul_(2))
    assert set(load_adapter(t5(base), tmp_path / "a").tuned) == {"lm_head.weight"}


# What PEFT's rules make of our folders


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_the_first_pattern_that_matches_wins_there_too(pattern: str, base: Path, tmp_path: Path) -> None:
    model = t5(base)
    spec = LoRASpec(rules=["q"], rank=4, alpha=8, **{pattern: {"q": 2, "SelfAttention.q": 16}})
    adapter = attach(model, spec)
    randomise(adapter.parameters())
    adapter.save(tmp_path / "a")
    again = t5(base)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(hf_t5(base), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-5)  # a scale of 8 enlarges rounding


def test_merge_takes_folders_that_no_run_has_written(workshop: Path, tmp_path: Path) -> None:
    base = workshop / "base"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
    peft = get_peft_model(hf_t5(base), config).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path / "theirs")
    load_adapter(t5(base), tmp_path / "theirs").save(tmp_path / "ours")
    expected = logits(peft)
    for name in ("theirs", "ours"):
        merge_saved(tmp_path / name, tmp_path / f"merged-{name}", str(base))
        torch.testing.assert_close(logits(t5(tmp_path / f"merged-{name}")), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"base is a plain model: there is nothing to merge"):
        merge_saved(base, tmp_path / "merged", None)


def test_a_training_starts_from_such_a_folder(base: Path, tmp_path: Path) -> None:
    get_peft_model(hf_t5(base), LoraConfig(target_modules=["q"])).save_pretrained(tmp_path / "theirs")
    recipe = load_recipe("quickstart", [f"training.start_from={tmp_path / 'theirs'}"])
    assert starting_point(recipe) == (recipe, tmp_path / "theirs")


class Named(nn.Module):
    """Of two modules one has a name that the other's ends in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.z = nn.Linear(8, 8), nn.ModuleDict({"fc": nn.Linear(8, 8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.z["fc"](self.fc(x))
        return y


def test_an_alpha_that_peft_cannot_say_is_said_of_each_module_alone(tmp_path: Path) -> None:
    model, x = Named(), torch.ones(1, 8)
    adapter = attach(model, LoRASpec(rules=["fc"], rank=4, rank_pattern={"^fc": 2}))
    randomise(adapter.parameters())
    adapter.save(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(Named(), tmp_path)(x), model(x))


def test_peft_is_told_to_generate_only_where_the_model_can(tmp_path: Path) -> None:
    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, num_labels=3)
    model = T5ForSequenceClassification(config)
    attach(model, LoRASpec(rules=["q"])).save(tmp_path)
    assert read_adapter(tmp_path).task_type is None
    PeftModel.from_pretrained(T5ForSequenceClassification(config), tmp_path)


def test_peft_is_told_of_a_head_only_where_the_whole_of_it_is_saved(tmp_path: Path) -> None:
    attach(roberta(), LoRASpec(rules=["query"], modules_to_save=["classifier.out_proj"])).save(tmp_path)
    assert read_adapter(tmp_path).task_type is None
    PeftModel.from_pretrained(roberta(), tmp_path)
    attach(roberta(), LoRASpec(rules=["query"], modules_to_save=["classifier"])).save(tmp_path)
    assert read_adapter(tmp_path).task_type == "SEQ_CLS"
    PeftModel.from_pretrained(roberta(), tmp_path)


def test_lora_on_a_convolution_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "over": nn.Conv1d(4, 4, 1)})
    get_peft_model(model, LoraConfig(target_modules=["over"])).save_pretrained(tmp_path)
    plain = nn.ModuleDict({"up": nn.Linear(4, 4), "over": nn.Conv1d(4, 4, 1)})
    with pytest.raises(AdapterError, match=r"has LoRA on 'over', which is here, but of a kind that loralab does not"):
        load_adapter(plain, tmp_path)


def test_a_projection_that_is_never_called_gets_no_adapter() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "up": nn.Linear(16, 16)})
    assert list(attach(model, LoRASpec(rules=["all-linear"])).updates) == ["up"]
    with pytest.raises(TargetError, match="out_proj"):
        attach(nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}), LoRASpec(rules=["out_proj"]))


def test_nor_is_one_of_pefts_loaded_there(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["out_proj", "up"])
    get_peft_model(nn.ModuleDict({"out_proj": nn.Linear(16, 16), "up": nn.Linear(16, 16)}), config).save_pretrained(
        tmp_path
    )
    edit_tensors(tmp_path, lambda t: [t.update({k.replace(".out_", ".attention.out_"): t.pop(k)}) for k in list(t)])
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "up": nn.Linear(16, 16)})
    with pytest.raises(AdapterError, match=r"has LoRA on 'attention.out_proj', which is here, but of a kind"):
        load_adapter(model, tmp_path)
