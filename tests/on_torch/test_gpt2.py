"""Our GPT-2 against Transformers': logits, losses, gradients, files under three spellings, adapters; and folders that do not fit."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CPU, make_gpt2, our_gpt2, shard, their_gpt2
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from loralab import LoRASpec, attach, load_adapter, load_model
from loralab.adapters.fingerprint import difference
from loralab.errors import ModelError, TargetError
from loralab.models.gpt2 import OPENAI, OPENAI_LAYER, SIZES, config_json, deviation, names, parse_config
from loralab.on_torch.adapters.attach import fingerprint
from loralab.on_torch.loading.load import load_weights, save_model
from loralab.on_torch.models.gpt2 import GPT2

LEFT, RIGHT = "left", "right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "untied", tied=False)


@pytest.fixture(params=["tied", "untied"])
def either(request: pytest.FixtureRequest, folder: Path, untied: Path) -> Path:
    return folder if request.param == "tied" else untied


def rows(length: int, side: str | None) -> tuple[Tensor, Tensor]:
    """Four rows and their mask; all but the first are shorter, padded on this side."""
    ids = torch.randint(0, 97, (4, length), generator=torch.Generator().manual_seed(length))
    lengths = torch.tensor([length, length // 2, max(1, length // 3), 1] if side else [length] * 4)[:, None]
    places = torch.arange(length)
    return ids, places < lengths if side == RIGHT else places >= length - lengths


def theirs(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, **others: Any) -> Any:
    """Transformers' output, with the positions that its `generate` gives to padded rows."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, **others)


# The same numbers


