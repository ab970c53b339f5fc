"""Our T5 against Transformers': logits, loss and gradients; the three layouts of its files; and damaged
folders."""

from __future__ import annotations

import gzip
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, LAYOUTS, make_t5, ours, shard, theirs
from torch import Tensor, nn

from loralab.errors import ModelError
from loralab.models.t5 import SIZES, parse_config
from loralab.on_torch.generation.generate import pad
from loralab.on_torch.loading.load import load_model, load_weights, model_folder, save_model
from loralab.on_torch.models.t5 import T5


def rows(vocabulary: int, batch: int = 4, source: int = 150, target: int = 140) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, with padding in both; long enough to reach every bucket of the position biases."""
    ids, labels = torch.randint(2, vocabulary, (batch, source)), torch.randint(2, vocabulary, (batch, target))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, source - 30 * row :], mask[row, source - 30 * row :], labels[row, target - 20 * row :] = 0, 0, -100
    return ids, mask, labels


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_t5(tmp_path / "t5", request.param)


@pytest.fixture(params=[False, True], ids=["pytorch", "onednn"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """PyTorch's default tolerance with PyTorch's products, ten times it with oneDNN's, which sum in another order."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return {"rtol": 1.3e-5, "atol": 1e-4} if request.param else {}


def test_logits_loss_and_gradients_equal_transformers(folder: Path, tolerance: dict[str, float]) -> None:
    mine, other = ours(folder), theirs(folder)
    ids, mask, labels = rows(120)
    a, b = (model(input_ids=ids, attention_mask=mask, labels=labels) for model in (mine, other))
    torch.testing.assert_close(a.logits, b.logits, **tolerance)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    expected = dict(other.named_parameters())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def test_token_losses_are_the_loss_of_real_tokens(folder: Path) -> None:
    model = ours(folder)
    ids, mask, labels = rows(120)
    losses = model.token_losses(ids, mask, labels)
    assert losses.shape == ((labels != -100).sum(),)
    torch.testing.assert_close(losses.mean(), model(input_ids=ids, attention_mask=mask, labels=labels).loss)


def test_padding_changes_nothing(folder: Path) -> None:
    model = ours(folder)
    ids, mask, labels = rows(120)
    whole = model(input_ids=ids, attention_mask=mask, labels=labels).logits[2]
    alone = model(input_ids=ids[2:3, :90], labels=labels[2:3, :100]).logits[0]
    torch.testing.assert_close(whole[:100], alone)


def test_no_token_sees_the_future(folder: Path) -> None:
    model = ours(folder)
    ids, _, labels = rows(120)
    embedded = model.shared(labels.clamp(min=0)).detach().requires_grad_()
    encoded, _ = model.encode(ids, None)
    model.decoder(embedded, encoded, None)[:, 60].sum().backward()
    assert embedded.grad is not None
    assert not embedded.grad[:, 61:].any() and embedded.grad[:, :61].any(dim=(0, 2)).all()


def test_layouts(tmp_path: Path) -> None:
    scaled, unscaled, untied = (ours(make_t5(tmp_path / layout, layout)) for layout in LAYOUTS)
    assert (scaled.config.scale_decoder_outputs, scaled.lm_head) == (True, None)
    assert (unscaled.config.scale_decoder_outputs, unscaled.lm_head) == (False, None)
    assert untied.config.scale_decoder_outputs is False and isinstance(untied.lm_head, nn.Linear)


def test_scaling_follows_the_rule() -> None:
    base = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    assert parse_config(base).scale_decoder_outputs is True
    assert parse_config(base | {"tie_word_embeddings": False}).scale_decoder_outputs is False
    assert (
        parse_config(base | {"tie_word_embeddings": False, "scale_decoder_outputs": True}).scale_decoder_outputs is True
    )
    assert (
        parse_config(base | {"tie_word_embeddings": True, "scale_decoder_outputs": False}).scale_decoder_outputs
        is False
    )


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("flan-t5-base", 247_577_856),
        ("flan-t5-xxl", 11_135_332_352),
    ],
)
def test_published_sizes(size: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in T5(SIZES[size]).parameters()) == parameters


# A trained model and real text


@pytest.fixture(scope="session")
def dialogues(data_folder: Path) -> list[str]:
    """From two data sets in turn: to the one the model answers briefly, to the other without an end."""
    texts = [read_dialogues(data_folder / name / "validation.jsonl.gz") for name in ("dialogsum", "samsum")]
    return [
        f"Summarize the following conversation.\n\n{text}\n\nSummary: "
        for pair in zip(*texts, strict=False)
        for text in pair
    ]


def read_dialogues(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["dialogue"] for line in lines]


