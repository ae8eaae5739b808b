"""The largest GemNet-T that takes optimizer steps on this machine: up a ladder of sizes until one does not.

    egnscale data make datasets/one-billion --structures 20 --size 3x3x4 --max-steps 2 --rattle 0.1 --metals Cu,Pd,Pt
    python benchmarks/largest.py --offload nvme --out benchmarks/results/DATE-largest-nvme-cpu
    python benchmarks/largest.py --offload parameters --device cuda --out benchmarks/results/DATE-largest-offload-cuda

Each rung is an `egnscale train` of its own: three steps in bf16 with ZeRO-3 on one rank, every layer recomputed.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import environment, table, write

GIB = 2**30
#: Blocks, and sizes of atoms, edges, triplets and what triplets are multiplied to.
LADDER = [
    (3, 1280, 768, 128, 64),
    (8, 2560, 1280, 512, 256),
    (12, 2560, 1536, 640, 320),
    (12, 2560, 2304, 640, 320),
    (16, 3072, 2048, 768, 384),
    (16, 3072, 2560, 768, 384),
    (16, 3584, 3072, 768, 384),
    (16, 4096, 3584, 1024, 512),
    (16, 4096, 3840, 1024, 512),
]
NAMES = ("num_blocks", "emb_size_atom", "emb_size_edge", "emb_size_trip", "emb_size_bil_trip")


def climb(rung: tuple[int, ...], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Three steps of one size; its `error` says why not."""
    words = [
        *(f"model.{name}={value}" for name, value in zip(NAMES, rung, strict=True)),
        *(f"data.train={args.data}", "data.workers=0", f"task.output={folder / 'run'}"),
        *("task.force_coefficient=10", "task.checkpoint_every=null", "task.log_every=1", "task.scale_factor_batches=1"),
        *(f"optim.batch_size={args.batch_size}", "optim.max_steps=3", "optim.lr_initial=5e-6", "optim.weight_decay=0"),
        *("optim.scheduler=constant", "optim.clip_grad_norm=10"),
        *("parallel.zero=3", "parallel.precision=bf16", "parallel.recompute=block"),
        *(f"parallel.offload={args.offload}", "parallel.check_memory=false"),
    ]
    command = [sys.executable, "-m", "egnscale.launch.cli", "train", "--json", "--config", str(folder / "run.yaml")]
    (folder / "run.yaml").write_text("{}\n")
    started = time.perf_counter()
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    found: dict[str, Any] = {"sizes": rung, "wall seconds": time.perf_counter() - started}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("egnscale train:")]
        reason = lines[-1] if lines else f"ended with code {done.returncode}"
        return {**found, "error": reason}
    report = json.loads(done.stdout.splitlines()[-1])
    with open(folder / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    seconds = [float(row["seconds"]) for row in rows]
    return {
        **found,
        "parameters": report["parameters"],
        "peak": max(report["peak_memory"]),
        "losses": [float(row["loss"]) for row in rows],
        "seconds a step": (seconds[-1] - seconds[0]) / (len(seconds) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offload", choices=["none", "optimizer", "parameters", "nvme"], default="nvme")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=Path("datasets/one-billion/s2ef/train"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--begin", type=int, default=0, help="rung of the ladder to begin with")
    parser.add_argument("--rungs", type=int, default=len(LADDER), help="how many to climb at most")
    parser.add_argument("--scratch", type=Path, help="directory for what is swapped; the system's temporary one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    facts = environment(args.device)
    results: list[dict[str, Any]] = []
    for rung in LADDER[args.begin : args.begin + args.rungs]:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            results.append(climb(rung, args, Path(folder)))
        print(results[-1], file=sys.stderr, flush=True)
        if "error" in results[-1]:
            break
    rows = [
        [
            " / ".join(map(str, one["sizes"])),
            f"{one['parameters']:,}",
            f"{one['peak'] / GIB:.2f}",
            f"{one['seconds a step']:.1f}",
            " ".join(f"{loss:.4g}" for loss in one["losses"]),
        ]
        if "error" not in one
        else [" / ".join(map(str, one["sizes"])), one["error"], "", "", ""]
        for one in results
    ]
    header = ["blocks / atom / edge / triplet / bilinear", "parameters", "peak GiB", "s a step", "losses"]
    sections = [table(header, rows), f"ZeRO-3 on one rank, bf16, recompute block, offload {args.offload}."]
    write(args.out, "The largest model that trains here", sections, {"environment": facts, "runs": results})


if __name__ == "__main__":
    main()
