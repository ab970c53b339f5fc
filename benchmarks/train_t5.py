"""LoRA training of a T5: useful tokens per second and peak memory, here and in PEFT + Transformers, in turn.

    python benchmarks/train_t5.py [--json]

The peer is what people write: PEFT's model, Transformers' loss, PyTorch's fused AdamW, gradients clipped at 1. Each of
its settings is tried, dtype x attention x order of the rows, and the fastest one races; `by length` gives it our own
batches. Useful tokens are real source and target tokens, padding left out.

    ratio_best        our speed over the peer's at its best setting
    ratio_published   the same against the published setting: fp32, 8 rows padded to 512 + 128 tokens
    memory_ratio      our peak over the peer's at its best setting, each in a process of its own
    lora_over_full    our time of a step of full fine-tuning over that of a LoRA step
"""

from __future__ import annotations

import json
import subprocess
import sys
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
from transformers import T5ForConditionalGeneration

from loralab.data.batches import IGNORED_LABEL, Batch, plan_batches
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.data.tokenization import encode
from loralab.models.checkpoint_files import load_tokenizer
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.loading.device import choose_device
from loralab.on_torch.profiling.memory import peak_memory

RATE = 1e-3
PUBLISHED_ROWS, PUBLISHED_SOURCE, PUBLISHED_TARGET = 8, 512, 128


PUBLISHED = Setting("fp32", "eager", "padded to the maximum")


class Peer:
    """PEFT on Transformers' T5."""

    def __init__(self, base: Path, setting: Setting) -> None:
        dtype = torch.bfloat16 if setting.dtype == "bf16 weights" else torch.float32
        model = T5ForConditionalGeneration.from_pretrained(base, dtype=dtype, attn_implementation=setting.attention)
        config = LoraConfig(
            r=8, lora_alpha=8, lora_dropout=0.05, target_modules=["q", "k", "v", "o"], task_type="SEQ_2_SEQ_LM"
        )
        self.device = choose_device("auto")
        self.model = get_peft_model(model, config).to(self.device).train()
        self.autocast = setting.dtype == "autocast"
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, fused=True)

    def step(self, batch: Batch) -> None:
        arrays = (batch.source_ids, batch.source_mask, batch.labels)
        ids, mask, labels = (torch.from_numpy(array).to(self.device) for array in arrays)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # which every loop logs


class Ours:
    """loralab's engine."""

    def __init__(self, base: Path, data: Path, *overrides: str) -> None:
        self.engine: TorchEngine = open_engine(recipe_for(base, data, *overrides))

    def step(self, batch: Batch) -> None:
        self.engine.train_step([batch], RATE)


class Rows:
    """The same rows in every side's batches."""

    def __init__(self, base: Path, options: Namespace) -> None:
        recipe = recipe_for(base, options.data)
        split = read_split(recipe.data.model_copy(update={"max_train_rows": options.rows}), "train")
        tokenizer = load_tokenizer(base)
        self.encoded = encode(split, tokenizer, Prompt(recipe.data.prompt, "dialogue"), 512, 128)
        self.pad_id = int(tokenizer.pad_token_id)
        self.steps = options.steps
        self.ours = self._planned(options.tokens)

    def _planned(self, tokens: int) -> list[Batch]:
        lengths = self.encoded.source_lengths, self.encoded.target_lengths
        plan = plan_batches(*lengths, tokens_per_batch=tokens, batch_size=None, seed=0, epoch=0)
        return [self.encoded.collate(rows, self.pad_id) for rows in plan[: self.steps]]

    def batches(self, setting: Setting) -> list[Batch]:
        """Of the peer: ours, or as many random rows, or the published ones."""
        if setting.order == "by length":
            return self.ours
        if setting == PUBLISHED:
            chosen = self._random(PUBLISHED_ROWS)
            return [to_maximum(batch, self.pad_id) for batch in chosen]
        return self._random(round(float(np.mean([len(batch.rows) for batch in self.ours]))))

    def _random(self, count: int) -> list[Batch]:
        order = np.random.default_rng(0).permutation(len(self.encoded))
        return [self.encoded.collate(order[i * count : (i + 1) * count], self.pad_id) for i in range(self.steps)]


def to_maximum(batch: Batch, pad_id: int) -> Batch:
    """The batch, padded to the published lengths."""
    source, target = PUBLISHED_SOURCE - batch.source_ids.shape[1], PUBLISHED_TARGET - batch.labels.shape[1]
    right = ((0, 0), (0, source))
    return Batch(
        batch.rows,
        np.pad(batch.source_ids, right, constant_values=pad_id),
        np.pad(batch.source_mask, right),
        np.pad(batch.labels, ((0, 0), (0, target)), constant_values=IGNORED_LABEL),
        batch.num_source_tokens,
        batch.num_target_tokens,
    )


