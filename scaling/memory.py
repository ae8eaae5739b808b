"""How much memory a process has used."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """The most that this process has held so far, in bytes.

    On a GPU what torch's allocator has reserved there; elsewhere the resident set, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
