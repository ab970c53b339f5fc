"""A LoRA step's time, its peak memory, and writing: here and in PEFT on Transformers, in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import race, ratio, seconds

from gpu_parts.report import Report
from gpu_parts.sides import DTYPES, Ours, Peer, Setting, Side, Work, free, peak_of, rules_of, spec_of, their_model
from loralab.models.gpt2 import GPT2Config
from loralab.models.t5 import T5Config
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.loading.random_init import write_model

MODELS = ("t5-small", "gpt2", "t5-base")
PEERS = {"fp32": ("fp32",), "bf16": ("bf16", "autocast")}  # ours -> the peer's dtypes that it is compared with
Makers = dict[str, Callable[[], Side]]


def run(setting: Setting, report: Report) -> None:
    """Each model in bf16, then each in fp32."""
    took = 0.0
    with tempfile.TemporaryDirectory() as place:
        for dtype in reversed(DTYPES):
            for name in MODELS:
                config, folder = setting.config(name), Path(place) / name
                with report.unit(f"{name} {dtype}", max(setting.pick(45, 0), 1.2 * took)):
                    began = time.monotonic()
                    if not folder.exists():
                        write_model(config, 0, folder)
                    rows, source, target = setting.pick(16, 2), setting.pick(384, 12), setting.pick(128, 6)
                    work = Work(config.vocab_size, rows, source, target, setting.device)
                    compare(f"{name} {dtype}", makers(config, folder, dtype, work), work, setting, report)
                    took = time.monotonic() - began
                free()


def makers(config: T5Config | GPT2Config, folder: Path, dtype: str, work: Work) -> Makers:
    """Name -> what makes that side."""

    def ours() -> Side:
        return Ours(load_weights(folder, DTYPES[dtype], work.device), spec_of(config), work)

    def peer(kind: str) -> Side:
        model = their_model(folder, torch.float32 if kind == "autocast" else DTYPES[kind], config)
        return Peer(model, kind, rules_of(config), work)

    return {"ours": ours, **{f"peer, {kind}": partial(peer, kind) for kind in PEERS[dtype]}}


def compare(name: str, makers: Makers, work: Work, setting: Setting, report: Report) -> None:
    """Memory of each side alone; then all sides in turn, training and writing."""
    memory = {side: peak_of(make, setting.device) for side, make in makers.items()}
    report.add(f"{name}: peak memory, bytes", **memory)
    sides = {side: make() for side, make in makers.items()}
    steps, new_tokens = setting.pick(8, 1), setting.pick(64, 3)
    for side in sides.values():  # the first calls allocate
        side.step()
        side.answer(2, 1)

    def train(side: Side) -> float:
        return seconds(lambda: [side.step() for _ in range(steps)]) / steps

    def write(side: Side) -> float:
        return seconds(lambda: side.answer(new_tokens, 1))

    what: dict[str, Callable[[Side], float]] = {"seconds of a step": train, "seconds of writing": write}
    for words, work_of in what.items():
        times = race({each: partial(work_of, side) for each, side in sides.items()}, setting.rounds)
        report.add(f"{name}: {words}", **summary(times), tokens_of_a_step=work.tokens, new_tokens=new_tokens)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """The median of each side, each peer's time over ours with its spread, and all that was measured."""
    medians = {side: statistics.median(values) for side, values in times.items()}
    ratios = {f"{side} / ours": ratio(values, times["ours"]) for side, values in times.items() if side != "ours"}
    return {"medians": medians, "ratios": ratios, "times": times}
