"""Properties of this machine: memory, bfloat16. Read from the system, without a framework."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a process holds beside tensors: Python, PyTorch and Transformers; on a GPU its context too.
PROCESS, CONTEXT = 600_000_000, 500_000_000
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
# What oneDNN, which multiplies for PyTorch on a CPU, may be held to, and then does not multiply in bfloat16.
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Machine:
    """One place to compute in."""

    kind: str
    """cpu or cuda."""
    name: str
    memory: int
    """Bytes in all; 0 where the system does not say."""
    free: int
    bfloat16: bool
    """True if products in bfloat16 are likely to be the faster ones."""

    @property
    def room(self) -> int:
        """Bytes for tensors: what is free less what the process takes."""
        return max(self.free - (PROCESS if self.kind == "cpu" else CONTEXT), 0)


def this_machine(device: str) -> Machine:
    """The one that a recipe's model.device means; auto is a GPU where there is one."""
    gpu = _gpu() if device in ("auto", "cuda") else None
    return gpu or _cpu()


def _cpu() -> Machine:
    total, free = _memory()
    lines = _read("/proc/cpuinfo").splitlines()
    flags = next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return Machine("cpu", name, total, free, bool(flags & BF16_FLAGS) and held_to not in WITHOUT_BF16)


def _memory() -> tuple[int, int]:
    """(all, available)"""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" in lines:
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0, 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpu() -> Machine | None:
    """The first NVIDIA GPU that its driver's tool tells of."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = ["--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run([tool, *query], capture_output=True, text=True, timeout=2, check=True).stdout
        name, total, free, capability = (part.strip() for part in found.splitlines()[0].split(","))
        return Machine("cuda", name, int(total) * 2**20, int(free) * 2**20, float(capability) >= 8)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


# What a record says of where it was made


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    libraries = ("loralab", "torch", "transformers", "tokenizers", "numpy", "rouge_score", "sacrebleu")
    return {
        "versions": {"python": platform.python_version(), **dict(_versions(libraries))},
        "hardware": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "command": " ".join(sys.argv),
    }


def _versions(libraries: Iterable[str]) -> Iterator[tuple[str, str]]:
    for library in libraries:
        try:
            yield library, importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
