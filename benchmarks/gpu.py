"""Everything that waits for a GPU, by worth: each part is short, and its results are on disk as soon as they are there.

    python benchmarks/gpu.py all                      every part in this order, 13 minutes at most
    python benchmarks/gpu.py core                     one part, 9 minutes at most
    python benchmarks/gpu.py all --tiny --device cpu  a dry run of a minute
    python benchmarks/gpu.py --needs                  which libraries to carry to a machine without a network

    core     live = reloaded, merged, logits of PEFT and Transformers, the same tokens, in fp32 and bf16
    peft     a LoRA step, its memory and writing beside PEFT and Transformers: T5-small, GPT-2 124M, T5-base
    xl       the same of FLAN-T5-XL in bf16
    nanogpt  a full step of GPT-2 124M beside a plain PyTorch model, compiled or not
    xxl      LoRA on an int8 base of FLAN-T5-XXL's shape

Weights are random, of the published shapes: nothing is downloaded and no data is read. PART.json goes to the folder of
--out. A part that cannot run says why in its JSON and is no failure; a check that fails gives exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # loralab, where it is not installed

import torch
from gpu_parts import against_peft, correct, large, nanogpt, needs
from gpu_parts.report import CannotRun, OutOfTime, Report
from gpu_parts.sides import Setting
from peers import machine
from transformers.utils import logging

PARTS: dict[str, Callable[[Setting, Report], None]] = {
    "core": correct.run,
    "peft": against_peft.run,
    "xl": large.run_xl,
    "nanogpt": nanogpt.run,
    "xxl": large.run_xxl,
}
ONE, ALL = 9 * 60.0, 13 * 60.0
"""Seconds of a part, and of all together."""
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.needs:
        with tempfile.TemporaryDirectory() as folder:  # a dry run loads what a run loads
            run_parts(list(PARTS), Setting(torch.device("cpu"), True, 1), Path(folder), ONE, ALL)
        print(needs.listing())
        return
    setting = Setting(torch.device(options.device), options.tiny, options.rounds)
    chosen = list(PARTS) if options.part == "all" else [options.part]
    sys.exit(run_parts(chosen, setting, options.out, options.seconds, options.all_seconds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    out = Path(os.environ.get("OUT") or RESULTS)
    parser.add_argument("--out", type=Path, default=out, help="folder of the results (default: $OUT, or beside this)")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help="cuda or cpu (default: what is there)")
    parser.add_argument("--tiny", action="store_true", help="a dry run at tiny sizes")
    parser.add_argument("--rounds", type=int, default=5, help="how often each side takes its turn")
    parser.add_argument("--seconds", type=float, default=ONE, help="of each part")
    parser.add_argument("--all-seconds", type=float, default=ALL, help="of all parts together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    parser.add_argument("--needs", action="store_true", help="list the libraries to carry, and stop")
    return parser.parse_args()


def run_parts(names: list[str], setting: Setting, out: Path, each: float, together: float) -> int:
    """The exit code: 1 where a check failed or a part broke, 0 else."""
    begun, code = time.monotonic(), 0
    torch.set_float32_matmul_precision("highest")  # fp32 is fp32: no TF32
    for name in names:
        left = together - (time.monotonic() - begun)
        report = Report(
            name, out, min(each, left), machine() | {"device_type": setting.device.type, "tiny": setting.tiny}
        )
        code = max(code, run_part(name, setting, report))
    return code


def run_part(name: str, setting: Setting, report: Report) -> int:
    """Runs one part to its end, whatever that is; the other parts go on."""
    if setting.device.type == "cuda" and not torch.cuda.is_available():
        report.close("cannot run", f"PyTorch {torch.__version__} sees no GPU")
        return 0
    if setting.device.type == "cpu" and not setting.tiny:
        report.close("cannot run", "there is no GPU; --tiny --device cpu is the dry run")
        return 0
    try:
        PARTS[name](setting, report)
    except OutOfTime as reason:
        report.close("stopped", str(reason))
        return int(bool(report.failed))
    except CannotRun as reason:
        report.close("cannot run", str(reason))
        return 0
    except Exception as error:  # the other parts are worth their time all the same
        report.close("broken", f"{type(error).__name__}: {error}")
        return 1
    failed = report.failed
    report.close("failed" if failed else "done", ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    main()
