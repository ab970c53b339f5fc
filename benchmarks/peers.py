"""What the benchmarks share: the model that all train, real rows, a fair race, and ratios with their spread.

The models have T5-small's and GPT-2's shape with random weights, as speed does not depend on what they say; the rows are
DialogSum's, in the published prompt and each model's tokens.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GPT2LMHeadModel, T5ForConditionalGeneration
from transformers.utils import logging

from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.models.checkpoint_files import load_tokenizer

DATA = Path(os.environ.get("LORALAB_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SMALL = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}

Turn = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """How the peer is run."""

    dtype: str
    attention: str
    order: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.attention}, {self.order}"


GRID = [
    Setting(*choice)
    for choice in itertools.product(("fp32", "autocast", "bf16 weights"), ("eager", "sdpa"), ("random", "by length"))
]


def arguments(about: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with dialogsum/ and tokenizers/")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side takes its turn")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; all else goes to stderr")
    return parser


def make_base(folder: Path, data: Path, family: str = "t5", **sizes: int) -> Path:
    """A folder with a random model and its tokenizer, as the hub would hold it; `sizes` in the place of GPT-2's."""
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.for_model(family, **(SMALL if family == "t5" else sizes))
    kind: Any = T5ForConditionalGeneration if family == "t5" else GPT2LMHeadModel
    kind(config).save_pretrained(folder)
    load_tokenizer(data / "tokenizers" / family).save_pretrained(folder)
    return folder


def recipe_for(base: Path, data: Path, *overrides: str) -> Recipe:
    """The published experiment on DialogSum with LoRA of rank 8 on all of attention."""
    lora = ["lora.rank=8", "lora.alpha=8", "lora.rules=[q, k, v, o]", "lora.dropout=0.05"]
    places = [f"model.name={base}", f"data.name={data / 'dialogsum'}", "data.max_target_length=128"]
    settings = [*places, *lora, *overrides]
    if {"training.method=full", "training.method=none"} & {*overrides}:
        settings = [each for each in settings if not each.startswith("lora.")]  # which have no effect there
    return load_recipe("flan-t5-base-dialogsum", settings)


def race(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """What each side's turn returned, round by round; the sides change places every round."""
    results: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds):
        for name in list(turns) if turn % 2 == 0 else list(reversed(turns)):
            results[name].append(turns[name]())
        say(
            f"  round {turn + 1}/{rounds}: "
            + ", ".join(f"{name} {values[-1]:,.4g}" for name, values in results.items())
        )
    return results


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, with the least and the largest."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, waiting for a GPU to end."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Where this was measured."""
    names = (
        [torch.cuda.get_device_name()] if torch.cuda.is_available() else [platform.processor() or platform.machine()]
    )
    versions = {"torch": torch.__version__, "transformers": version("transformers"), "numpy": np.__version__}
    return {"device": names[0], "threads": torch.get_num_threads(), **versions}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
