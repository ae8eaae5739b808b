"""How fast this machine's device is, measured in a few seconds, for `egnscale plan --machine`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from egnscale.scaling.planner import MACHINES, Machine

SIZE = 1536  #: of the matrices that are multiplied
ROUNDS = 5


def measured_machine(name: str) -> Machine:
    """Rates of matrix products, of memory and of starting an operation, on the GPU if there is one.

    Links to other devices are not measured here: they keep the values of the nearest shipped description.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, SIZE, SIZE, device=device).to(dtype)
        rates[precision] = 2 * SIZE**3 / _seconds(partial(torch.matmul, a, b), device)
    x = torch.randn(16 * 2**20, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() * 4 / _seconds(partial(y.copy_, x), device)
    small = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(1000):
            small.add_(1)

    shipped = MACHINES["h100" if device == "cuda" else "cpu"]
    source = f"measured here with {torch.get_num_threads()} threads; links as of {shipped.name} ({shipped.source})"
    return replace(
        shipped, name=name, source=source, matmul=rates, bandwidth=bandwidth, call=_seconds(many, device) / 1000
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """Median of a few rounds, after one that is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])
