"""One adapter for both engines: PEFT's folder, written in JAX and read in PyTorch and PEFT, and the other way; what does not
fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from adapter_cases import BROKEN, IDS, T5_CASES, edit_config, edit_tensors, hf_t5, logits, randomise, t5
from peft import LoraConfig, PeftModel, get_peft_model
from peft_folders import saved_with_embeddings
from tiny import make_t5

from loralab import LoRASpec, attach
from loralab import load_adapter as load_in_torch
from loralab.adapters.files import read_adapter
from loralab.errors import AdapterError, TargetError
from loralab.on_jax import lora_init
from loralab.on_jax.adapters.adapter_io import load_adapter, save_adapter
from loralab.on_jax.loading.load import load_weights
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.names import to_hugging_face

forward = jax.jit(T5.forward, static_argnums=0)


def assert_close(mine: np.ndarray, theirs: np.ndarray) -> None:
    """To fp32's precision of the largest logit."""
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6 * float(np.abs(theirs).max()))


def jax_logits(model: T5, params: Any) -> np.ndarray:
    return np.asarray(forward(model, params, IDS.numpy(), labels=IDS.numpy()).logits)


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    array: np.ndarray = logits(model).numpy()
    return array


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("base"), "untied")


@pytest.fixture(scope="module")
def loaded(base: Path) -> tuple[T5, Any]:
    return load_weights(base)


def moved(trainable: Any) -> Any:
    """As if something had been learnt."""
    draw = np.random.default_rng(7)
    return jax.tree.map(lambda array: array + 0.05 * draw.normal(size=array.shape).astype(np.float32), trainable)


@pytest.mark.parametrize("case", T5_CASES)
def test_pytorch_and_peft_load_jaxs(case: str, base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    (model, params), spec = loaded, LoRASpec(**T5_CASES[case])
    trainable, _, merge_fn = lora_init(spec, model.forward, params)
    trainable = moved(trainable)
    save_adapter(tmp_path, model, params, spec, trainable, str(base))
    live = jax_logits(model, merge_fn(trainable))
    assert not np.allclose(live, jax_logits(model, params), atol=1e-3)
    plain = t5(base)
    adapter = load_in_torch(plain, tmp_path)
    assert_close(torch_logits(plain), live)
    assert_close(torch_logits(PeftModel.from_pretrained(hf_t5(base), tmp_path).eval()), live)
    there = attach(t5(base), spec)
    assert (set(there.updates), set(there.tuned)) == (set(adapter.updates), set(adapter.tuned)), (
        "one spec, one selection"
    )
    spec, again = load_adapter(tmp_path, model, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, trainable))
    _, _, merge_fn = lora_init(spec, model.forward, params)
    assert np.array_equal(jax_logits(model, merge_fn(again)), live)


