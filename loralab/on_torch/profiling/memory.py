"""Peak memory of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

PROCESS_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU as PyTorch's allocator counts them, or on a CPU of this whole process, PyTorch itself included.

    0 where that is not known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.exists():  # Linux; its getrusage counts a parent's peak in with a child's
        lines = PROCESS_STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":  # which keeps no such count for every process
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes
