"""Generation with a GPT-2 of 124 M parameters and a LoRA adapter, one prompt and sixteen at a time: here, and by Transformers and PEFT.

    python benchmarks/generate_gpt2.py [--json]

Both load one adapter of rank 8 and continue the same dialogues by as many tokens, with a cache: with the adapter beside
the weights, as it is right after training, and merged into them. Each side's settings are tried and its fastest races, in
turn: the peer's dtype x attention, our dtype. Prompts have different lengths, so that some of sixteen are padded. The
weights are random and no answer ends before its last token. Loading is not counted, nor laying out weights once.

    beside_1, beside_16    greedy, adapter beside the weights: the peer's time over ours, for one prompt and for sixteen
    beside_beam4           the same for four prompts and four beams of each
    merged_1, ...          the same three with the adapter merged into the weights by both
    spared                 the ratio to a peer whose weights all say that they have gradients: of a frozen head PyTorch
                           makes a copy for each prompt, 1.2 GB for sixteen, and no user of PEFT is told of it
    same_dtype             the ratio of the fastest settings in fp32, and in bf16
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import arguments, machine, make_base, race, ratio, recipe_for, say, seconds
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from loralab import load_adapter
from loralab.config.generation import Decoding
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.data.tokenization import encode_sources
from loralab.models.checkpoint_files import load_tokenizer
from loralab.on_torch.generation.generate import generate_ids, pad
from loralab.on_torch.loading.device import choose_device
from loralab.on_torch.loading.load import load_weights
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.ops.onednn_linear import prepacked_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEERS_DTYPES = ("fp32", "bf16", "bf16 with adapter in fp32", "autocast")
CASES = {"1": (1, 1), "16": (16, 1), "beam4": (4, 4)}
TARGETS = ["c_attn", "c_proj"]
Prompts = list[list[int]]


def make_adapter(base: Path, folder: Path) -> Path:
    """One with random numbers in both factors, as PEFT saves it."""
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=TARGETS, fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


class Peer:
    """Transformers' GPT-2 and its `generate`; dtype autocast keeps fp32 weights and multiplies in bf16."""

    def __init__(self, base: Path, adapter: Path, merged: bool, spared: bool, dtype: str, attention: str) -> None:
        weights = torch.bfloat16 if dtype.startswith("bf16") else torch.float32
        model: Any = GPT2LMHeadModel.from_pretrained(base, dtype=weights, attn_implementation=attention)
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=dtype != "bf16")
        self.device, self.autocast = choose_device("auto"), dtype == "autocast"
        self.model = (model.merge_and_unload() if merged else model).to(self.device).eval()
        self.model.requires_grad_(spared)

    @torch.inference_mode()
    def answer(self, prompts: Prompts, beams: int, new_tokens: int) -> None:
        ids, mask = pad(prompts, 0, self.device, "left")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self.model.generate(
                input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False, pad_token_id=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )  # fmt: skip


class Ours:
    """loralab's own GPT-2."""

    def __init__(self, base: Path, adapter: Path, merged: bool, dtype: str) -> None:
        model = load_weights(base, DTYPES[dtype], choose_device("auto"))
        attached = load_adapter(model, adapter)
        self.model = attached.merge() if merged else model
        assert isinstance(self.model, GPT2)
        self.model.ends = (-1,)  # no answer ends early, as by the peer's min_new_tokens
        self.kept = ExitStack()
        self.kept.enter_context(prepacked_weights(self.model))

    def answer(self, prompts: Prompts, beams: int, new_tokens: int) -> None:
        generate_ids(self.model, prompts, Decoding(max_new_tokens=new_tokens, beams=beams), 0)


