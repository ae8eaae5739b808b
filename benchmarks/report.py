"""What benchmarks share: where they ran, how they measure time and memory, how they write results down."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MB = 2**20


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and the command."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load average at start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "egnscale": version("egnscale"),
    }


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU seconds of this process (which other load does not change much), or seconds on a CUDA device."""
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def alternate(works: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, `rounds` times in turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if turn:
                times[name].append(taken)
    return times


def peak_megabytes(work: Callable[[], object], device: str) -> float:
    """The most memory that some work takes, over what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / MB
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    work()
    return (_resident("VmHWM") - before) / MB


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_fresh_process(*arguments: str) -> Any:
    """What this program, started with more arguments, prints as JSON on its last line; for measuring memory."""
    # Every tensor a mapping of its own: resident memory is then what tensors hold, not what glibc's heap has kept.
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=exact)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median [min-max]."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path | None, title: str, sections: Sequence[str], results: dict[str, Any]) -> None:
    """Print a report, and write it as `out`.md with its numbers as `out`.json."""
    facts = table(["", ""], results["environment"].items())
    text = "\n\n".join([f"# {title}", facts, *sections]) + "\n"
    print(text)
    if out is not None:
        out.with_suffix(".md").write_text(text)
        out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
