"""T5 in JAX against our PyTorch model and Transformers': logits, loss and gradients; files; dropout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYOUTS, make_t5, ours, shard, theirs
from torch import Tensor

from loralab.data.prompts import Prompt
from loralab.data.splits import Split
from loralab.errors import ModelError
from loralab.models.t5 import SIZES
from loralab.on_jax.loading.load import load_model, load_weights, save_model
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_layers import relative_buckets
from loralab.on_jax.names import leaves, to_hugging_face
from loralab.on_torch.models.t5_layers import relative_buckets as in_torch


class Batch(NamedTuple):
    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._asdict().items()}


def random_batch(rows: int = 3, source: int = 150, target: int = 140) -> Batch:
    """Long enough to reach every bucket of the position biases; with padding in both."""
    draw = np.random.default_rng(0)
    ids, labels = draw.integers(2, 120, (rows, source)), draw.integers(2, 120, (rows, target))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        ids[row, source - 30 * row :], mask[row, source - 30 * row :], labels[row, target - 20 * row :] = 0, 0, -100
    return Batch(ids, mask, labels)


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5"), request.param)


def test_logits_loss_and_gradients_equal_both_others(folder: Path) -> None:
    model, params = load_weights(folder)
    batch = random_batch()

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output = model.forward(params, batch.input_ids, batch.attention_mask, labels=batch.labels)
        assert output.loss is not None
        return output.loss, output.logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    found = to_hugging_face(gradients)
    for other in (ours(folder), theirs(folder)):
        output = other(**batch.tensors())
        output.loss.backward()
        np.testing.assert_allclose(
            logits, output.logits.detach(), rtol=1e-5, atol=1e-5 * float(output.logits.detach().abs().max())
        )
        np.testing.assert_allclose(value, output.loss.detach(), rtol=1e-6)
        expected = {name: parameter.grad for name, parameter in other.named_parameters()}
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            size = float(gradient.abs().max())
            np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * size, err_msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_tokens_equal_pytorchs_and_padding_has_none(smoothing: float, tmp_path: Path) -> None:
    model, params = load_weights(make_t5(tmp_path, "untied"))
    batch = random_batch(target=140)
    losses = jax.jit(model.token_losses, static_argnums=4)(params, *batch, smoothing)
    real = batch.labels != -100
    assert losses.shape == batch.labels.shape and not losses[~real].any()
    expected = ours(tmp_path).token_losses(*batch.tensors().values(), smoothing=smoothing)
    np.testing.assert_allclose(losses[real], expected.detach(), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_no_token_sees_the_future(tmp_path: Path) -> None:
    model, params = load_weights(make_t5(tmp_path, "untied"))
    batch = random_batch()
    forward = jax.jit(lambda *batch: model.forward(params, *batch[:2], labels=batch[2]).logits)
    whole = forward(*batch)
    alone = forward(batch.input_ids[2:, :90], batch.attention_mask[2:, :90], batch.labels[2:, :100])
    np.testing.assert_allclose(whole[2, :100], alone[0], rtol=1e-5, atol=1e-4)
    other = batch.labels.copy()
    other[:, 60:] = 7
    assert np.array_equal(forward(*batch._replace(labels=other))[:, :61], whole[:, :61])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_is_in_pytorchs_bucket(bidirectional: bool) -> None:
    distances = np.arange(-2000, 2000)
    for config in (SIZES["t5-small"], replace(SIZES["t5-small"], relative_attention_num_buckets=20)):
        expected = in_torch(torch.from_numpy(distances), bidirectional, config)
        assert np.array_equal(relative_buckets(distances, bidirectional, config), expected)


def test_bf16_is_as_near_to_fp32_as_pytorchs(tmp_path: Path) -> None:
    folder, batch = make_t5(tmp_path, "untied"), random_batch()

    def logits(dtype: Any) -> np.ndarray:
        model, params = load_weights(folder, jnp.dtype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        output = jax.jit(model.forward)(params, batch.input_ids, batch.attention_mask, labels=batch.labels)
        assert output.logits.dtype == dtype and output.loss.dtype == jnp.float32
        return np.asarray(output.logits, np.float32)

    exact = logits(jnp.float32)
    with torch.no_grad():
        rounded = ours(folder).bfloat16()(**batch.tensors()).logits.float().numpy()
    errors = [np.sqrt(np.square(other - exact).mean()) for other in (logits(jnp.bfloat16), rounded)]
    assert errors[0] <= 1.1 * errors[1]


def test_dropout_is_on_with_a_key_alone(tmp_path: Path) -> None:
    model, params = load_weights(make_t5(tmp_path))
    batch, keys = random_batch(source=62, target=42), jax.random.split(jax.random.key(1), 2)
    losses = jax.jit(lambda key: model.token_losses(params, *batch, dropout_key=key))
    plain, one, again, other = (losses(key) for key in (None, keys[0], keys[0], keys[1]))
    assert np.array_equal(one, again) and not np.array_equal(one, other) and not np.array_equal(one, plain)
    assert abs(float(one.sum() / plain.sum()) - 1) < 0.1


# A trained model and real text


def test_a_trained_model_on_real_dialogues(data_folder: Path, dialogues: Split) -> None:
    folder = data_folder / "models/chat-t5-mini"
    model, params, tokenizer = load_model(str(folder), "float32")
    prompt = Prompt("Summarize the following conversation.\n\n{dialogue}\n\nSummary: ", "dialogue")
    texts = [prompt.prefix + row.source + prompt.suffix for row in dialogues.examples[:4]]
    source = tokenizer(texts, padding=True, return_tensors="np")
    target = tokenizer([row.targets[0] for row in dialogues.examples[:4]], padding=True, return_tensors="np")
    labels = np.where(target.attention_mask == 1, target.input_ids, -100)
    batch = Batch(source.input_ids, source.attention_mask, labels)
    output = jax.jit(model.forward)(params, batch.input_ids, batch.attention_mask, labels=batch.labels)
    for other in (ours(folder), theirs(folder)):
        with torch.no_grad():
            expected = other(**batch.tensors())
        largest = float(expected.logits.abs().max())
        np.testing.assert_allclose(output.logits, expected.logits, rtol=1e-4, atol=1e-5 * largest)
        np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-5)


# Files


def test_a_saved_model_is_read_by_transformers_and_read_again(folder: Path, tmp_path: Path) -> None:
    model, params = load_weights(folder)
    doubled = jax.tree.map(lambda array: 2 * array, params)
    save_model(tmp_path, model, doubled, str(folder))
    expected = dict(theirs(folder).named_parameters())
    for name, parameter in theirs(tmp_path).named_parameters():
        assert torch.equal(parameter, 2 * expected[name]), name
    again = dict(leaves(load_weights(tmp_path)[1]))
    assert all(np.array_equal(again[path], array) for path, array in leaves(doubled))


def test_a_model_is_saved_with_a_base_that_is_there_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    model, params = load_weights(folder)
    with pytest.raises(ModelError, match=r"There is no folder \./nowhere"):
        save_model(tmp_path / "out", model, params, "./nowhere")
    with pytest.raises(ModelError, match=r"encoder\.block\.0"):
        save_model(tmp_path / "out", model, params | {"encoder": {}}, str(folder))
    assert not (tmp_path / "out").exists()


def test_shards_old_copies_and_fp16_are_read(tmp_path: Path) -> None:
    whole = dict(leaves(load_weights(make_t5(tmp_path / "whole"))[1]))
    folder = make_t5(tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"].clone()
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    found = dict(leaves(load_weights(shard(folder), jnp.dtype("float32"))[1]))
    assert {path: array.shape for path, array in found.items()} == {path: array.shape for path, array in whole.items()}
    for path, array in whole.items():
        assert np.array_equal(found[path], np.asarray(array, np.float16).astype(np.float32)), path


def damage_pickle(folder: Path) -> str:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return r"pytorch_model.bin is a pickle, which only PyTorch reads\. Write it as model.safetensors"


def damage_other_family(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "bart"}')
    return r"type 'bart'; on JAX loralab has T5 alone"


def damage_missing_weight(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.k.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return "lacks 1 of the .* weights .* encoder.block.1.layer.0.SelfAttention.k.weight"


def damage_cut_off(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors is damaged or cut off"


@pytest.mark.parametrize(
    "damage", [v for k, v in list(globals().items()) if k.startswith("damage_")], ids=lambda f: f.__name__
)
def test_a_folder_that_cannot_be_read_is_one_clear_error(damage: Any, tmp_path: Path) -> None:
    folder = make_t5(tmp_path)
    with pytest.raises(ModelError, match=damage(folder)):
        load_weights(folder)


def test_an_unknown_dtype_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dtype 'float16' is not one of float32, bfloat16, auto"):
        load_model(str(make_t5(tmp_path)), "float16")


def test_models_of_equal_settings_share_compiled_programs(tmp_path: Path) -> None:
    one, other = (load_weights(make_t5(tmp_path / name))[0] for name in "ab")
    assert isinstance(one, T5) and one == other and hash(one) == hash(other)