@pytest.mark.parametrize("side", [None, LEFT, RIGHT])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_logits_are_transformers(length: int, side: str | None, either: Path) -> None:
    ids, mask = rows(length, side)
    with torch.no_grad():
        mine = our_gpt2(either)(ids, None if side is None else mask.long()).logits
        torch.testing.assert_close(mine[mask], theirs(their_gpt2(either), ids, mask).logits[mask])


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_loss_and_gradients_are_transformers(side: str, either: Path) -> None:
    mine, other = our_gpt2(either).train(), their_gpt2(either).train()
    for module in (*mine.modules(), *other.modules()):
        module.rate = module.p = 0.0  # type: ignore[assignment]
    ids, mask = rows(20, side)
    labels = ids.masked_fill(~mask | ~mask.roll(1, 1), -100)  # no padding predicts
    a, b = mine(ids, mask.long(), labels).loss, theirs(other, ids, mask, labels=labels).loss
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    expected = dict(other.named_parameters())
    for name, parameter in mine.named_parameters():
        gradient = expected[name].grad.T if name.endswith(mine.turned) else expected[name].grad
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_recomputed_activations_and_dropout(folder: Path) -> None:
    """Recomputing gives the same gradients, under the same dropout; and dropout drops."""
    ids, mask = rows(20, LEFT)
    gradients = []
    for checkpointing in (False, True):
        model = our_gpt2(folder).train()
        model.transformer.checkpointing = checkpointing
        torch.manual_seed(3)
        model(ids, mask.long(), ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_token_losses_are_the_loss_of_what_is_predicted(either: Path) -> None:
    model = our_gpt2(either)
    ids, mask = rows(20, RIGHT)
    following = torch.full_like(ids, -100)
    following[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    losses = model.token_losses(ids, mask.long(), following)
    assert losses.shape == ((following != -100).sum(),)
    torch.testing.assert_close(losses.mean(), model(ids, mask.long(), ids.masked_fill(~mask, -100)).loss)


def test_documents_of_one_row_are_alone(folder: Path) -> None:
    """Each is read as if it stood alone, and its gradient reaches no other; the row may be longer than the positions."""
    model = our_gpt2(folder)
    ends = (0, 30, 37, 90, 91)
    documents = torch.cat([torch.full((b - a,), number) for number, (a, b) in enumerate(itertools.pairwise(ends))])
    documents = torch.cat([documents, torch.full((5,), -1)])[None].expand(2, -1)
    ids = torch.randint(0, 97, documents.shape, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hook = model.transformer.wte.register_forward_hook(
        lambda _, __, output: seen.append(output) or output.retain_grad()
    )
    logits = model(ids, document_ids=documents).logits
    hook.remove()
    for first, last in itertools.pairwise(ends):
        with torch.no_grad():
            torch.testing.assert_close(logits[:, first:last], model(ids[:, first:last]).logits)
        seen[0].grad = None
        logits[:, first:last].sum().backward(retain_graph=True)
        reached = (seen[0].grad != 0).any(-1)
        assert reached[:, first:last].all() and reached.sum() == 2 * (last - first)


@pytest.mark.parametrize(("size", "parameters"), [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
])  # fmt: skip
def test_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2(SIZES[size]).parameters()) == parameters


def test_deviations_are_the_papers() -> None:
    config = SIZES["gpt2"]
    with torch.device("meta"):
        shapes = GPT2(config).state_dict()
    found = {name: deviation(name, config) for name in shapes}
    assert {name for name, value in found.items() if value is None} == {n for n in shapes if shapes[n].ndim == 1}
    scaled = {name for name, value in found.items() if value == 0.02 / math.sqrt(24)}
    assert scaled == {n for n in shapes if n.endswith("c_proj.weight")} and len(scaled) == 24
    assert {value for name, value in found.items() if name not in scaled} == {None, 0.02}


# Files


def openai_spelling(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenAI's checkpoint has it: other names, and matrices as convolutions over one token."""
    spelled = {}
    for name, tensor in weights.items():
        _, part, *rest = name.split(".", 2)
        number, _, leaf = rest[0].partition(".")
        inside = {ours: theirs for theirs, ours in OPENAI_LAYER.items()}
        outside = {ours: theirs for theirs, ours in OPENAI.items()}
        spelled[f"model/h{number}/{inside[leaf]}" if part == "h" else outside[name]] = (
            tensor[None]
            if leaf in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
            else tensor
        ).contiguous()
    return spelled


def test_the_three_spellings_are_one_model(folder: Path, tmp_path: Path) -> None:
    """Hugging Face's with the prefix; without it, with what old files hold beside; OpenAI's; and shards."""
    weights, expected = load_file(folder / "model.safetensors"), our_gpt2(folder).state_dict()
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(3):
        old |= {
            f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril(),
            f"h.{layer}.attn.masked_bias": torch.tensor(-1e4),
        }
    old["lm_head.weight"] = old["wte.weight"].clone()
    for name, spelled in {"old": old, "openai": openai_spelling(weights)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(spelled, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    for place in (tmp_path / "old", tmp_path / "openai", shard(tmp_path / "old")):
        found = our_gpt2(place).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_name_of_openais_has_its_weight() -> None:
    config = SIZES["gpt2"]
    with torch.device("meta"):
        shapes = GPT2(config).state_dict()
    found = names(config)
    openai = [name for name in found if name.startswith("model/")]
    assert sorted(found[name] for name in openai) == sorted(shapes) and len(openai) == 12 * 12 + 4
    assert found["model/h11/mlp/c_fc/w"] == found["h.11.mlp.c_fc.weight"] == "transformer.h.11.mlp.c_fc.weight"


def test_what_is_saved_is_read_by_transformers_bit_for_bit(either: Path, tmp_path: Path) -> None:
    model = our_gpt2(either)
    model.ends = (1, 5)
    save_model(model, tmp_path / "out", either, None)
    again = their_gpt2(tmp_path / "out")
    assert again.generation_config.eos_token_id == [1, 5] == list(our_gpt2(tmp_path / "out").ends)
    expected = their_gpt2(either).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_config_of_ours_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = SIZES["gpt2-medium"]
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.n_embd, read.n_layer, read.architectures) == (1024, 24, ["GPT2LMHeadModel"])
    assert parse_config(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("added", [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}], ids=str)
def test_what_is_more_than_a_gpt2_is_transformers(added: dict[str, Any], tmp_path: Path) -> None:
    make_gpt2(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | added
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert isinstance(load_weights(tmp_path / "model", torch.float32, CPU), GPT2LMHeadModel)


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a size is missing": ({"n_layer": None}, "config.json of this GPT-2 lacks n_layer"),
    "heads that do not fit": ({"n_head": 5}, "n_head 5 does not divide n_embd 32"),
    "too few weights": ({"n_layer": 4}, r"lacks 12 of the 52 weights .* such as transformer\.h\.3\.ln_1\.weight"),
    "too many weights": ({"n_layer": 2}, r"holds 12 weights that its config.json does not call for, such as"),
    "another width": ({"n_inner": 64}, r"mlp\.c_fc\.weight has the shape \(128, 32\); its config.json calls for \(64, 32\)"),
    "a head that is no copy": ({"tie_word_embeddings": True}, r"lm_head\.weight differs from transformer\.wte\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_folder_that_does_not_fit_is_one_clear_error(case: str, tmp_path: Path) -> None:
    changes, message = DAMAGES[case]
    place = make_gpt2(tmp_path / "model", tied=case != "a head that is no copy")
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ModelError, match=message):
        our_gpt2(place)


def test_a_text_beyond_the_positions_is_refused(folder: Path) -> None:
    model, ids = our_gpt2(folder), torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(ModelError, match="A text of 65 tokens is longer than the 64 positions that this GPT-2 knows"):
        model(ids)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    model(ids, mask)  # 64 of them are real


def test_a_vocabulary_that_does_not_fit_the_tokenizer(tmp_path: Path, data_folder: Path) -> None:
    make_gpt2(tmp_path / "model", vocabulary=50000, tokenizer=data_folder / "tokenizers/gpt2", n_embd=8, n_layer=1)
    with pytest.raises(
        ModelError, match=r"the tokenizer has 50,257 tokens, and the model's vocabulary only 50,000: they do not"
    ):
        load_model(str(tmp_path / "model"), dtype="float32", device="cpu")


# Adapters

EVERYWHERE = ["c_attn", "c_proj", "c_fc", "wpe"]


def randomise(parameters: list[nn.Parameter]) -> None:
    torch.manual_seed(0)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("rules", [["c_attn"], EVERYWHERE, [*EVERYWHERE, "wte"]], ids=len)
def test_adapters_go_both_ways(rules: list[str], folder: Path, untied: Path, tmp_path: Path) -> None:
    """No warning is heard, so that PEFT finds the orientation that it expects. Input embeddings are adapted where the head is another."""
    place, ids = (untied if "wte" in rules else folder), rows(30, None)[0]
    model = our_gpt2(place)
    adapter = attach(model, LoRASpec(rank=4, alpha=8, rules=rules))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=rules, fan_in_fan_out=True, task_type="CAUSAL_LM")
    peft = get_peft_model(their_gpt2(place), config)
    randomise(adapter.parameters())
    randomise([p for p in peft.parameters() if p.requires_grad])
    adapter.save(tmp_path / "ours")
    peft.save_pretrained(tmp_path / "theirs")
    ours, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for key in ("fan_in_fan_out", "task_type", "r", "lora_alpha"):
        assert ours[key] == other[key]
    loaded, back = PeftModel.from_pretrained(their_gpt2(place), tmp_path / "ours").eval(), our_gpt2(place)
    load_adapter(back, tmp_path / "theirs")
    with torch.no_grad():
        base = our_gpt2(place)(ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(ids).logits)
        torch.testing.assert_close(back(ids).logits, peft.eval()(input_ids=ids).logits)
    assert not torch.allclose(model(ids).logits, base, atol=1e-2)


@pytest.mark.parametrize("whole", ["c_attn", "attn.c_proj", "h.1"])
def test_matrices_trained_whole_lie_as_in_the_files(whole: str, folder: Path, tmp_path: Path) -> None:
    ids, model = rows(30, None)[0], our_gpt2(folder)
    adapter = attach(model, LoRASpec(rank=4, alpha=8, rules=["re:.*h.0.mlp.c_fc"], modules_to_save=[whole]))
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*h\.0\.mlp\.c_fc", modules_to_save=[whole], fan_in_fan_out=True
    )
    peft = get_peft_model(their_gpt2(folder), config)
    for parameter in [*adapter.parameters(), *(p for p in peft.parameters() if p.requires_grad)]:
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapter.save(tmp_path / "ours")
    peft.save_pretrained(tmp_path / "theirs")
    there, back, again = their_gpt2(folder), our_gpt2(folder), our_gpt2(folder)
    loaded = PeftModel.from_pretrained(there, tmp_path / "ours").eval()
    load_adapter(back, tmp_path / "theirs")
    load_adapter(again, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(ids).logits)
        torch.testing.assert_close(back(ids).logits, peft.eval()(input_ids=ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_default_rule_is_pefts_and_a_tied_embedding_is_refused(folder: Path) -> None:
    adapter = attach(our_gpt2(folder), LoRASpec(rank=2))
    assert list(adapter.updates) == [f"transformer.h.{layer}.attn.c_attn" for layer in range(3)]
    with pytest.raises(TargetError, match=r"transformer\.wte' shares its weight"):
        attach(our_gpt2(folder), LoRASpec(rules=["wte"]))


def test_the_base_is_known_by_what_its_files_hold(folder: Path) -> None:
    """An adapter that was trained on Transformers' class fits ours, and the other way round."""
    mine, other = fingerprint(our_gpt2(folder)), fingerprint(their_gpt2(folder))
    assert mine == other and len(mine) > 10 and difference(mine, other) is None


def test_a_merged_adapter_is_read_by_transformers(folder: Path, tmp_path: Path) -> None:
    model, ids = our_gpt2(folder), rows(30, None)[0]
    adapter = attach(model, LoRASpec(rank=4, rules=EVERYWHERE))
    randomise(adapter.parameters())
    save_model(adapter.merge(), tmp_path / "merged", folder, None)
    with torch.no_grad():
        torch.testing.assert_close(their_gpt2(tmp_path / "merged")(input_ids=ids).logits, model(ids).logits)
