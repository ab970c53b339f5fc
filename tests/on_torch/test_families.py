"""Families of models: which one a config and a model are of, what is sharded together, and a further one that is added by one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import averaging
import pytest
import torch
import torch.distributed as dist
from averaging import Averaging, AveragingConfig
from tiny import CPU, make_gpt2, make_t5, make_tokenizer, our_gpt2, ours
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from loralab import LoRASpec, attach
from loralab.config.generation import Decoding
from loralab.config.loading import load_recipe
from loralab.config.model import ModelSettings
from loralab.engine import create_base, load_engine, merge
from loralab.errors import ModelError, RecipeError
from loralab.models import SIZES
from loralab.models.lookup import Base
from loralab.on_torch.generation.generate import generate_ids, pad
from loralab.on_torch.loading.load import load_model, load_weights
from loralab.on_torch.models import registry
from loralab.on_torch.models.causal import CausalFamily
from loralab.on_torch.models.registry import family_for, family_of, find_family
from loralab.on_torch.profiling.build import META, build
from loralab.on_torch.training.loss import CHUNK
from loralab.planning.plan import plan
from loralab.training.train import train

SIZE: dict[str, Any] = {"vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip
TABLES = [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" for stack in ("encoder", "decoder")]
T5_BLOCKS = [f"{stack}.block.{place}" for stack, count in (("encoder", 3), ("decoder", 2)) for place in range(count)]

# name -> (a model, its family, its units of sharding)
MODELS: dict[str, tuple[Callable[[Path], nn.Module], str, list[str]]] = {
    "t5": (lambda place: ours(make_t5(place / "t5", "untied")), "T5Family", [*TABLES, *T5_BLOCKS]),
    "gpt2": (
        lambda place: our_gpt2(make_gpt2(place / "gpt2")), "GPT2Family", [f"transformer.h.{place}" for place in range(3)]
    ),
    "llama": (
        lambda _: LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=24)),
        "TransformersCausal", ["model.layers.0", "model.layers.1"],
    ),
    "bart": (
        lambda _: BartForConditionalGeneration(BartConfig(**BART)),
        "TransformersSeq2Seq", ["model.encoder.layers.0", "model.encoder.layers.1", "model.decoder.layers.0"],
    ),
    "bert": (
        lambda _: BertForSequenceClassification(BertConfig(**SIZE, intermediate_size=24)),
        "TransformersClassifier", ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.embeddings"],
    ),
    "distilbert": (
        lambda _: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=97, n_layers=2, n_heads=2, dim=16, hidden_dim=24)
        ),
        "TransformersClassifier", ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"],
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, str, list[str]]:
    make, family, units = MODELS[request.param]
    torch.manual_seed(0)
    return make(tmp_path).eval(), family, units


# Which family


def test_a_model_has_a_family(case: tuple[nn.Module, str, list[str]]) -> None:
    model, family, _ = case
    assert type(family_of(model)).__name__ == family
    attach(model, LoRASpec(rank=2))
    assert type(family_of(model)).__name__ == family, "an adapter changes nothing"


@pytest.mark.parametrize(
    ("config", "classifies", "family"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, False, "T5Family"),
        ({"model_type": "t5", "architectures": None}, False, "T5Family"),
        ({"model_type": "t5"}, True, "TransformersClassifier"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, False, "TransformersSeq2Seq"),
        ({"model_type": "mt5"}, False, "TransformersSeq2Seq"),
        ({"model_type": "gpt2"}, False, "GPT2Family"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, False, "TransformersCausal"),
        ({"model_type": "gpt2"}, True, "TransformersClassifier"),
        ({"model_type": "llama"}, False, "TransformersCausal"),
        ({"model_type": "bert"}, True, "TransformersClassifier"),
        ({"model_type": "bart"}, False, "TransformersSeq2Seq"),
        ({"model_type": "averaging"}, False, "TransformersCausal"),
    ],
)
def test_a_config_has_a_family(config: dict[str, Any], classifies: bool, family: str) -> None:
    assert type(family_for(config, classifies)).__name__ == family


def test_a_classifier_of_an_encoder_decoder_is_a_classifier() -> None:
    assert family_of(BartForSequenceClassification(BartConfig(**BART))).classifies


def test_a_module_of_somebody_elses_has_none_and_takes_lora_all_the_same() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    assert find_family(module) is None
    with pytest.raises(ModelError, match=r"of its own \(T5, GPT2\); Sequential is neither.*loralab\.attach"):
        family_of(module)
    assert attach(module, LoRASpec(rank=2, rules=["0"])).trainable == 16


def test_a_new_model_of_no_family_is_refused(tmp_path: Path) -> None:
    make_tokenizer(["a"]).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"'gtp2' has no sizes to begin with at random\. Did you mean 'gpt2'"):
        create_base(
            ModelSettings(name="gtp2", init="random", tokenizer=str(tmp_path)), str(tmp_path), 1, tmp_path / "b"
        )


# Sharding


def losses(model: nn.Module) -> Tensor:
    """Of three rows, which are padded."""
    numbers = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(2, 97, (3, length), generator=numbers) for length in (9, 5))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:], labels[1, 3:] = 0, 0, -100
    family = family_of(model)
    return family.token_losses(model, ids, mask, labels[:, :1] % 2 if family.classifies else labels)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module, units: list[str]) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for unit in units:
        fully_shard(model.get_submodule(unit), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "token_losses"):
        register_fsdp_forward_method(model, "token_losses")
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_a_step_that_is_sharded_by_units_is_the_plain_one(
    adapted: bool, case: tuple[nn.Module, str, list[str]], alone: None
) -> None:
    model, _, units = case
    assert family_of(model).sharding_units(model) == units
    if adapted:
        for update in attach(model, LoRASpec(rank=2, alpha=2)).updates.values():
            nn.init.normal_(update.B)
    expected = losses(model)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert gradients
    sharded(model, units)
    found = losses(model)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = None if parameter.grad is None else parameter.grad.full_tensor()  # type: ignore[attr-defined]
            torch.testing.assert_close(whole, gradients[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_unit_holds_no_parameter_that_stands_outside_it_too() -> None:
    """The embeddings of a BERT that writes are its head too."""
    model = BertLMHeadModel(BertConfig(**SIZE, intermediate_size=24, is_decoder=True))
    assert family_of(model).sharding_units(model) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_blocks_alone_are_no_units_of_t5(tmp_path: Path, alone: None) -> None:
    """Its stacks read the first block's table of position biases before that block runs."""
    model = sharded(MODELS["t5"][0](tmp_path), T5_BLOCKS)
    with pytest.raises(RuntimeError, match="DTensor"):
        losses(model)


