"""Training in bf16 against fp32: the same run, seed and data, the widths of GemNet-dT, 500 steps.

    make quickstart                                   # makes the data set
    python benchmarks/precision.py --out benchmarks/results/DATE-precision-cpu

With `--device cuda`, fp16 too. Runs that are there are not repeated: they are read from `--runs`.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from report import environment, table, write

CONFIG = Path("examples/configs/precision.yaml")


def train(run: Path, precision: str, overrides: list[str]) -> None:
    """Train, or go on with what an earlier call began."""
    words = [str(CONFIG), f"task.output={run}", f"parallel.precision={precision}", "--resume", *overrides]
    subprocess.run([sys.executable, "-m", "egnscale.launch.train", *words], check=True)


def read(run: Path) -> dict[str, Any]:
    """Losses, gradient norms and the last evaluation of a run."""
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    latest = (run / "checkpoints" / "latest").read_text().strip()
    record = json.loads((run / "checkpoints" / latest / "run.json").read_text())
    (evaluation,) = record["evaluations"].values()
    steps = [float(after["seconds"]) - float(before["seconds"]) for before, after in pairwise(rows)]
    return {
        "steps": len(rows),
        "losses": [float(row["loss"]) for row in rows],
        "gradient norms": [float(row["grad_norm"]) for row in rows],
        "seconds a step": statistics.median(steps),
        "evaluation": evaluation,
    }


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for precision, run in runs.items():
        window = 20
        smooth = [statistics.mean(run["losses"][max(0, i - window) : i + 1]) for i in range(run["steps"])]
        axes.semilogy(smooth, label=precision, linewidth=1)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {window} steps", title="GemNet-dT widths, EMT slabs")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    facts = environment(args.device)
    precisions = ["fp32", "bf16", *(["fp16"] if args.device == "cuda" else [])]
    runs = {}
    for precision in precisions:
        train(args.runs / precision, precision, args.overrides)
        runs[precision] = read(args.runs / precision)
    reference = runs["fp32"]["evaluation"]["forces_mae"]
    rows = []
    for precision, run in runs.items():
        found = run["evaluation"]
        rows.append(
            [
                precision,
                f"{1000 * found['forces_mae']:.2f}",
                f"{100 * (found['forces_mae'] / reference - 1):+.2f} %",
                f"{1000 * found['energy_mae']:.1f}",
                f"{found['forces_cos']:.4f}",
                f"{statistics.mean(run['losses'][-50:]):.4f}",
                f"{max(run['gradient norms']):.1f}",
                f"{run['seconds a step']:.2f}",
            ]
        )
    header = ["precision", "force MAE, meV/A", "of fp32", "energy MAE, meV", "force cosine"]
    header += ["loss, last 50 steps", "largest gradient norm", "s a step"]
    trivial = 1000 * runs["fp32"]["evaluation"]["forces_mae_zero"]
    sections = [
        table(header, rows),
        f"Averaged weights on all of val_id, each in the precision that it was trained in. Predicting no forces: "
        f"{trivial:.1f} meV/A. No loss and no gradient was NaN or infinite: a run stops at the first.",
    ]
    if args.out is not None:
        picture = args.out.with_suffix(".png")
        plot(runs, picture)
        sections.append(f"![losses]({picture.name})")
    write(args.out, "Training in half precision", sections, {"environment": facts, "runs": runs})


if __name__ == "__main__":
    main()
