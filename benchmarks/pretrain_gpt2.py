"""Pretraining of a GPT-2 from random weights: tokens per second, and how much of the processor its arithmetic fills.

    python benchmarks/pretrain_gpt2.py [--model gpt2] [--rows 12] [--length 1024] [--peak TFLOPS] [--json]
    python benchmarks/pretrain_gpt2.py --layers 2 --width 128 --heads 2 --vocabulary 4096 --rows 8 --length 256   # a CPU

A step is the product's own: packed rows, the loss of every token, gradients clipped at 1, AdamW. Utilisation is nanoGPT's
formula (`estimate_mfu` of its model.py, after appendix B of the PaLM paper, https://arxiv.org/abs/2204.02311): a token costs
6 · N + 12 · layers · width · length operations, forward and backward, N the parameters without those of positions; that over
what the processor promises, 312e12 for an A100, 989e12 for an H100, or --peak. On a CPU, where nobody promises anything, a
large product of matrices is measured instead.

    one text a row    rows of a single text, so that attention is plainly causal: what nanoGPT does
    packed            as many tokens in rows of several texts, none of which sees another
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loralab.config.model import ModelSizes
from loralab.config.recipe import Recipe
from loralab.data.batches import Batch
from loralab.data.tokenizer_training import GPT2, train_tokenizer
from loralab.models.gpt2 import GPT2Config, new_config
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading.random_init import write_model

RATE = 6e-4
PROMISED = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # bf16, dense, operations a second
TEXTS = 4  # of a packed row
# nanoGPT's README, December 2022: the 124 M model "from ~250ms / iter to 135ms / iter" by torch.compile, on A100s.
YARDSTICK = "nanoGPT's README has, for the 124 M model on A100 GPUs, 250 ms a step, and 135 ms compiled; its utilisation is by this formula"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="whose sizes: gpt2 (124 M), gpt2-medium, …")
    for name in ("layers", "width", "heads"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rows", type=int, default=12, help="of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, after three that are not")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peak", type=float, help="TFLOPS that the processor promises")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; all else goes to stderr")
    return parser.parse_args()


def open_model(folder: Path, given: argparse.Namespace) -> tuple[TorchEngine, GPT2Config]:
    """The product's engine around new weights."""
    sizes = ModelSizes(d_model=given.width, layers=given.layers, heads=given.heads, positions=given.length)
    config = new_config(given.model, sizes, given.vocabulary, 0, 0, None)
    train_tokenizer(["a text about nothing"], GPT2.fewest, folder, GPT2)
    write_model(config, 0, folder)
    recipe = Recipe.model_validate({
        "name": "benchmark",
        "model": {"name": str(folder), "dtype": given.dtype, "dropout": 0.0},
        "data": {"name": "none", "source": None, "target": "text", "packing": True, "max_target_length": given.length},
        "training": {"method": "full"},
        "optimizer": {"weight_decay": 0.1},
    })  # fmt: skip
    return open_engine(recipe), config


def batch(given: argparse.Namespace, texts: int, seed: int) -> Batch:
    """Random tokens in rows of so many texts."""
    rng = np.random.default_rng(seed)
    shape = given.rows, given.length
    ids, labels = rng.integers(given.vocabulary, size=(2, *shape))
    documents = np.broadcast_to(np.arange(given.length) * texts // given.length, shape).copy()
    return Batch(np.arange(given.rows), ids, np.ones(shape, dtype=bool), labels, 0, ids.size, documents)


def seconds_a_step(engine: TorchEngine, given: argparse.Namespace, texts: int) -> float:
    """The median."""
    taken = []
    for step in range(3 + given.steps):
        one = batch(given, texts, step)
        started = time.perf_counter()
        engine.train_step([one], RATE)  # ends with the loss as a number, so that all has been computed
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


def operations_a_token(config: GPT2Config, total: int, length: int) -> int:
    """nanoGPT's formula."""
    return 6 * (total - config.n_positions * config.n_embd) + 12 * config.n_layer * config.n_embd * length


def promised(given: argparse.Namespace) -> tuple[float, str]:
    """(operations a second, where that is from)."""
    if given.peak:
        return given.peak * 1e12, "--peak"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for known, peak in PROMISED.items():
            if known in name:
                return peak, f"{known}'s data sheet"
        sys.exit(f"No promise is known for {name}: give --peak TFLOPS.")
    x = torch.randn(2048, 2048, dtype=getattr(torch, given.dtype))
    taken = []
    for _ in range(8):
        started = time.perf_counter()
        x @ x
        taken.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(
        taken
    ), f"measured: a product of 2048 x 2048, {given.dtype}, {torch.get_num_threads()} threads"


def main() -> None:
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        engine, config = open_model(Path(folder), given)
        peak, source = promised(given)
        cost, tokens = operations_a_token(config, engine.total, given.length), given.rows * given.length
        results: dict[str, Any] = {
            "parameters": engine.total,
            "tokens_a_step": tokens,
            "peak": peak,
            "peak_from": source,
        }
        for name, texts in (("one text a row", 1), ("packed", TEXTS)):
            seconds = seconds_a_step(engine, given, texts)
            speed = tokens / seconds
            results[name] = {"seconds": seconds, "tokens_per_second": speed, "utilisation": cost * speed / peak}
            line = (
                f"{name:<16} {1000 * seconds:9.1f} ms a step {speed:12,.0f} tokens/s {100 * cost * speed / peak:6.1f} %"
            )
            print(line, file=sys.stderr, flush=True)
        print(
            f"{engine.total:,} parameters on {engine.device}; of {peak / 1e12:.2f} TFLOPS ({source})", file=sys.stderr
        )
        print(YARDSTICK, file=sys.stderr)
        if given.json:
            print(json.dumps(results))


if __name__ == "__main__":
    main()