def speed(side: Peer | Ours, batches: Sequence[Batch]) -> float:
    """Useful tokens per second over these batches."""
    tokens = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    return tokens / seconds(lambda: [side.step(batch) for batch in batches])


def search(base: Path, rows: Rows) -> dict[str, float]:
    """Each setting of the peer and its speed."""
    grid = {}
    for setting in GRID:
        peer, batches = Peer(base, setting), rows.batches(setting)
        peer.step(batches[0])  # the first step allocates
        grid[str(setting)] = speed(peer, batches)
        say(f"  {setting!s:<32} {grid[str(setting)]:>10,.0f} tokens/s")
    return grid


def peak(base: Path, options: Namespace, side: str) -> int:
    """Bytes that training adds to a fresh process, or the GPU's peak there."""
    given = {"memory-of": side, "base": base, "data": options.data, "threads": options.threads}
    given |= {"steps": options.steps, "tokens": options.tokens, "rows": options.rows}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure_memory(base: Path, options: Namespace) -> None:
    """The child's part of `peak`."""
    rows, device = Rows(base, options), choose_device("auto")
    setting = next((each for each in GRID if str(each) == options.memory_of), None)
    before = 0 if device.type == "cuda" else peak_memory(device)
    side = Ours(base, options.data) if setting is None else Peer(base, setting)
    speed(side, rows.ours if setting is None else rows.batches(setting))
    print(peak_memory(device) - before)


def measure(base: Path, options: Namespace) -> dict[str, Any]:
    """Everything; see the top."""
    rows = Rows(base, options)
    say("The peer's settings:")
    grid = search(base, rows)
    best = next(setting for setting in GRID if str(setting) == max(grid, key=lambda name: grid[name]))
    ours, peer = Ours(base, options.data), Peer(base, best)
    say(f"Ours ({ours.engine.dtype}) against {best}, useful tokens per second:")
    against_best = race(
        {"ours": lambda: speed(ours, rows.ours), "peer": lambda: speed(peer, rows.batches(best))}, options.rounds
    )
    published = Peer(base, PUBLISHED)
    say(f"Ours against {PUBLISHED}:")
    against_published = race(
        {"ours": lambda: speed(ours, rows.ours), "peer": lambda: speed(published, rows.batches(PUBLISHED))},
        options.rounds,
    )
    full = Ours(base, options.data, "training.method=full")
    say("Our LoRA against our full fine-tuning, useful tokens per second:")
    against_full = race(
        {"lora": lambda: speed(ours, rows.ours), "full": lambda: speed(full, rows.ours)}, options.rounds
    )
    memory = {"ours": peak(base, options, "ours"), "peer": peak(base, options, str(best))}
    return {
        "ratio_best": ratio(against_best["ours"], against_best["peer"]),
        "ratio_published": ratio(against_published["ours"], against_published["peer"]),
        "memory_ratio": memory["ours"] / memory["peer"],
        "lora_over_full": ratio(against_full["lora"], against_full["full"]),
        "ours": {"dtype": ours.engine.dtype, "tokens_per_second": against_best["ours"]},
        "peer": {"setting": str(best), "tokens_per_second": against_best["peer"], "grid": grid},
        "memory_bytes": memory,
        "batches": {"tokens": options.tokens, "of_a_turn": options.steps},
        "machine": {**machine(), "peft": peft.__version__},
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=4096, help="padded tokens a batch")
    parser.add_argument("--steps", type=int, default=2, help="batches a turn")
    parser.add_argument("--rows", type=int, default=2000, help="of DialogSum's training split")
    parser.add_argument("--memory-of", metavar="SIDE", help="what the benchmark asks of its child processes")
    parser.add_argument("--base", type=Path, help="and on which model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        return measure_memory(options.base, options)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(make_base(Path(folder), options.data), options)
    print(json.dumps(results, indent=2) if options.json else summary(results))


def summary(results: dict[str, Any]) -> str:
    lines = [f"The peer's best setting: {results['peer']['setting']}; ours: {results['ours']['dtype']}"]
    for name in ("ratio_best", "ratio_published", "lora_over_full"):
        value = results[name]
        lines.append(f"{name:<16} {value['median']:.2f}  [{value['least']:.2f}, {value['most']:.2f}]")
    return "\n".join([*lines, f"{'memory_ratio':<16} {results['memory_ratio']:.2f}"])


if __name__ == "__main__":
    main()
