"""Generation with a T5, greedy and by 4 beams: time, here and by Transformers' `generate`, in turn.

    python benchmarks/generate_t5.py [--json]

Both answer the same dialogues with as many tokens. The peer's settings are searched, dtype x attention x order of the
rows (random, or by length as we sort them), and the fastest one races. The model's weights are random, so no answer
ends before its last token.

    ratio_greedy, ratio_beam4    the peer's time over ours
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import GRID, Setting, arguments, machine, make_base, race, ratio, recipe_for, say, seconds
from transformers import T5ForConditionalGeneration

from loralab.config.generation import Decoding
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.data.tokenization import encode_sources
from loralab.models.checkpoint_files import load_tokenizer
from loralab.on_torch.engine import TorchEngine, open_engine
from loralab.on_torch.generation.generate import pad
from loralab.on_torch.loading.device import choose_device


class Peer:
    """Transformers' T5 and its `generate`."""

    def __init__(self, base: Path, setting: Setting, beams: int, options: Namespace) -> None:
        dtype = torch.bfloat16 if setting.dtype == "bf16 weights" else torch.float32
        self.device, self.setting, self.options = choose_device("auto"), setting, options
        model: Any = T5ForConditionalGeneration.from_pretrained(
            base, dtype=dtype, attn_implementation=setting.attention
        )
        self.model = model.to(self.device).eval()
        self.lengths = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens}
        self.beams = beams

    @torch.inference_mode()
    def answer(self, sources: list[list[int]]) -> None:
        rows = sorted(sources, key=len, reverse=True) if self.setting.order == "by length" else sources
        for start in range(0, len(rows), self.options.batch_size):
            ids, mask = pad(rows[start : start + self.options.batch_size], 0, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.dtype == "autocast"):
                self.model.generate(
                    input_ids=ids, attention_mask=mask, num_beams=self.beams, do_sample=False, **self.lengths
                )


class Ours:
    """loralab's engine; its batches are its own affair."""

    def __init__(self, base: Path, beams: int, options: Namespace) -> None:
        self.engine: TorchEngine = open_engine(recipe_for(base, options.data, "training.method=none"))
        model: Any = self.engine.model
        model.config = replace(model.config, eos_token_id=-1)  # no answer ends early, as by the peer's min_new_tokens
        self.decoding = Decoding(max_new_tokens=options.new_tokens, beams=beams)

    def answer(self, sources: list[list[int]]) -> None:
        self.engine.generate(sources, self.decoding)


def sources_of(base: Path, options: Namespace) -> list[list[int]]:
    """Dialogues in the published prompt, in random order."""
    recipe = recipe_for(base, options.data)
    split = read_split(recipe.data.model_copy(update={"max_validation_rows": options.rows}), "validation")
    prompt = Prompt(recipe.data.prompt, "dialogue")
    ids, _ = encode_sources([row.source for row in split.examples], load_tokenizer(base), prompt, 512)
    return [ids[i] for i in np.random.default_rng(0).permutation(len(ids))]


def measure(base: Path, options: Namespace, beams: int) -> dict[str, Any]:
    """The peer's grid, then its best setting against ours."""
    sources, grid = sources_of(base, options), {}
    say(f"The peer's settings with {beams} beam{'s' if beams > 1 else ''}:")
    for setting in GRID:
        peer = Peer(base, setting, beams, options)
        grid[str(setting)] = seconds(partial(peer.answer, sources))
        say(f"  {setting!s:<32} {grid[str(setting)]:8.2f} s")
    best = next(setting for setting in GRID if str(setting) == min(grid, key=lambda name: grid[name]))
    ours, peer = Ours(base, beams, options), Peer(base, best, beams, options)
    ours.answer(sources[:2])  # the first call allocates
    say(f"Ours ({ours.engine.dtype}) against {best}, seconds:")
    times = race(
        {"ours": lambda: seconds(lambda: ours.answer(sources)), "peer": lambda: seconds(lambda: peer.answer(sources))},
        options.rounds,
    )
    result = {"ratio": ratio(times["peer"], times["ours"]), "setting": str(best), "grid": grid, "seconds": times}
    return {**result, "dtype": ours.engine.dtype}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=32, help="dialogues to answer")
    parser.add_argument("--batch-size", type=int, default=32, help="of the peer")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every answer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), options.data)
        greedy, beam4 = (measure(base, options, beams) for beams in (1, 4))
    results = {"ratio_greedy": greedy.pop("ratio"), "ratio_beam4": beam4.pop("ratio"), "greedy": greedy, "beam4": beam4}
    sizes = {"rows": options.rows, "batch_size": options.batch_size, "new_tokens": options.new_tokens}
    results |= {"sizes": sizes, "machine": machine()}
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name in ("ratio_greedy", "ratio_beam4"):
        value = results[name]
        print(f"{name:<14} {value['median']:.2f}  [{value['least']:.2f}, {value['most']:.2f}]")


if __name__ == "__main__":
    main()