# A further family


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> averaging.AveragingFamily:
    """All that makes the family known."""
    monkeypatch.setattr(registry, "FAMILIES", [averaging.FAMILY, *registry.FAMILIES])
    return averaging.FAMILY


@pytest.fixture
def place(registered: averaging.AveragingFamily, tmp_path: Path) -> Path:
    """A folder with a new base, rows and a recipe: which of three words stands first is to be written, and another one after it."""
    words = ["anna", "bert", "carl", "sees", "hears", "and", "the", "rain"]
    make_tokenizer([" ".join(words)]).save_pretrained(tmp_path / "tokenizer")
    settings = ModelSettings(name="averaging-tiny", init="random", tokenizer="train")
    create_base(settings, str(tmp_path / "tokenizer"), 7, tmp_path / "base")
    rows = [{"text": f"{name} {verb} the rain", "name": f"{name} and {name}"}
            for name in words[:3] for verb in ("sees", "hears")] * 4  # fmt: skip
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"name": str(tmp_path / "data"), "source": "text", "target": "name", "prompt": "{text} ", "max_source_length": 8,
                 "max_target_length": 8},
        "lora": {"rank": 8, "alpha": 16},
        "training": {"batch_size": 8, "epochs": 30},
        "optimizer": {"learning_rate": 2e-2},
        "evaluation": {"split": "validation", "max_new_tokens": 6},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_a_family_is_added_by_one_line(place: Path) -> None:
    """Trained by default rules, saved, proved, read again, asked in every way, and merged."""
    recipe = load_recipe(place / "recipe.yaml")
    run, record = train(recipe, place / "run")
    assert record["trainable"] == 2 * 2 * 8 * (32 + 64), "LoRA on inner and outer of both blocks"
    assert record["proof"]["reloaded_equal"] and record["proof"]["merged_error"] < 1e-4
    assert record["metrics"]["rouge1"]["value"] > 90, record["metrics"]
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (config["task_type"], sorted(config["target_modules"])) == (
        "CAUSAL_LM", sorted(f"block.{place}.{side}" for place in (0, 1) for side in ("inner", "outer")),
    )  # fmt: skip
    engine = load_engine(recipe, run / "adapter")
    asked = engine.tokenizer(["anna sees the rain", "carl hears the rain"]).input_ids
    ways = [
        Decoding(max_new_tokens=6),
        Decoding(max_new_tokens=6, beams=3),
        Decoding(max_new_tokens=6, sample=True, top_k=1),
    ]
    for way in ways:
        answers = [engine.tokenizer.decode(row) for row in engine.generate(asked, way)]
        assert answers == ["anna and anna", "carl and carl"], way
    merge(str(place / "base"), run / "adapter", place / "merged")
    merged, _ = load_model(str(place / "merged"), "float32", "cpu")
    assert isinstance(merged, Averaging)
    assert generate_ids(merged, asked, ways[0], 0) == engine.generate(asked, ways[0])


