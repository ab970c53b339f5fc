"""Training a GPT-2 of 124 M parameters: useful tokens per second, here and in Transformers (with PEFT for LoRA), in turn.

    python benchmarks/train_gpt2.py [--json]

Prompt and answer are one sequence, of which the answer alone is learnt. The peer is what people write: Transformers' loss
with -100 in the labels' prompt, PyTorch's fused AdamW, gradients clipped at 1. Each of its settings is tried, dtype x
attention x order of the rows, and the fastest one races; `by length` gives it our own batches. Useful tokens are real
ones, padding left out.

    ratio_lora    our speed over the peer's at its best setting, LoRA of rank 8 on c_attn and both c_proj
    ratio_full    the same with every weight trained, the peer at that setting too
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peers import GRID, Setting, arguments, machine, make_base, race, ratio, recipe_for, say, seconds
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2LMHeadModel

from loralab.data.batches import Batch, plan_batches
from loralab.data.splits import read_split
from loralab.data.tokenization import encode
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading.device import choose_device
from loralab.on_torch.models.causal import join

RATE = 1e-3
TARGETS = ["c_attn", "c_proj"]


class Peer:
    """Transformers' GPT-2, with PEFT's LoRA or whole."""

    def __init__(self, base: Path, setting: Setting, method: str) -> None:
        dtype = torch.bfloat16 if setting.dtype == "bf16 weights" else torch.float32
        model: Any = GPT2LMHeadModel.from_pretrained(base, dtype=dtype, attn_implementation=setting.attention)
        if method == "lora":
            config = LoraConfig(
                r=8, lora_alpha=8, lora_dropout=0.05, target_modules=TARGETS, fan_in_fan_out=True, task_type="CAUSAL_LM"
            )
            model = get_peft_model(model, config)
        self.device = choose_device("auto")
        self.model: nn.Module = model.to(self.device).train()
        self.autocast = setting.dtype == "autocast"
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)

    def step(self, batch: Batch) -> None:
        arrays = (batch.source_ids, batch.source_mask, batch.labels)
        ids, mask, following = join(*(torch.from_numpy(array) for array in arrays))
        labels = torch.full_like(following, -100)
        labels[:, 1:] = following[:, :-1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            loss = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()}).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which every loop logs


class Ours:
    """loralab's engine."""

    def __init__(self, base: Path, options: Namespace, *overrides: str) -> None:
        self.engine: TorchEngine = open_engine(recipe(base, options, *overrides))

    def step(self, batch: Batch) -> None:
        self.engine.train_step([batch], RATE)


def recipe(base: Path, options: Namespace, *overrides: str) -> Any:
    return recipe_for(base, options.data, f"lora.rules=[{', '.join(TARGETS)}]", *overrides)


class Rows:
    """The same rows in every side's batches."""

    def __init__(self, base: Path, options: Namespace) -> None:
        settings, engine = recipe(base, options), Ours(base, options, "training.method=none").engine
        split = read_split(settings.data.model_copy(update={"max_train_rows": options.rows}), "train")
        self.encoded, self.pad_id = encode(split, engine.tokenizer, engine.prompt, 512, 128), engine.pad_id
        lengths = self.encoded.source_lengths, self.encoded.target_lengths
        plan = plan_batches(*lengths, tokens_per_batch=options.tokens, batch_size=None, seed=0, epoch=0)
        self.ours = [self.encoded.collate(rows, self.pad_id) for rows in plan[: options.steps]]

    def batches(self, order: str) -> list[Batch]:
        """Of the peer: ours, or as many random rows."""
        if order == "by length":
            return self.ours
        rows, count = np.random.default_rng(0).permutation(len(self.encoded)), 0
        batches = []
        for batch in self.ours:
            batches.append(self.encoded.collate(rows[count : count + len(batch.rows)], self.pad_id))
            count += len(batch.rows)
        return batches


def speed(side: Peer | Ours, batches: Sequence[Batch]) -> float:
    """Useful tokens per second over these batches."""
    tokens = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    return tokens / seconds(lambda: [side.step(batch) for batch in batches])


def search(base: Path, rows: Rows) -> dict[str, float]:
    """Each setting of the peer and its speed with LoRA."""
    grid = {}
    for setting in GRID:
        peer, batches = Peer(base, setting, "lora"), rows.batches(setting.order)
        peer.step(batches[0])  # the first step allocates
        grid[str(setting)] = speed(peer, batches)
        say(f"  {setting!s:<32} {grid[str(setting)]:>10,.0f} tokens/s")
    return grid


def against(base: Path, rows: Rows, options: Namespace, setting: Setting, method: str) -> dict[str, list[float]]:
    """Useful tokens per second, round by round."""
    ours, peer = Ours(base, options, f"training.method={method}"), Peer(base, setting, method)
    say(f"Ours ({method}, {ours.engine.dtype}) against {setting}, useful tokens per second:")
    for side in (ours, peer):
        side.step(rows.ours[0])
    turns = {"ours": lambda: speed(ours, rows.ours), "peer": lambda: speed(peer, rows.batches(setting.order))}
    return race(turns, options.rounds)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens a batch")
    parser.add_argument("--steps", type=int, default=1, help="batches a turn")
    parser.add_argument("--rows", type=int, default=600, help="of DialogSum's training split")
    parser.add_argument("--layers", type=int, default=12, help="of the model; fewer for a first look")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), options.data, "gpt2", n_layer=options.layers)
        rows = Rows(base, options)
        say("The peer's settings:")
        grid = search(base, rows)
        best = next(setting for setting in GRID if str(setting) == max(grid, key=lambda name: grid[name]))
        raced = {method: against(base, rows, options, best, method) for method in ("lora", "full")}
    results: dict[str, Any] = {
        f"ratio_{method}": ratio(found["ours"], found["peer"]) for method, found in raced.items()
    }
    results |= {"setting": str(best), "grid": grid, "tokens_per_second": raced}
    results |= {"batches": {"tokens": options.tokens, "of_a_turn": options.steps, "layers": options.layers}}
    results["machine"] = {**machine(), "peft": peft.__version__}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(f"The peer's best setting: {best}")
    for method in raced:
        value = results[f"ratio_{method}"]
        print(f"ratio_{method:<6} {value['median']:.2f}  [{value['least']:.2f}, {value['most']:.2f}]")


if __name__ == "__main__":
    main()
