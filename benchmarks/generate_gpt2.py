"""Generation with a GPT-2 of 124 M parameters, one prompt and sixteen at a time: here and by Transformers' `generate`, in turn.

    python benchmarks/generate_gpt2.py [--json]

Both continue the same dialogues by as many tokens, with a cache. Each side's settings are tried and its fastest races:
the peer's dtype x attention, our dtype. Prompts have different lengths, so that fifteen of sixteen are padded. The
model's weights are random and no answer ends before its last token.

    ratio_1, ratio_16    greedy: the peer's time over ours, for one prompt and for sixteen
    ratio_beam4          the same for four prompts and four beams of each
    same_dtype           the ratio of the fastest settings in fp32, and in bf16
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import arguments, machine, make_base, race, ratio, recipe_for, say, seconds
from transformers import AutoTokenizer, GPT2LMHeadModel

from loralab.data.encode import encode_sources
from loralab.data.prompts import Prompt
from loralab.data.splits import read_split
from loralab.decoding import Decoding
from loralab.on_torch.device import choose_device
from loralab.on_torch.generate import generate_ids, pad
from loralab.on_torch.load import load_weights
from loralab.on_torch.models.gpt2 import GPT2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Prompts = list[list[int]]


def peers_answer(base: Path, dtype: str, attention: str, beams: int, new_tokens: int) -> Callable[[Prompts], None]:
    """Transformers' GPT-2 and its `generate`; dtype autocast keeps fp32 weights and multiplies in bf16."""
    weights = DTYPES.get(dtype, torch.float32)
    model: Any = GPT2LMHeadModel.from_pretrained(base, dtype=weights, attn_implementation=attention)
    device = choose_device("auto")
    model.to(device).eval()

    @torch.inference_mode()
    def answer(prompts: Prompts) -> None:
        ids, mask = pad(prompts, 0, device, "left")
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "autocast"):
            model.generate(
                input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False, pad_token_id=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )  # fmt: skip

    return answer


def our_answer(base: Path, dtype: str, beams: int, new_tokens: int) -> Callable[[Prompts], None]:
    """loralab's own GPT-2."""
    model = load_weights(base, DTYPES[dtype], choose_device("auto"))
    assert isinstance(model, GPT2)
    model.ends = (-1,)  # no answer ends early, as by the peer's min_new_tokens
    decoding = Decoding(max_new_tokens=new_tokens, beams=beams)

    def answer(prompts: Prompts) -> None:
        generate_ids(model, prompts, decoding, 0)

    return answer


def prompts_of(base: Path, options: Namespace, count: int) -> Prompts:
    """Dialogues in the published prompt, of which the first one is the longest."""
    recipe = recipe_for(base, options.data)
    split = read_split(recipe.data.model_copy(update={"max_validation_rows": 64}), "validation")
    prompt = Prompt(recipe.data.prompt, "dialogue", causal=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids, _ = encode_sources([row.source for row in split.examples], tokenizer, prompt, options.prompt_tokens)
    longest_first = sorted(ids, key=len, reverse=True)
    return [longest_first[i] for i in np.linspace(0, len(ids) - 1, count).astype(int)]


def measure(base: Path, options: Namespace, count: int, beams: int) -> dict[str, Any]:
    """Each side's settings, then the fastest of both in turn."""
    prompts, new = prompts_of(base, options, count), options.new_tokens
    say(f"{count} prompts of up to {len(prompts[0])} tokens, {beams} beams:")
    makers: dict[str, Callable[[], Callable[[Prompts], None]]] = {
        f"ours, {dtype}": lambda dtype=dtype: our_answer(base, dtype, beams, new) for dtype in DTYPES
    }
    makers |= {
        f"peer, {dtype}, {attention}": lambda dtype=dtype, attention=attention: peers_answer(
            base, dtype, attention, beams, new
        )
        for dtype in (*DTYPES, "autocast")
        for attention in ("eager", "sdpa")
    }
    grid = {}
    for name, make in makers.items():
        answer = make()
        answer([prompts[-1][:4]])  # the first call allocates
        grid[name] = seconds(lambda answer=answer: answer(prompts))
        say(f"  {name:<24} {grid[name]:8.2f} s")

    def fastest(side: str) -> str:
        return min((name for name in grid if name.startswith(side)), key=lambda name: grid[name])

    same = {dtype: grid[fastest(f"peer, {dtype}")] / grid[f"ours, {dtype}"] for dtype in DTYPES}
    chosen = {side: fastest(side) for side in ("ours", "peer")}
    say(f"{chosen['ours']} against {chosen['peer']}, seconds:")
    sides = {side: makers[name]() for side, name in chosen.items()}
    turns = {side: lambda answer=answer: seconds(lambda: answer(prompts)) for side, answer in sides.items()}
    times = race(turns, options.rounds)
    return {
        "ratio": ratio(times["peer"], times["ours"]),
        "same_dtype": same,
        "chosen": chosen,
        "grid": grid,
        "seconds": times,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the longest prompt")
    parser.add_argument("--layers", type=int, default=12, help="of the model; fewer for a first look")
    parser.add_argument("--cases", default="1,16,beam4", help="which of the ratios to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {"1": (1, 1), "16": (16, 1), "beam4": (4, 4)}
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), options.data, "gpt2", n_layer=options.layers)
        found = {f"ratio_{case}": measure(base, options, *cases[case]) for case in options.cases.split(",")}
    results = {name: case.pop("ratio") for name, case in found.items()} | {"cases": found}
    results |= {
        "sizes": {"new_tokens": options.new_tokens, "prompt_tokens": options.prompt_tokens, "layers": options.layers},
        "machine": machine(),
    }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, case in found.items():
        value, same = results[name], case["same_dtype"]
        spread = f"{value['median']:.2f}  [{value['least']:.2f}, {value['most']:.2f}]"
        print(f"{name:<12} {spread}   same dtype: " + ", ".join(f"{dtype} {same[dtype]:.2f}" for dtype in same))


if __name__ == "__main__":
    main()
