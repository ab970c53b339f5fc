"""A full training step of GPT-2 124M: a plain PyTorch model as people write it for pretraining, compiled or not, beside ours.

Both have the same weights, which the same loss in fp32 proves; dropout is off, as in pretraining. The plain side
keeps fp32 weights and multiplies in bf16 under autocast, with fused AdamW; ours keeps bf16 weights with fp32 copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peers import race, seconds
from torch import Tensor, nn

from gpu_parts.against_peft import summary
from gpu_parts.report import Report
from gpu_parts.sides import RATE, Setting, free, peak_of
from loralab.config.training import OptimizerSettings
from loralab.models.gpt2 import GPT2Config, deviation
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.training.optimizer import Optimizer

COMPILING = 150.0  # seconds that must be left for it


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.c_attn(x).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        mixed: Tensor = self.c_proj(y.transpose(1, 2).reshape(rows, length, width))
        return mixed


class FeedForward(nn.Module):
    """Two maps with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Plain(nn.Module):
    """GPT-2; the names of its weights are those of checkpoints."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.n_embd
        blocks = nn.ModuleList([Block(width, config.n_head) for _ in range(config.n_layer)])
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, width),
                "wpe": nn.Embedding(config.n_positions, width),
                "h": blocks,
                "ln_f": nn.LayerNorm(width),
            }
        )

    def forward(self, ids: Tensor, following: Tensor) -> Tensor:
        """The mean loss."""
        parts: Any = self.transformer
        x = parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1], device=ids.device))
        for block in parts["h"]:
            x = block(x)
        logits = F.linear(parts["ln_f"](x), parts["wte"].weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


class PlainSide:
    """Its training step."""

    def __init__(self, weights: dict[str, Tensor], config: GPT2Config, ids: Tensor, compiled: bool) -> None:
        model = Plain(config).to(ids.device)
        model.load_state_dict(weights)
        self.ids, self.parameters = ids, list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        self.model: Any = torch.compile(model) if compiled else model

    def step(self) -> float:
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            loss = self.model(self.ids[:, :-1], self.ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def answer(self, new_tokens: int, beams: int) -> None:
        raise NotImplementedError("this side trains only")


class OurSide:
    """loralab's, of all weights."""

    def __init__(self, weights: dict[str, Tensor], config: GPT2Config, ids: Tensor) -> None:
        self.model, self.ids = GPT2(config).to(ids.device), ids
        self.model.load_state_dict(weights)
        self.model.to(torch.bfloat16).train()
        self.optimizer = Optimizer(list(self.model.parameters()), [], OptimizerSettings())

    def step(self) -> float:
        loss = self.model.token_losses(self.ids[:, :-1], None, self.ids[:, 1:]).mean()
        loss.backward()
        self.optimizer.step(RATE)
        return float(loss.detach())

    def answer(self, new_tokens: int, beams: int) -> None:
        raise NotImplementedError("this side trains only")


def run(setting: Setting, report: Report) -> None:
    """The same loss, then memory, then all sides in turn."""
    known = setting.config("gpt2")
    assert isinstance(known, GPT2Config)
    # A vocabulary that is a multiple of 64, as it is padded for pretraining.
    config = replace(known, vocab_size=-(-known.vocab_size // 64) * 64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    weights = _weights(config)
    shape = setting.pick(16, 2), setting.pick(1024, 24) + 1
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(setting.device)
    with report.unit("the same loss in fp32", setting.pick(20, 0)):
        report.check("plain and ours: loss in fp32", _losses_apart(weights, config, ids[:1]), 1e-5)
    makers: dict[str, Callable[[], PlainSide | OurSide]] = {
        "ours": lambda: OurSide(weights, config, ids),
        "plain": lambda: PlainSide(weights, config, ids, compiled=False),
    }
    with report.unit("steps in turn", setting.pick(60, 0)):
        report.add("peak memory, bytes", **{side: peak_of(make, setting.device) for side, make in makers.items()})
        sides: dict[str, PlainSide | OurSide] = {side: make() for side, make in makers.items()}
        if setting.tiny or report.left < COMPILING:
            report.add("plain, compiled", reason="not tried: a dry run, or too little time is left")
        else:
            _add_compiled(sides, lambda: PlainSide(weights, config, ids, compiled=True), report)
        _race(sides, ids.numel() - len(ids), setting, report)
    free()


def _add_compiled(sides: dict[str, Any], make: Callable[[], PlainSide], report: Report) -> None:
    """The compiled side, where the compiler works."""
    side = make()
    try:
        took = seconds(side.step)
    except Exception as error:  # a compiler that is not there, or that fails: each raises its own
        report.add("plain, compiled", reason=next(iter(str(error).strip().splitlines()), type(error).__name__))
        return
    report.add("plain, compiled: seconds of compiling and a step", seconds=took)
    sides["plain, compiled"] = side


def _race(sides: dict[str, PlainSide | OurSide], tokens: int, setting: Setting, report: Report) -> None:
    steps = setting.pick(5, 1)
    for side in sides.values():
        side.step()

    def turn(side: PlainSide | OurSide) -> float:
        return seconds(lambda: [side.step() for _ in range(steps)]) / steps

    times = race({name: partial(turn, side) for name, side in sides.items()}, setting.rounds)
    report.add("seconds of a step", **summary(times), tokens_of_a_step=tokens)


def _weights(config: GPT2Config) -> dict[str, Tensor]:
    """New ones, under the names of both models."""
    generator, found = torch.Generator().manual_seed(0), dict[str, Tensor]()
    with torch.device("meta"):
        shapes = GPT2(config).state_dict()
    for name, tensor in shapes.items():
        spread = deviation(name, config)
        if spread is not None:
            found[name] = torch.randn(tensor.shape, generator=generator) * spread
        else:
            found[name] = torch.zeros(tensor.shape) if name.endswith(".bias") else torch.ones(tensor.shape)
    return found


@torch.no_grad()
def _losses_apart(weights: dict[str, Tensor], config: GPT2Config, ids: Tensor) -> float:
    """The difference of the mean losses, of the loss."""
    plain, ours = Plain(config).to(ids.device), GPT2(config).to(ids.device).eval()
    plain.load_state_dict(weights)
    ours.load_state_dict(weights)
    theirs = float(plain(ids[:, :-1], ids[:, 1:]))
    mine = float(ours.token_losses(ids[:, :-1], None, ids[:, 1:]).mean())
    return abs(mine - theirs) / theirs
