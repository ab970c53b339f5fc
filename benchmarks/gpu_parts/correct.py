"""Whether numbers are right on this device: reloaded, merged, in PEFT and Transformers, and token by token."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gpu_parts.report import Report
from gpu_parts.sides import DTYPES, Ours, Setting, Work, free, spec_of, their_model
from loralab.config.generation import Decoding, until
from loralab.models.gpt2 import GPT2Config
from loralab.models.t5 import T5Config
from loralab.on_torch.adapters.adapter_io import load_adapter
from loralab.on_torch.adapters.attach import Adapter
from loralab.on_torch.adapters.base import ATTRIBUTE
from loralab.on_torch.engine import MERGED_TOLERANCE
from loralab.on_torch.generation.generate import generate_ids, pad
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.loading.random_init import write_model
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.ops.dropout import set_dropout

AS_PEERS = {torch.float32: 1e-4, torch.bfloat16: 6e-2}  # of the largest logit: sums in another order, bf16's 8 bits
FAMILIES = ("t5-small", "gpt2")
STEPS = 10


def run(setting: Setting, report: Report) -> None:
    """Every check, on each family in both dtypes."""
    for name in FAMILIES:
        config = setting.config(name)
        with tempfile.TemporaryDirectory() as place:
            write_model(config, 0, Path(place) / "base")
            for dtype in DTYPES:
                with report.unit(f"{name} {dtype}", setting.pick(20, 0)):
                    _check(f"{name} {dtype}", config, DTYPES[dtype], Path(place), setting, report)
                free()


def _check(
    name: str, config: T5Config | GPT2Config, dtype: torch.dtype, place: Path, setting: Setting, report: Report
) -> None:
    work = Work(config.vocab_size, 4, setting.pick(64, 12), setting.pick(32, 6), setting.device)
    ours = Ours(load_weights(place / "base", dtype, setting.device), spec_of(config, 0.0), work)
    set_dropout(ours.model, 0.0)
    losses = [ours.step() for _ in range(STEPS)]
    report.add(f"{name}: the loss falls", passed=losses[-1] < losses[0], losses=losses)
    adapter: Adapter = getattr(ours.model, ATTRIBUTE).adapters["default"]
    adapter.save(place / f"adapter {dtype}")
    live = logits(ours.model, work)
    again = load_weights(place / "base", dtype, setting.device)
    load_adapter(again, place / f"adapter {dtype}")
    report.check(f"{name}: live = reloaded", apart(live, logits(again, work)), 0.0)
    theirs = PeftModel.from_pretrained(their_model(place / "base", dtype, config), str(place / f"adapter {dtype}"))
    theirs = theirs.to(setting.device).eval()
    report.check(f"{name}: logits of PEFT and Transformers", apart(live, logits(theirs, work)), AS_PEERS[dtype])
    if dtype == torch.float32:
        for beams in (1, 4):
            same = tokens(ours.model, theirs, config, work, setting.pick(32, 6), beams)
            report.add(f"{name}: the same tokens, {beams} beams", passed=all(same), rows=len(same), equal=sum(same))
    merged = apart(live, logits(adapter.merge().eval(), work))
    report.check(f"{name}: merged", merged, MERGED_TOLERANCE[dtype])


@torch.inference_mode()
def logits(model: nn.Module, work: Work) -> Tensor:
    """In fp32, of the tokens that are no padding."""
    model.eval()
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    given = family_of(plain).inputs(plain, work.ids, work.mask, work.labels)
    found: Tensor = model(**given).logits.float()
    return found if found.shape[1] == work.labels.shape[1] else found[given["attention_mask"].bool()]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((a - b).abs().max() / a.abs().max())


@torch.inference_mode()
def tokens(
    ours: nn.Module, theirs: Any, config: T5Config | GPT2Config, work: Work, new_tokens: int, beams: int
) -> list[bool]:
    """Of each row, whether both write the same."""
    answers = generate_ids(ours.eval(), work.sources, Decoding(max_new_tokens=new_tokens, beams=beams), 0)
    reads_first = isinstance(config, T5Config)
    ids, mask = pad(work.sources, 0, work.device, "right" if reads_first else "left")
    written = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, pad_token_id=0
    )
    begun = 1 if reads_first else ids.shape[1]
    rows = [until(row[begun:], (config.eos_token_id,)) for row in written.tolist()]
    return [ours_ == theirs_ for ours_, theirs_ in zip(answers, rows, strict=True)]