@pytest.mark.parametrize("case", T5_CASES)
def test_jax_loads_pytorchs(case: str, base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    there = t5(base)
    adapter = attach(there, LoRASpec(**T5_CASES[case]))
    randomise(adapter.parameters())
    adapter.save(tmp_path)
    spec, trainable = load_adapter(tmp_path, *loaded)
    _, _, merge_fn = lora_init(spec, loaded[0].forward, loaded[1])
    assert_close(jax_logits(loaded[0], merge_fn(trainable)), torch_logits(there))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": r".*decoder.*\.[kv]"},
        {"bias": "all"},
        {"modules_to_save": ["layer_norm"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_jax_loads_pefts(settings: dict[str, Any], base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    config = {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM", **settings}
    peft = get_peft_model(hf_t5(base), LoraConfig(r=4, lora_alpha=6, **config)).eval()
    randomise(p for p in peft.parameters() if p.requires_grad)
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    spec, trainable = load_adapter(tmp_path, *loaded)
    _, _, merge_fn = lora_init(spec, loaded[0].forward, loaded[1])
    assert_close(jax_logits(loaded[0], merge_fn(trainable)), torch_logits(peft))


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_jax_loads_pefts_with_copies_of_the_base(
    settings: dict[str, Any], base: Path, loaded: tuple[T5, Any], tmp_path: Path
) -> None:
    peft = saved_with_embeddings(base, tmp_path, **settings)
    spec, trainable = load_adapter(tmp_path, *loaded)
    _, _, merge_fn = lora_init(spec, loaded[0].forward, loaded[1])
    assert_close(jax_logits(loaded[0], merge_fn(trainable)), torch_logits(peft))


def test_a_pattern_for_no_module_of_this_base_is_left_alone(base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    attach(t5(base), LoRASpec(rules=["q"], rank=4, alpha=8)).save(tmp_path)
    edit_config(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"v": 2})
    spec, _ = load_adapter(tmp_path, *loaded)
    assert not spec.rank_pattern and not spec.alpha_pattern


@pytest.mark.parametrize("case", ["all-linear", "dora"])
def test_what_is_loaded_is_computed_without_forming_the_sum(case: str, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    """A weight whose sum has to be formed is told in a warning, and a warning is an error here."""
    (model, params), spec = loaded, LoRASpec(**T5_CASES[case])
    trainable, apply_fn, merge_fn = lora_init(spec, model.forward, params)
    trainable = moved(trainable)
    factored = jax.jit(apply_fn)(trainable, IDS.numpy(), labels=IDS.numpy()).logits
    assert_close(factored, jax_logits(model, merge_fn(trainable)))


@pytest.mark.parametrize("case", ["plain", "rslora", "alpha null, ranks, rslora", "patterns", "dora"])
def test_the_oracle_judges_both_engines(case: str, base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    """From one folder, each merged matrix is the one that NumPy makes of the same files."""
    (model, params), spec = loaded, LoRASpec(**T5_CASES[case])
    save_adapter(tmp_path, model, params, spec, moved(lora_init(spec, model.forward, params)[0]))
    files, weights = read_adapter(tmp_path), to_hugging_face(params)
    in_jax, trainable = load_adapter(tmp_path, model, params)
    engines = [
        to_hugging_face(lora_init(in_jax, model.forward, params)[2](trainable)),
        {name: tensor.numpy() for name, tensor in load_in_torch(t5(base), tmp_path).merge().state_dict().items()},
    ]
    for name, weight in weights.items():
        module, expected = name.removesuffix(".weight"), weight.astype(np.float64)
        if module in files.updates:
            A, B, *m = (array.astype(np.float64) for _, array in sorted(files.updates[module].items()))
            rank, alpha = spec.rank_of(module), spec.alpha_of(module)
            scale = 1.0 if alpha is None else alpha / (rank**0.5 if spec.use_rslora else rank)
            expected = oracle.dora_merged(expected, A, B, scale, *m) if m else oracle.merged(expected, A, B, scale)
        for engine in engines:
            np.testing.assert_allclose(engine[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_torch_is_not_needed(tmp_path: Path) -> None:
    """Loading, LoRA, its folder, merging and writing, in a process that has no PyTorch."""
    program = """
import sys

sys.modules["torch"] = None
from loralab import LoRASpec
from loralab.on_jax import generate, load_adapter, load_model, lora_init, save_adapter, save_model

model, params, tokenizer = load_model("embedded:tiny-t5", dtype="float32")
trainable, _, merge_fn = lora_init(LoRASpec(rules="q"), model.forward, params)
save_adapter("adapter", model, params, LoRASpec(rules="q"), trainable, tokenizer=tokenizer)
spec, again = load_adapter("adapter", model, params)
save_model("merged", model, merge_fn(again), "embedded:tiny-t5", tokenizer)
model, params, tokenizer = load_model("merged", dtype="float32")
print(generate(model, params, tokenizer, ["def add(a, b): return a + b"], max_new_tokens=8))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 8


# What does not fit


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_the_same_error(case: str, base: Path, loaded: tuple[T5, Any], tmp_path: Path) -> None:
    attach(t5(base), LoRASpec(rules=["q", "v"], rank=4, alpha=8)).save(tmp_path)
    damage, message = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, *loaded)


def test_another_base_is_refused_and_the_same_in_bf16_is_not(base: Path, tmp_path: Path) -> None:
    attach(t5(base), LoRASpec(rules=["q"], rank=4)).save(tmp_path / "a")
    load_adapter(tmp_path / "a", *load_weights(base, jnp.dtype("bfloat16")))
    with pytest.raises(AdapterError, match=r"trained on the base .* is another: .* sampled weights have other values"):
        load_adapter(tmp_path / "a", *load_weights(make_t5(tmp_path / "other", "untied", seed=1)))


def save_disabled(folder: Path) -> None:
    model, params = load_weights(make_t5(folder))
    spec = LoRASpec(disabled=True)
    save_adapter(folder / "a", model, params, spec, lora_init(spec, model.forward, params)[0])


def save_tied(folder: Path) -> None:
    model, params = load_weights(make_t5(folder))
    spec = LoRASpec(rules=["shared"])
    save_adapter(folder / "a", model, params, spec, lora_init(spec, model.forward, params)[0])


def save_shared_whole(folder: Path) -> None:
    model, params = load_weights(make_t5(folder, "untied"))
    spec = LoRASpec(rules=["q"], modules_to_save=["shared"])
    save_adapter(folder / "a", model, params, spec, lora_init(spec, model.forward, params)[0])


def load_shared(folder: Path, **settings: Any) -> None:
    get_peft_model(hf_t5(make_t5(folder, "untied")), LoraConfig(**settings)).save_pretrained(folder / "a")
    load_adapter(folder / "a", *load_weights(folder))


def save_of_another_spec(folder: Path) -> None:
    model, params = load_weights(make_t5(folder))
    trained = lora_init(LoRASpec(rules=["q"], rank=4), model.forward, params)[0]
    save_adapter(folder / "a", model, params, LoRASpec(rules=["q"], rank=8), trained)


def save_too_little(folder: Path) -> None:
    model, params = load_weights(make_t5(folder))
    trained = lora_init(LoRASpec(rules=["q"]), model.forward, params)[0]
    save_adapter(folder / "a", model, params, LoRASpec(rules=["q", "v"]), trained)


def load_head_alone(folder: Path) -> None:
    config = LoraConfig(target_modules=["q"], modules_to_save=["lm_head"])
    peft = get_peft_model(hf_t5(make_t5(folder, "untied")), config)
    peft.save_pretrained(folder / "a", save_embedding_layers=False)
    edit_config(folder / "a", target_modules="dummy-target-modules")
    edit_tensors(folder / "a", lambda tensors: [tensors.pop(name) for name in list(tensors) if "lora_" in name])
    load_adapter(folder / "a", *load_weights(folder))


def load_changed_head(folder: Path) -> None:
    saved_with_embeddings(make_t5(folder, "untied"), folder / "a", target_modules=["q", "lm_head"])
    edit_tensors(folder / "a", lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].mul_(2))
    load_adapter(folder / "a", *load_weights(folder))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a whole model": (save_disabled, r"there is no adapter\. Save it with save_model"),
    "a tied embedding": (save_tied, r"'shared' shares its weight with another module"),
    "an embedding trained whole": (save_shared_whole, r"'shared' shares its weight with another module"),
    "PEFT's LoRA on an embedding": (
        partial(load_shared, target_modules=["q", "shared"]),
        r"/a: 'shared' shares its weight",
    ),
    "PEFT's embedding": (
        partial(load_shared, target_modules=["q"], modules_to_save=["shared"]),
        r"/a: 'shared' shares its weight",
    ),
    "another rank": (
        save_of_another_spec,
        r"q' has the shapes \{'A': \(4, \d+\).*; with this spec they are \{'A': \(8,",
    ),
    "too little": (
        save_too_little,
        r"What is trained lacks 'decoder.block.0.layer.0.SelfAttention.v', which this spec trains",
    ),
    "LoRA on a head that is no copy of the base's": (
        load_changed_head,
        r"replaces the weight of 'lm_head' and has LoRA on it too; PyTorch loads it",
    ),
    "a head alone": (load_head_alone, r"holds no update of LoRA's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name(case: str, tmp_path: Path) -> None:
    do, message = REFUSED[case]
    with pytest.raises((AdapterError, TargetError), match=message):
        do(tmp_path)
    assert not (tmp_path / "a/loralab.json").exists(), "nothing is half-written"