def test_an_added_family_is_trained_whole_on_packed_rows_with_activations_computed_again(place: Path) -> None:
    settings = [
        "data.source=null", "data.target=text", "data.prompt={source}", "data.packing=true", "training.method=full", "training.epochs=2",
        "data.max_source_length=512", "data.max_target_length=16",
    ]  # fmt: skip
    models = []
    for way in ("false", "true"):
        recipe = load_recipe(place / "recipe.yaml", [*settings, f"training.gradient_checkpointing={way}"])
        run, _ = train(recipe, place / f"run-{way}")
        models.append(load_weights(run / "model", None, CPU).state_dict())
    base = load_weights(place / "base", None, CPU).state_dict()
    for name, weight in models[0].items():
        torch.testing.assert_close(weight, models[1][name])
        assert not torch.equal(weight, base[name]), name


def test_activations_are_computed_again_where_a_module_says_how(registered: CausalFamily) -> None:
    model = Averaging(AveragingConfig(16, 2, vocab_size=97))
    registered.checkpoint_activations(model)
    assert model.checkpointing
    del model.checkpointing
    with pytest.raises(ModelError, match=r"Averaging cannot compute activations again\. Set training\.gradient_check"):
        registered.checkpoint_activations(model)


def test_an_added_family_is_planned_as_it_is_trained(place: Path) -> None:
    recipe = load_recipe(place / "recipe.yaml")
    planned = plan(recipe)
    (row,) = planned["variants"]
    model = load_weights(place / "base", torch.float32, CPU)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (row["total"] - row["trainable"], row["trainable"]) == (count, 2 * 2 * 8 * (32 + 64))
    assert row["flops_per_step"] > 0 and row["memory_bytes"]["logits"] == 8 * 8 * 64 * 4
    assert not any("cannot be run" in note for note in planned["notes"])


def test_an_added_familys_cache_gives_the_logits_of_one_pass(registered: CausalFamily) -> None:
    torch.manual_seed(0)
    model = Averaging(AveragingConfig(16, 2, vocab_size=97)).eval()
    ids, mask = pad([[5, 6, 7], [8, 9, 10, 11, 12]], 0, CPU, "left")
    state = averaging.FAMILY.start_decoding(model, ids, mask, 4)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(state.next_logits(ids[:, -1]), model(ids, mask).logits[:, -1])
        ids = torch.cat([ids, torch.randint(2, 97, (2, 1))], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)


# Plans


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_there_in_chunks_or_whole_as_the_family_says(name: str, tmp_path: Path) -> None:
    """The widest output of a real step's head."""
    torch.manual_seed(0)
    model, rows, target = MODELS[name][0](tmp_path).train(), 64, 24
    family = family_of(model)
    if family.classifies:
        return
    vocabulary, widest = int(model.config.vocab_size), 0  # type: ignore[union-attr, arg-type]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.shape[-1:] == (vocabulary,):
                widest = max(widest, found.numel() // vocabulary)
            return found

    ids, labels = torch.randint(2, 97, (rows, 4)), torch.randint(2, 97, (rows, target))
    model.requires_grad_(False)
    attach(model, LoRASpec(rank=2))
    with Watch():
        family.token_losses(model, ids, torch.ones_like(ids), labels).sum().backward()
    assert rows * target > CHUNK
    assert widest == (CHUNK if family.logits_in_chunks else rows * target)


def test_every_published_architecture_is_built_by_its_family() -> None:
    for name in ("t5", "gpt2"):
        settings = registry.family_named(next(iter(SIZES[name]))).architecture
        base = Base(name, settings.as_json(next(iter(settings.sizes.values()))), "a test")
        assert family_of(build(base, torch.float32, META)).takes({**base.config, "model_type": name}, False)
