"""FLAN-T5-XL in bf16 beside PEFT and Transformers; FLAN-T5-XXL on an int8 base. Random weights, made on the device."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from peers import seconds
from torch import nn
from transformers import T5Config as TheirConfig
from transformers import T5ForConditionalGeneration

from gpu_parts.against_peft import compare
from gpu_parts.report import CannotRun, Report
from gpu_parts.sides import Ours, Peer, Setting, Side, Work, free, rules_of, spec_of
from loralab.models.t5 import T5Config, config_json, deviation
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.quantization.quantize import Int8Linear, modules_to_quantize

SPREAD_OF_CODES = math.sqrt((255**2 - 1) / 12)  # of whole numbers drawn evenly from -127 to 127


def run_xl(setting: Setting, report: Report) -> None:
    """The part xl."""
    config = _config(setting, "flan-t5-xl")
    _check_room(setting, 40e9)
    work = Work(config.vocab_size, setting.pick(8, 2), setting.pick(384, 12), setting.pick(128, 6), setting.device)

    def peer() -> Side:
        with torch.device(setting.device):
            model: Any = T5ForConditionalGeneration(TheirConfig(**config_json(config)))
        return Peer(model.to(torch.bfloat16), "bf16", rules_of(config), work)

    def ours() -> Side:
        return Ours(drawn(config, setting.device, packed=False), spec_of(config), work)

    with report.unit("flan-t5-xl bf16", setting.pick(120, 0)):
        compare("flan-t5-xl bf16", {"ours": ours, "peer, bf16": peer}, work, setting, report)
    free()


def run_xxl(setting: Setting, report: Report) -> None:
    """The part xxl: steps and writing on a base that is stored as int8. No peer: bitsandbytes' layer rounds inputs too."""
    config = _config(setting, "flan-t5-xxl")
    _check_room(setting, 30e9)
    work = Work(config.vocab_size, setting.pick(4, 2), setting.pick(255, 12), setting.pick(50, 6), setting.device)
    with report.unit("flan-t5-xxl int8", setting.pick(60, 0)):
        on_gpu = setting.device.type == "cuda"
        side = Ours(drawn(config, setting.device, packed=True), spec_of(config), work)
        base = torch.cuda.memory_allocated(setting.device) if on_gpu else None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(setting.device)
        losses = [side.step() for _ in range(2)]
        finite = all(map(math.isfinite, losses))
        report.add("flan-t5-xxl int8: losses", passed=finite, losses=losses, logarithm=math.log(config.vocab_size))
        times = [seconds(side.step) for _ in range(setting.rounds)]
        report.add(
            "flan-t5-xxl int8: seconds of a step", median=statistics.median(times), times=times, tokens=work.tokens
        )
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(setting.device)
            report.add("flan-t5-xxl int8: memory, bytes", base=base, peak=peak)
        new_tokens = setting.pick(16, 2)
        side.answer(2, 1)
        written = [seconds(lambda: side.answer(new_tokens, 1)) for _ in range(min(setting.rounds, 3))]
        median = statistics.median(written)
        report.add("flan-t5-xxl int8: seconds of writing", median=median, times=written, new_tokens=new_tokens)


def _config(setting: Setting, name: str) -> T5Config:
    config = setting.config(name)
    assert isinstance(config, T5Config)
    return config


def _check_room(setting: Setting, needed: float) -> None:
    """Raises CannotRun where the full size would not fit."""
    if setting.tiny:
        return
    if setting.device.type != "cuda":
        raise CannotRun("the full size needs a GPU; --tiny runs the same at a small size")
    free_bytes, _ = torch.cuda.mem_get_info(setting.device)
    if free_bytes < needed:
        raise CannotRun(f"about {needed / 1e9:.0f} GB of GPU memory are needed, and {free_bytes / 1e9:.0f} GB are free")


@torch.no_grad()
def drawn(config: T5Config, device: torch.device, packed: bool) -> T5:
    """A T5 with random weights in bf16; with int8 codes, drawn evenly, in the place of its linear maps' weights."""
    with torch.device("meta"):
        model = T5(config).to(torch.bfloat16)
    for name in modules_to_quantize(model) if packed else []:
        model.set_submodule(name, _codes(model.get_submodule(name), f"{name}.weight", config, device))
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{module_name}.{leaf}"
            spread = config.d_model**-0.5 if name == "lm_head.weight" else deviation(name, config)
            weight = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            setattr(module, leaf, nn.Parameter(weight if spread is None else weight.normal_(0, spread)))
    return model


def _codes(linear: nn.Module, name: str, config: T5Config, device: torch.device) -> Int8Linear:
    assert isinstance(linear.weight, torch.Tensor)
    codes = torch.randint(-127, 128, linear.weight.shape, dtype=torch.int8, device=device)
    spread = deviation(name, config)
    assert spread is not None
    scales = torch.full((len(codes),), spread / SPREAD_OF_CODES, device=device)
    return Int8Linear(codes, scales, None, False, ())
