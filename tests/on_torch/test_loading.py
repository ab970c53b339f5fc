"""Bases in many files and larger than is comfortable: what is missing is named first, and little memory beside the model is used."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU, make_t5, ours, shard
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loralab import LoRASpec, attach
from loralab.errors import ModelError
from loralab.models.t5 import T5Config, config_json
from loralab.on_torch.adapters import merge
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.loading.weights import read_weights
from loralab.on_torch.models import own_family, t5_family
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.quantization import quantize
from loralab.on_torch.quantization.quantize import Quantization

STATUS = Path("/proc/self/status")


def as_bin(folder: Path, shards: int = 1, dtype: torch.dtype = torch.float16, zipped: bool = True) -> Path:
    """The folder's weights as `.bin` instead, as older published models are."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for part in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{part:05}.bin"
        names = sorted(weights)[part::shards]
        torch.save({name: weights[name] for name in names}, folder / file, _use_new_zipfile_serialization=zipped)
        index |= dict.fromkeys(names, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def in_fp16(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


# Twenty shards, one of them missing or cut off


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(t5_family, "T5", never)
    monkeypatch.setattr(own_family, "read_weights", never)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", never)


def twenty(folder: Path, kind: str) -> list[Path]:
    make_t5(folder, "untied")
    if kind == "bin":
        as_bin(folder, 20)
    else:
        shard(folder, 20)
    if kind == "llama":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return sorted(folder.glob("*.bin" if kind == "bin" else "*.safetensors"))


@pytest.mark.parametrize("kind", ["t5", "llama", "bin"])
@pytest.mark.parametrize("how", [None, Quantization("int8")], ids=["plain", "int8"])
def test_one_of_twenty_shards_is_missing_or_cut_off(
    kind: str, how: Quantization | None, tmp_path: Path, nothing_is_read: None
) -> None:
    files = twenty(tmp_path / "base", kind)
    assert len(files) == 20
    whole = files[13].read_bytes()
    files[13].write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=rf"{files[13].name} is (damaged or )?cut off.*Download or copy it again"):
        load_weights(tmp_path / "base", torch.float32, CPU, how)
    files[13].unlink()
    with pytest.raises(ModelError, match=f"names 20 shards, of which 1 are missing: {files[13].name}"):
        load_weights(tmp_path / "base", torch.float32, CPU, how)


# Storage


@pytest.mark.parametrize(
    "store", [in_fp16, as_bin, lambda folder: as_bin(folder, 3)], ids=["fp16", "bin", "bin-shards"]
)
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_half_precision_and_bin_are_packed_as_their_values_in_fp32_are(store: Any, kind: str, tmp_path: Path) -> None:
    stored = store(make_t5(tmp_path / "base", "untied", width=64))
    plain = make_t5(tmp_path / "plain", "untied", width=64)
    values = {name: tensor.half().float() for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    one, other = (
        load_weights(folder, torch.float32, CPU, Quantization(kind)).state_dict() for folder in (stored, plain)
    )
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name


def test_a_bin_from_before_zip_files_is_read(tmp_path: Path) -> None:
    expected = ours(make_t5(tmp_path / "base")).state_dict()
    found = ours(as_bin(tmp_path / "base", dtype=torch.float32, zipped=False)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# Memory


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def save_llama(folder: Path) -> Path:
    """54 million weights in bf16 shards of at most 20 MB: an architecture that is not ours."""
    config = LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="20MB")
    return folder


def save_large_t5(folder: Path) -> Path:
    """61 million weights in fp16."""
    config = T5Config(1024, 64, 2048, 3, 3, 16, vocab_size=200, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5(config).state_dict().items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    weights = {name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CASES = {
    "t5 int8": (save_large_t5, "int8"),
    "llama nf4": (save_llama, "nf4"),
    "bin int8": (lambda folder: as_bin(save_large_t5(folder), 4), "int8"),
}


@pytest.mark.skipif(not STATUS.exists(), reason="Linux counts anonymous memory")
@pytest.mark.parametrize("case", CASES)
def test_loading_takes_little_more_than_the_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, kind = CASES[case]
    folder = save(tmp_path / "base")
    load_weights(
        make_t5(tmp_path / "warm", width=64), torch.float32, CPU, Quantization(kind)
    )  # libraries, thread pools
    gc.collect()
    peak, (make, pack_part) = [anonymous()], quantize.KINDS[kind]

    def watching(part: Tensor) -> Any:
        packed = pack_part(part)
        peak.append(anonymous())
        return packed

    monkeypatch.setitem(quantize.KINDS, kind, (make, watching))
    model = load_weights(folder, torch.bfloat16, CPU, Quantization(kind))
    peak.append(anonymous())
    final = sum(tensor.nbytes for tensor in model.state_dict().values())
    sizes = [tensor.nbytes for _, tensor in read_weights(folder)]
    parts = (
        32 * quantize.ROWS
    )  # bytes: fp32 copies of the part that is being packed, and the heap's holes; of fixed size
    bound = 1.15 * final + max(sizes) + parts
    assert len(peak) > 20 and sum(sizes) + final > bound, (
        "a careless loader, which holds the files and the model, breaks it"
    )
    assert max(peak) - peak[0] < bound


# Merging


def test_a_merged_model_is_written_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_t5(tmp_path / "base", "untied")
    make_tokenizer_beside(base)
    adapter = attach(load_weights(base, torch.float32, CPU, Quantization("int8")), LoRASpec(rank=4, tune_vectors=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter.save(tmp_path / "adapter")
    merge.merge_folder(str(base), tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(merge, "SHARD", 40_000)
    merge.merge_folder(str(base), tmp_path / "adapter", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    expected = adapter.merge().state_dict()
    for folder in ("whole", "parts"):
        found = ours(tmp_path / folder).state_dict()
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def make_tokenizer_beside(folder: Path) -> None:
    from tiny import make_tokenizer

    make_tokenizer(["a b c"]).save_pretrained(folder)
