"""Apple's GPUs, of which none is here: every operation that training, validation and writing ask of a device has a kernel
for them, none is in float64, and their random stream is kept like the others.

The device is pretended (pretend.py); whether an operation has a kernel is said by PyTorch's own list of operations, which
comes with it (torchgen). A composite operation needs none: it is made of others.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchgen
from classifiers import make_bases
from pretend import DEVICE, OnDevice, PretendedDevice
from tiny import make_gpt2, make_t5
from torch import Tensor

from loralab.config.generation import Decoding
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.data.batches import Batch
from loralab.errors import ModelError
from loralab.metrics.labels import Labels
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading import device as devices
from loralab.on_torch.ops.random_streams import checkpointed, random_state, set_random_state

METHODS = {
    "lora": ["lora.rank=2", "lora.dropout=0.1"],
    "dora": ["lora.rank=2", "lora.use_dora=true", "training.gradient_checkpointing=true"],
    "full": ["training.method=full"],
}
WRITING = {
    "greedy": Decoding(max_new_tokens=5, repetition_penalty=1.2),
    "beams": Decoding(max_new_tokens=5, beams=3),
    "sampling": Decoding(max_new_tokens=5, sample=True, temperature=0.8, top_k=40, top_p=0.9),
}
BATCH = Batch(
    np.arange(2), np.array([[5, 9, 11, 4], [7, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=bool),
    np.array([[8, 6, 1], [2, 1, -100]]), 6, 5,
)  # fmt: skip


# What PyTorch says of its operations


@cache
def _listed() -> Any:
    from torchgen.gen import parse_native_yaml

    folder = Path(torchgen.__file__).parent / "packaged/ATen/native"
    return parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))


@cache
def _functions() -> dict[str, Any]:
    return {str(function.func.name): function for function in _listed().native_functions}


def runs_on_apple(operation: Any) -> bool:
    """Whether there is a kernel for MPS, or one that is made of other operations."""
    from torchgen.model import DispatchKey

    namespace, name = operation.name().split("::")
    function = _functions().get(name)
    if namespace != "aten" or function is None:
        return False
    index = _listed().backend_indices[DispatchKey.MPS]
    named = (
        function.structured_delegate or function.func.name
    )  # a structured operation has the kernel of its out variant
    return bool(function.has_composite_kernel or index.has_kernel(function) or named in index.index)


def test_the_list_knows_what_runs_there_and_what_does_not() -> None:
    aten = torch.ops.aten
    for there in (aten.mm.default, aten.add.Tensor, aten.embedding_bag.default, aten._fused_adamw_.default):
        assert runs_on_apple(there), there
    for absent in (aten._scaled_dot_product_flash_attention_for_cpu.default, aten.geqrf.default):
        assert not runs_on_apple(absent), absent


# What loralab asks for


@pytest.fixture(scope="module")
def bases(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, tokenizers = tmp_path_factory.mktemp("bases"), data_folder / "tokenizers"
    return {
        "t5": make_t5(place / "t5", "untied", tokenizer=tokenizers / "t5", vocabulary=32128),
        "gpt2": make_gpt2(place / "gpt2", 50257, tokenizer=tokenizers / "gpt2"),
        **make_bases(place, tokenizers / "bert-base-uncased"),
    }


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """The device at work: recipes get it, and AdamW has its fused kernel there, as it has on MPS."""
    monkeypatch.setattr("loralab.on_torch.loading.recipe_base.choose_device", lambda _: DEVICE)
    module = importlib.import_module("torch.optim.optimizer")  # torch.optim does not give it by its name
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type])
    recorder = PretendedDevice()
    with recorder:
        yield recorder


def recipe(kind: str, base: Path, method: str) -> Recipe:
    names = [f"model.name={base}", "model.dtype=float32", "data.name=nowhere", "data.source=text", "lora.rules=null"]
    if kind == "classifier":
        return load_recipe("minilm-imdb", [*names, "data.max_source_length=32", *METHODS[method]])
    lengths = ["data.max_source_length=32", "data.max_target_length=16"]
    return load_recipe("own-data", [*names, "data.target=summary", *lengths, *METHODS[method]])


def engine_of(kind: str, bases: dict[str, Path], method: str) -> TorchEngine:
    base = bases["distilbert" if kind == "classifier" else kind]
    labels = Labels(("NEGATIVE", "POSITIVE"), (("0", "NEGATIVE"), ("1", "POSITIVE"))) if kind == "classifier" else None
    return open_engine(recipe(kind, base, method), base, labels=labels)


def batch_for(kind: str) -> Batch:
    if kind != "classifier":
        return BATCH
    return Batch(BATCH.rows, BATCH.source_ids, BATCH.source_mask, np.array([[1], [0]]), 6, 2)


def use(kind: str, engine: TorchEngine, place: Path) -> dict[str, Any]:
    """A step, a checkpoint, a validation, writing: everything that a run asks of a device."""
    batch, sources = batch_for(kind), [[5, 9, 11, 4], [7, 3]]
    found: dict[str, Any] = {"before": engine.losses(batch)}
    engine.train_step([batch], 1e-3)
    engine.save_state(place / "state")
    engine.load_state(place / "state")
    engine.train_step([batch], 1e-3)
    found["after"] = engine.losses(batch)
    if kind == "classifier":
        found["logits"] = engine.logits(batch)
        return found
    return found | {name: engine.generate(sources, decoding) for name, decoding in WRITING.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["t5", "gpt2", "classifier"])
def test_all_that_a_run_asks_of_a_device_is_there_on_apples(
    kind: str, method: str, bases: dict[str, Path], pretended: PretendedDevice, tmp_path: Path
) -> None:
    engine = engine_of(kind, bases, method)
    assert all(isinstance(parameter.data, OnDevice) for parameter in engine.model.parameters())
    found = use(kind, engine, tmp_path)
    assert len(pretended.operations) > 40
    lacking = sorted(str(operation) for operation in pretended.operations if not runs_on_apple(operation))
    assert lacking == []
    wide = {str(dtype): made for dtype, made in pretended.dtypes.items() if dtype in (torch.float64, torch.complex128)}
    assert wide == {}
    assert found["before"].dtype == np.float64, "the host sums in it"
    assert (found["after"] != found["before"]).any()


def test_the_pretended_device_computes_what_the_cpu_does(bases: dict[str, Path], pretended: PretendedDevice) -> None:
    """So what was recorded is what a run does, and no other path."""
    there = engine_of("t5", bases, "dora")
    answers = [there.generate([[5, 9, 11, 4], [7, 3]], WRITING[name]) for name in ("greedy", "beams")]
    losses = there.losses(BATCH)
    pretended.__exit__(None, None, None)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loralab.on_torch.loading.recipe_base.choose_device", lambda _: torch.device("cpu"))
            here = engine_of("t5", bases, "dora")
        assert [here.generate([[5, 9, 11, 4], [7, 3]], WRITING[name]) for name in ("greedy", "beams")] == answers
        np.testing.assert_allclose(here.losses(BATCH), losses, rtol=1e-5)
    finally:
        pretended.__enter__()


def test_float64_on_a_device_is_found(pretended: PretendedDevice) -> None:
    x = torch.ones(3, device=DEVICE)
    x.cpu().double().sum()
    assert torch.float64 not in pretended.dtypes, "after .cpu() it is the host's"
    x.double().cpu()
    assert torch.float64 in pretended.dtypes


# The random stream


class Stream:
    """What torch.mps has of a stream, with a generator of the CPU's."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def get_rng_state(self) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self.generator.set_state(state)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    found = Stream()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "mps", found)
    return found


