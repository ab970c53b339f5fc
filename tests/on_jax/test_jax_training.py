"""T5 trained in JAX beside the PyTorch engine: the same start, batches and optimizer, the same losses; and what was trained,
taken over by the other. benchmarks/jax_t5.py does the same for 200 steps on real rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from adapter_cases import hf_t5
from peft import PeftModel
from test_jax_t5 import Batch, random_batch
from tiny import make_t5, ours

from loralab import LoRASpec, attach
from loralab import load_adapter as load_in_torch
from loralab.config.training import OptimizerSettings
from loralab.on_jax import adapt, load_adapter, save_adapter, save_model
from loralab.on_jax.loading.load import load_weights
from loralab.on_jax.models.t5 import T5
from loralab.on_torch.training.optimizer import Optimizer

STEPS, RATE = 8, 1e-2
SPECS = {
    "lora": LoRASpec(rank=4, alpha=8, rules=["Attention.q", "Attention.v", "wo"]),
    "dora": LoRASpec(rank=4, alpha=8, rules=["q"], use_dora=True),
    "full": LoRASpec(disabled=True),
}


def batches() -> list[Batch]:
    """One shape, other rows at each step."""
    batch = random_batch(source=70, target=50)
    return [Batch(*(np.roll(array, step, axis=1) for array in batch)) for step in range(STEPS)]


def train_in_torch(folder: Path, spec: LoRASpec, start: Path) -> list[float]:
    """The losses without dropout; where LoRA begins is written to `start`."""
    model = ours(folder)
    adapter = attach(model, spec)
    if not spec.disabled:
        adapter.save(start)
    optimizer = Optimizer(adapter.parameters(), [], OptimizerSettings(learning_rate=RATE))
    losses = []
    for step, batch in enumerate(batches()):
        loss = model.token_losses(*batch.tensors().values()).mean()
        loss.backward()
        optimizer.step(RATE * (1 - step / STEPS))
        losses.append(float(loss.detach()))
    return losses


def train_in_jax(model: T5, params: Any, spec: LoRASpec, trained: Any) -> tuple[list[float], Any]:
    """The losses, and what was trained; the base is an argument of the compiled step."""
    adapted = adapt(spec, model.token_losses, params)
    schedule = optax.linear_schedule(RATE, 0.0, STEPS)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))

    def mean_loss(trained: Any, base: Any, batch: Batch) -> jax.Array:
        return adapted(base, trained, *batch).sum() / (batch.labels != -100).sum()

    @jax.jit
    def update(trained: Any, state: Any, base: Any, batch: Batch) -> Any:
        loss, gradient = jax.value_and_grad(mean_loss)(trained, base, batch)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, losses = optimizer.init(trained), []
    for batch in batches():
        trained, state, loss = update(trained, state, params, batch)
        losses.append(float(loss))
    return losses, adapted.merge(params, trained) if spec.disabled else trained


@pytest.mark.parametrize("method", SPECS)
def test_the_losses_are_pytorchs_and_what_was_trained_is_read_there(method: str, tmp_path: Path) -> None:
    folder, spec = make_t5(tmp_path / "base", "untied"), SPECS[method]
    model, params = load_weights(folder)
    expected = train_in_torch(folder, spec, tmp_path / "start")
    trained = adapt(spec, model.forward, params).start(params)
    if not spec.disabled:
        spec, trained = load_adapter(tmp_path / "start", model, params)
    losses, trained = train_in_jax(model, params, spec, trained)
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    assert losses[-1] < losses[0] - 0.1, "something was learnt"
    readers = save_for_others(model, params, spec, trained, folder, tmp_path / "out")
    batch = random_batch(source=30, target=20)
    live = live_logits(model, params, spec, trained, batch)
    size = float(np.abs(live).max())
    for reader in readers:
        with torch.no_grad():
            np.testing.assert_allclose(reader(**batch.tensors()).logits, live, rtol=1e-5, atol=1e-5 * size)


def save_for_others(
    model: T5, params: Any, spec: LoRASpec, trained: Any, folder: Path, out: Path
) -> list[Callable[..., Any]]:
    """What was trained, as PyTorch reads it from disk: with our T5, and with Transformers' and PEFT."""
    if spec.disabled:
        save_model(out, model, trained, str(folder))
        return [ours(out), hf_t5(out)]
    save_adapter(out, model, params, spec, trained, str(folder))
    plain = ours(folder)
    load_in_torch(plain, out)
    return [plain, PeftModel.from_pretrained(hf_t5(folder), out).eval()]


def live_logits(model: T5, params: Any, spec: LoRASpec, trained: Any, batch: Batch) -> np.ndarray:
    adapted = adapt(spec, model.forward, params)
    merged = trained if spec.disabled else adapted.merge(params, trained)
    return np.asarray(jax.jit(model.forward)(merged, batch.input_ids, batch.attention_mask, labels=batch.labels).logits)
