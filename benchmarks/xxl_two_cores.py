"""LoRA on an 11-billion-parameter T5 in the memory of a laptop: real steps on an int8 base of FLAN-T5-XXL's shape.

    python benchmarks/xxl_two_cores.py --data ../shared/data
    python benchmarks/xxl_two_cores.py --data ../shared/data --size flan-t5-small --limit 2    # the same, in seconds

Makes a checkpoint of random weights in bf16 shards (22 GB for XXL; it looks for room first, and removes it again), loads
it in int8, puts LoRA r = 16 on q and v, and trains on one dialogue of SAMSum cut to 255 source and 50 target tokens, the
published lengths, without dropout. Prints the peak of anonymous resident memory, which is what must fit: pages of mapped
files can be dropped by the system at any time and are not counted.

Weights are drawn as T5's are, so that activations are as large as in training; but the output matrix with d_model^-½,
which gives a loss near log(vocabulary).
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import loralab
from loralab.data.readers import jsonl_records
from loralab.models.checkpoint_files import INDEX
from loralab.models.t5 import SIZES, T5Config, config_json, deviation
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.ops.dropout import set_dropout

SHARD, SPARE = 2**30, 5 * 2**30
SOURCE, TARGET = 255, 50
STATUS = Path("/proc/self/status")


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="loralab-xxl-", dir=options.folder))
    try:
        config = SIZES[options.size]
        seconds = write_checkpoint(folder, config)
        shutil.copytree(options.data / "tokenizers/t5", folder, dirs_exist_ok=True)
        with watched() as peak:
            result = train(folder, options)
    finally:
        shutil.rmtree(folder)
    result |= {"size": options.size, "writing_seconds": seconds, "peak_anonymous_gib": peak[0] / 2**30}
    print(json.dumps(result, indent=2))
    assert result["losses"][-1] < result["losses"][0], "the loss does not fall"
    assert result["peak_anonymous_gib"] < options.limit, f"more than {options.limit} GiB"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with samsum/ and tokenizers/t5/")
    parser.add_argument("--size", default="flan-t5-xxl", choices=SIZES)
    parser.add_argument("--folder", type=Path, help="where there is room; default: the system's folder for such files")
    parser.add_argument("--quantize", default="int8", choices=("int8", "nf4", "none"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--limit", type=float, default=15.0, help="GiB of anonymous memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


# The checkpoint


def write_checkpoint(folder: Path, config: T5Config) -> float:
    """Seconds that it took. Shards hold at most SHARD bytes, or one tensor."""
    start = time.perf_counter()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5(config).state_dict().items()}
    needed, free = 2 * sum(shape.numel() for shape in shapes.values()), shutil.disk_usage(folder).free
    if free < needed + SPARE:
        sys.exit(
            f"{folder} has room for {free / 2**30:.0f} GiB; {(needed + SPARE) / 2**30:.0f} are needed. See --folder."
        )
    generator, index = torch.Generator().manual_seed(0), dict[str, str]()
    for names in shards(shapes):
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file({name: draw(name, shapes[name], config, generator) for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": needed}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    return time.perf_counter() - start


def shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """The names of each shard's tensors."""
    names, size = list[str](), 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def draw(name: str, shape: torch.Size, config: T5Config, generator: torch.Generator) -> Tensor:
    """A tensor in bf16."""
    spread = config.d_model**-0.5 if name == "lm_head.weight" else deviation(name, config)
    if spread is None:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, spread, generator=generator)


# The steps


def train(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads, attaches and takes the steps."""
    start = time.perf_counter()
    quantize = None if options.quantize == "none" else options.quantize
    model, tokenizer = loralab.load_model(str(folder), "bfloat16", options.device, quantize)
    loaded = time.perf_counter()
    adapter = loralab.attach(model, loralab.LoRASpec(rank=16, alpha=32, rules=["q", "v"], seed=0))
    print(adapter, file=sys.stderr)
    set_dropout(model.train(), 0.0)
    source, target = dialogue(options.data, tokenizer, next(model.parameters()).device)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=options.rate, weight_decay=0.0)
    losses, seconds = list[float](), list[float]()
    for _ in range(options.steps):
        began = time.perf_counter()
        losses.append(step(model, optimizer, source, target))
        seconds.append(time.perf_counter() - began)
        print(f"loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", file=sys.stderr)
    losses.append(measure(model, source, target))
    gc.collect()
    return {
        "trainable": adapter.trainable,
        "total": adapter.total,
        "loading_seconds": loaded - start,
        "step_seconds": seconds,
        "losses": losses,
        "after_gib": anonymous() / 2**30,
        "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0,
    }


def dialogue(data: Path, tokenizer: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """[1, 255] and [1, 50]: the first row of SAMSum that is as long, cut."""
    for record in jsonl_records(data / "samsum/train.jsonl.gz"):
        texts = (f"summarize: {record.cells['dialogue']}", SOURCE), (record.cells["summary"], TARGET)
        ids = [tokenizer(text, truncation=True, max_length=length).input_ids for text, length in texts]
        if [len(each) for each in ids] == [SOURCE, TARGET]:
            source, target = (torch.tensor([each], device=device) for each in ids)
            return source, target
    sys.exit("No row of SAMSum is that long.")


def step(model: Any, optimizer: torch.optim.Optimizer, source: Tensor, target: Tensor) -> float:
    """The loss before the update."""
    loss: Tensor = model.token_losses(source, None, target).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def measure(model: Any, source: Tensor, target: Tensor) -> float:
    return float(model.token_losses(source, None, target).mean())


# Memory


def anonymous() -> int:
    """Bytes of memory that no file stands behind."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list whose only number is the peak so far."""
    gc.collect()
    peak, done = [anonymous()], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