def test_apples_stream_is_kept_with_the_others(stream: Stream) -> None:
    state = random_state()
    first = torch.rand(4, generator=stream.generator)
    set_random_state(state)
    assert torch.equal(torch.rand(4, generator=stream.generator), first)
    del state["random.mps"]  # of a checkpoint from another machine
    set_random_state(state)


def test_recomputed_activations_drop_the_same_elements(stream: Stream) -> None:
    """PyTorch does not see to it on Apple's GPUs."""
    drawn: list[Tensor] = []

    def drop(x: Tensor) -> Tensor:
        drawn.append(torch.rand(x.shape, generator=stream.generator))
        return (x * (drawn[-1] > 0.5)).sin()

    x = torch.ones(20, requires_grad=True)
    y = checkpointed(drop, x)
    after = torch.rand(1, generator=stream.generator)
    y.sum().backward()
    assert len(drawn) == 2 and torch.equal(*drawn)
    stream.generator.manual_seed(3)
    torch.rand(20, generator=stream.generator)
    assert torch.equal(torch.rand(1, generator=stream.generator), after), (
        "and the stream goes on as if nothing had been repeated"
    )


def test_a_device_without_bfloat16_takes_float32_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(devices.BFLOAT16, "trial", fail)
    monkeypatch.setattr(devices.BFLOAT16, "_known", {})
    cpu = torch.device("cpu")
    assert devices.choose_dtype("auto", cpu)[0] == torch.float32
    assert devices.choose_dtype("float32", cpu)[0] == torch.float32
    with pytest.raises(ModelError, match="does not compute in bfloat16"):
        devices.choose_dtype("bfloat16", cpu)