def prompts_of(base: Path, options: Namespace, count: int) -> Prompts:
    """Dialogues in the published prompt, of which the first one is the longest."""
    recipe = recipe_for(base, options.data)
    split = read_split(recipe.data.model_copy(update={"max_validation_rows": 64}), "validation")
    prompt = Prompt(recipe.data.prompt, "dialogue", causal=True)
    tokenizer = load_tokenizer(base)
    ids, _ = encode_sources([row.source for row in split.examples], tokenizer, prompt, options.prompt_tokens)
    longest_first = sorted(ids, key=len, reverse=True)
    return [longest_first[i] for i in np.linspace(0, len(ids) - 1, count).astype(int)]


def settings(base: Path, adapter: Path, merged: bool) -> dict[str, Callable[[], Ours | Peer]]:
    """Name -> what makes that side at that setting."""
    ours: dict[str, Callable[[], Ours | Peer]]
    ours = {f"ours, {dtype}": partial(Ours, base, adapter, merged, dtype) for dtype in DTYPES}
    peers = {
        f"{name}, {dtype}, {attention}": partial(Peer, base, adapter, merged, name == "spared", dtype, attention)
        for name, dtype, attention in product(("peer", "spared"), PEERS_DTYPES, ("eager", "sdpa"))
        if not (merged and "adapter" in dtype)
    }
    return ours | peers


def measure(makers: dict[str, Callable[[], Ours | Peer]], prompts: Prompts, beams: int, options: Namespace) -> Any:
    """Each side's settings, then the fastest of both in turn."""
    say(f"{len(prompts)} prompts of up to {len(prompts[0])} tokens, {beams} beams:")

    def warm(name: str) -> Callable[[], float]:
        side = makers[name]()
        side.answer([prompts[-1][:4]], beams, 4)  # the first call allocates
        return lambda: seconds(lambda: side.answer(prompts, beams, options.new_tokens))

    grid = {}
    for name in makers:
        grid[name] = warm(name)()
        say(f"  {name:<40} {grid[name]:8.2f} s")

    def fastest(side: str) -> str:
        return min((name for name in grid if name.startswith(side)), key=lambda name: grid[name])

    same = {dtype: grid[fastest(f"peer, {dtype}")] / grid[f"ours, {dtype}"] for dtype in DTYPES}
    chosen = {side: fastest(side) for side in ("ours", "peer", "spared")}
    say(f"{', '.join(chosen.values())}, seconds:")
    times = race({side: warm(name) for side, name in chosen.items()}, options.rounds)
    ratios = {name: ratio(times[side], times["ours"]) for name, side in (("ratio", "peer"), ("spared", "spared"))}
    return {**ratios, "same_dtype": same, "chosen": chosen, "grid": grid, "seconds": times}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the longest prompt")
    parser.add_argument("--layers", type=int, default=12, help="of the model; fewer for a first look")
    parser.add_argument("--cases", default=",".join(CASES), help="which of 1, 16 and beam4 to measure")
    parser.add_argument("--adapter", nargs="+", choices=("beside", "merged"), default=("beside", "merged"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base", options.data, "gpt2", n_layer=options.layers)
        adapter = make_adapter(base, Path(folder) / "adapter")
        for case, name in product(options.cases.split(","), options.adapter):
            count, beams = CASES[case]
            say(f"{name}:")
            makers = settings(base, adapter, merged=name == "merged")
            found[f"{name}_{case}"] = measure(makers, prompts_of(base, options, count), beams, options)
    sizes = {"new_tokens": options.new_tokens, "prompt_tokens": options.prompt_tokens, "layers": options.layers}
    if options.json:
        print(json.dumps({**found, "sizes": sizes, "machine": machine()}, indent=2))
        return
    for name, case in found.items():
        ratios = [f"{v['median']:.2f} [{v['least']:.2f}, {v['most']:.2f}]" for v in (case["ratio"], case["spared"])]
        same = ", ".join(f"{dtype} {value:.2f}" for dtype, value in case["same_dtype"].items())
        print(f"{name:<13} {ratios[0]}   spared {ratios[1]}   same dtype: {same}")


if __name__ == "__main__":
    main()