@pytest.mark.parametrize("own_products", [False, True])
def test_a_trained_model_on_real_dialogues(
    own_products: bool, data_folder: Path, dialogues: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With PyTorch's products and with oneDNN's, which sum in another order."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", own_products)
    folder = data_folder / "models/chat-t5-mini"
    mine, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    other = theirs(folder)
    ids, mask = pad([tokenizer(text).input_ids for text in dialogues[:8]], 0, CPU)
    labels = torch.tensor(tokenizer(dialogues[8:16], padding="max_length", max_length=40, truncation=True).input_ids)
    labels = labels.masked_fill(labels == 0, -100)
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask, labels=labels) for model in (mine, other))
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if own_products else {}
    )  # this model multiplies what sums in another order differ by
    torch.testing.assert_close(a.logits, b.logits, **tolerance)
    torch.testing.assert_close(a.loss, b.loss)


# Files


def test_shards_and_pickles_hold_the_same_model(tmp_path: Path) -> None:
    whole = ours(make_t5(tmp_path / "whole", "untied"))
    shards = ours(shard(make_t5(tmp_path / "shards", "untied")))
    pickled = make_t5(tmp_path / "pickled", "untied")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for other in (shards, ours(pickled)):
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_copies_of_the_embedding_and_unused_keys_of_old_files(tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ours(folder)
    weights["encoder.embed_tokens.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"differs from shared\.weight"):
        ours(folder)


def test_fp16_storage_loads(tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = load_weights(folder, dtype, CPU)
        assert {p.dtype for p in model.parameters()} == {dtype}
    with pytest.raises(ModelError, match=r"'float16' is not one of .* overflows"):
        load_model(str(folder), dtype="float16", device="cpu")


def test_a_saved_model_is_read_by_transformers(folder: Path, tmp_path: Path, tolerance: dict[str, float]) -> None:
    model = ours(folder)
    save_model(model, tmp_path / "out", folder, None)
    ids, mask, labels = rows(120)
    with torch.no_grad():
        a, b = (m(input_ids=ids, attention_mask=mask, labels=labels) for m in (model, theirs(tmp_path / "out")))
    torch.testing.assert_close(a.logits, b.logits, **tolerance)


def damage_no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "holds no weights: expected model.safetensors"


def damage_missing_shard(folder: Path) -> str:
    (shard(folder) / "model-00002-of-00003.safetensors").unlink()
    return "3 shards, of which 1 are missing: model-00002-of-00003.safetensors"


def damage_truncated_shard(folder: Path) -> str:
    file = shard(folder) / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model-00003-of-00003.safetensors is damaged or cut off"


def damage_missing_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "lacks 1 of the .* weights .* encoder.block.1.layer.0.SelfAttention.k.weight"


def damage_extra_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors") | {"encoder.extra.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "does not call for, such as encoder.extra.weight"


def damage_wrong_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_ff": 65}))
    return r"has the shape \(.*\); its config.json calls for"


def damage_no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json does not exist"


def damage_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "t5", "d_model": 32}')
    return "lacks d_kv, d_ff, num_layers, num_heads"


@pytest.mark.parametrize(
    "damage", [v for k, v in list(globals().items()) if k.startswith("damage_")], ids=lambda f: f.__name__
)
def test_a_damaged_folder_is_one_clear_error(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = make_t5(tmp_path / "t5")
    message = damage(folder)
    with pytest.raises(ModelError, match=message):
        ours(folder)


def test_a_missing_folder_is_told_from_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        model_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="could not be fetched from the hub"):
        model_folder("nobody/no-such-model")


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's own library lays it out: models--OWNER--NAME, a snapshot, and a reference to it."""
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    home = cache / "models--somebody--tiny-t5"
    expected = ours(make_t5(home / "snapshots" / commit, "untied"))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = model_folder("somebody/tiny-t5")
    assert folder == home / "snapshots" / commit
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours(folder).state_dict().values(), expected.state_dict().values(), strict=True)
    )


@torch.no_grad()
def test_a_block_frees_its_input_after_the_first_layer(tmp_path: Path) -> None:
    """Without gradients nothing holds the stream of [B, S, D] longer than the layer that reads it."""
    model, alive = ours(make_t5(tmp_path / "t5")), list[bool]()
    for block in (model.encoder.block[1], model.decoder.block[1]):
        inputs: list[weakref.ref[Tensor]] = []
        block.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(weakref.ref(given[1][0])))
        block.layer[-1].register_forward_pre_hook(lambda _, __, inputs=inputs: alive.append(inputs[0]() is not None))
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long))
    assert alive == [False, False]
