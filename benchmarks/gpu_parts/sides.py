"""The same model, the same random tokens, two sides: loralab, and PEFT on Transformers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, T5ForConditionalGeneration

from loralab.config.generation import Decoding
from loralab.config.lora import LoRASpec
from loralab.config.training import OptimizerSettings
from loralab.models import gpt2, t5
from loralab.models.gpt2 import GPT2Config
from loralab.models.t5 import T5Config
from loralab.on_torch.adapters.attach import attach
from loralab.on_torch.generation.generate import generate_ids, pad
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.output import IGNORED
from loralab.on_torch.ops.onednn_linear import prepacked_weights
from loralab.on_torch.training.forward import token_losses
from loralab.on_torch.training.optimizer import Optimizer

RATE = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY: dict[str, T5Config | GPT2Config] = {
    "t5-small": T5Config(32, 8, 64, 2, 2, 4, vocab_size=128),
    "t5-base": T5Config(32, 8, 64, 3, 3, 4, vocab_size=128),
    "flan-t5-xl": replace(t5.SIZES["flan-t5-xl"], d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2,
                          num_heads=4, vocab_size=128),
    "flan-t5-xxl": replace(t5.SIZES["flan-t5-xxl"], d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=2,
                           num_heads=4, vocab_size=128),
    "gpt2": GPT2Config(32, 2, 4, n_positions=128, vocab_size=128, bos_token_id=1, eos_token_id=1),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all parts are told."""

    device: torch.device
    tiny: bool
    rounds: int

    def config(self, name: str) -> T5Config | GPT2Config:
        """The published shape of this name; a tiny one in a dry run."""
        if self.tiny:
            return TINY[name]
        return gpt2.SIZES[name] if name == "gpt2" else t5.SIZES[name]

    def pick(self, full: int, tiny: int) -> int:
        """A size, of the full run or of a dry run."""
        return tiny if self.tiny else full


class Work:
    """Random rows that are full but for the last two tokens of the second source; labels; the same for both sides."""

    def __init__(self, vocabulary: int, rows: int, source: int, target: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.device, self.tokens = device, rows * (source + target)
        self.ids = torch.randint(2, vocabulary, (rows, source), generator=draw).to(device)
        self.mask = torch.ones_like(self.ids)
        self.mask[1:2, -2:] = 0
        self.labels = torch.randint(2, vocabulary, (rows, target), generator=draw).to(device)

    @property
    def sources(self) -> list[list[int]]:
        """The rows as lists, without padding."""
        lengths: list[int] = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]


class Side(Protocol):
    """Either side."""

    def step(self) -> float:
        """One training step; gives the loss."""

    def answer(self, new_tokens: int, beams: int) -> None:
        """Writes so many tokens after each source."""


class Ours:
    """loralab: LoRA, or with no spec all weights."""

    def __init__(self, model: nn.Module, spec: LoRASpec | None, work: Work) -> None:
        self.model, self.work = model, work
        if spec is None:
            model.requires_grad_(True)
        else:
            attach(model, spec)
        self.optimizer = Optimizer([p for p in model.parameters() if p.requires_grad], [], OptimizerSettings())

    def step(self) -> float:
        self.model.train()
        loss = token_losses(self.model, self.work.ids, self.work.mask, self.work.labels).mean()
        loss.backward()
        self.optimizer.step(RATE)
        return float(loss.detach())

    def answer(self, new_tokens: int, beams: int) -> None:
        model: Any = self.model.eval()
        if isinstance(model, GPT2):
            model.ends = (-1,)  # no answer ends early, as by the peer's min_new_tokens
        else:
            model.config = replace(model.config, eos_token_id=-1)
        with prepacked_weights(model):
            generate_ids(model, self.work.sources, Decoding(max_new_tokens=new_tokens, beams=beams), 0)


class Peer:
    """PEFT on Transformers' class; dtype autocast keeps fp32 weights and multiplies in bf16."""

    def __init__(self, model: Any, dtype: str, rules: list[str], work: Work) -> None:
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        task = "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"
        config = LoraConfig(
            r=8, lora_alpha=8, lora_dropout=0.05, target_modules=rules, task_type=task,
            fan_in_fan_out=not self.encoder_decoder,  # GPT-2's matrices are [in, out]
        )  # fmt: skip
        self.model, self.work, self.autocast = get_peft_model(model, config), work, dtype == "autocast"
        self.model.to(work.device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, fused=True)

    def _inputs(self) -> dict[str, Tensor]:
        work = self.work
        if self.encoder_decoder:
            return {"input_ids": work.ids, "attention_mask": work.mask, "labels": work.labels}
        nothing = torch.full_like(work.ids, IGNORED)
        return {
            "input_ids": torch.cat([work.ids, work.labels], 1),
            "attention_mask": torch.cat([work.mask, torch.ones_like(work.labels)], 1),
            "labels": torch.cat([nothing, work.labels], 1),
        }

    def step(self) -> float:
        self.model.train()
        with torch.autocast(self.work.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(**self._inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.inference_mode()
    def answer(self, new_tokens: int, beams: int) -> None:
        model: Any = self.model.eval()
        ids, mask = pad(self.work.sources, 0, self.work.device, "right" if self.encoder_decoder else "left")
        with torch.autocast(self.work.device.type, torch.bfloat16, enabled=self.autocast):
            model.generate(
                input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False, pad_token_id=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )  # fmt: skip


def rules_of(config: T5Config | GPT2Config) -> list[str]:
    """All of attention, as in the published experiments."""
    return ["q", "k", "v", "o"] if isinstance(config, T5Config) else ["c_attn"]


def spec_of(config: T5Config | GPT2Config, dropout: float = 0.05) -> LoRASpec:
    return LoRASpec(rank=8, alpha=8, dropout=dropout, rules=tuple(rules_of(config)), seed=0)


def their_model(folder: Path, dtype: torch.dtype, config: T5Config | GPT2Config) -> Any:
    """Transformers' class with the folder's weights."""
    kind: Any = T5ForConditionalGeneration if isinstance(config, T5Config) else GPT2LMHeadModel
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True)


def peak_of(make: Callable[[], Side], device: torch.device) -> int | None:
    """Bytes that a side alone takes at most in two steps, on a GPU; on a CPU PyTorch does not count them."""
    if device.type != "cuda":
        return None
    free()
    before = torch.cuda.memory_allocated(device)
    side = make()
    free()
    torch.cuda.reset_peak_memory_stats(device)  # what making it took at times is not counted
    side.step()
    side.step()
    del side
    peak = torch.cuda.max_memory_allocated(device) - before
    free()
    return peak


def free() -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
