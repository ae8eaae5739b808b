"""Pipeline stages, graph parallelism and both, each with and without data parallelism, on a ladder of models that grow
with the ranks (Figure 2b in small); what cuts by cost and balanced micro-batches gain; what memory a stage needs.

Every point is `egnscale train` under torchrun, one thread for each rank; its throughput is the median of its steps.

    python benchmarks/pipeline.py --out benchmarks/results/DATE-pipeline-cpu
    python benchmarks/pipeline.py --parts balance memory --out ...
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import environment, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy import METALS, labelled, slab

from egnscale.data.store import write_store
from egnscale.launch.config import load_config
from egnscale.launch.planning import Planner
from egnscale.scaling.combinations import Combination
from egnscale.scaling.layout import ParallelLayout
from egnscale.scaling.planner import GIB, MACHINES

#: Table 4's ladder, a thirtieth as wide: blocks and widths grow together, as ranks do.
LADDER = {
    1: {"num_blocks": 3, "emb_size_edge": 64, "emb_size_atom": 64, "emb_size_trip": 16, "emb_size_bil_trip": 16},
    2: {"num_blocks": 4, "emb_size_edge": 80, "emb_size_atom": 80, "emb_size_trip": 16, "emb_size_bil_trip": 16},
    4: {"num_blocks": 6, "emb_size_edge": 96, "emb_size_atom": 96, "emb_size_trip": 16, "emb_size_bil_trip": 16},
}
MICRO_BATCHES = 8
WARM = 1  #: steps that are not counted


class Kind(NamedTuple):
    """How the ranks that a model is spread over divide it."""

    name: str
    pipe: int
    graph: int


def kinds(ranks: int) -> list[Kind]:
    found = [Kind("graph", 1, ranks), Kind("pipeline", ranks, 1), Kind("graph + pipeline", ranks // 2, 2)]
    return [kind for kind in found if kind.pipe > 1 or kind.name != "graph + pipeline"]


def of_model(model: dict[str, int]) -> list[str]:
    small = {"emb_size_rbf": 16, "emb_size_cbf": 16, "num_radial": 32, "cutoff": 5.0, "max_neighbors": 30}
    return [f"model={json.dumps({**small, **model})}"]


def run(folder: Path, ranks: int, words: list[str]) -> dict[str, Any]:
    """Train; gives steps' structures per second, bubble and imbalance, and every rank's peak memory."""
    output = Path(tempfile.mkdtemp(dir=folder))
    words = [
        *(f"task.output={output / 'run'}", "task.checkpoint_every=null", "task.eval_every=100000", "task.log_every=1"),
        *("optim.lr_initial=1e-4", "optim.weight_decay=0.01", "data.workers=0", "parallel.check_memory=false"),
        *words,
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*launcher, __file__, "--run-of", json.dumps(words)], capture_output=True, text=True, check=False, env=environ
    )
    if done.returncode:
        raise RuntimeError(f"{words}: {done.stderr[-2000:]}")
    with open(output / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))[WARM:]
    peaks = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["peak_memory"]

    def median(column: str) -> float | None:
        return statistics.median(float(row[column]) for row in rows) if column in rows[0] else None

    return {
        "structures_per_second": median("structures_per_second"),
        "steps": [float(row["structures_per_second"]) for row in rows],
        "bubble": median("bubble"),
        "stage_imbalance": median("stage_imbalance"),
        "peak_memory": peaks,
    }


def train(words: list[str]) -> None:
    """One rank of a run."""
    from egnscale.launch.trainer import Trainer
    from egnscale.scaling.engine import start_world

    world = start_world()
    result = Trainer(load_config(None, words), world).run(progress=False)
    if world.is_main:
        print(json.dumps({"peak_memory": result["peak_memory"]}), flush=True)


def make_data(folder: Path) -> None:
    """Slabs of one size; and of sizes as mixed as OC20's, small ones the most frequent."""
    write_store(folder / "even", [labelled(slab(METALS[i % 6], (2, 2, 3), seed=i), sid=i) for i in range(64)])
    sizes = [(2, 2, 3), (2, 2, 3), (2, 2, 4), (3, 2, 3), (3, 3, 3), (3, 3, 4), (4, 4, 4)]
    order = np.random.default_rng(0).integers(0, len(sizes), 96)
    write_store(
        folder / "mixed", [labelled(slab(METALS[i % 6], sizes[k], seed=i), sid=i) for i, k in enumerate(order.tolist())]
    )


def flops_of_structure(folder: Path, model: dict[str, int]) -> float:
    """Of a training step, counted."""
    words = [*of_model(model), f"data.train={folder / 'even'}", "task.output=run", "optim.batch_size=8"]
    config = load_config(None, [*words, "optim.max_steps=1", "optim.lr_initial=1e-4", "optim.weight_decay=0"])
    planner = Planner.of_config(config, MACHINES["cpu"])
    return planner.plan(ParallelLayout(), Combination(), 8, 1).flops / 8


def scaling(folder: Path, steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for ranks, model in LADDER.items():
        flops = flops_of_structure(folder, model)
        for kind in kinds(ranks) if ranks > 1 else [Kind("one rank", 1, 1)]:
            for data in (1, 2):
                words = [
                    *of_model(model), f"data.train={folder / 'even'}", f"optim.batch_size={2 // data}",
                    f"optim.gradient_accumulation={MICRO_BATCHES}", f"optim.max_steps={steps}",
                    f"parallel={{pipe: {kind.pipe}, graph: {kind.graph}, zero: 1, check_memory: false}}",
                ]  # fmt: skip
                point = run(folder, ranks * data, words)
                rate = point["structures_per_second"]
                found.append({"kind": kind.name, "ranks": ranks * data, "data": data, "flops": rate * flops, **point})
                print(found[-1], flush=True)
    return found


def balance(folder: Path, steps: int) -> list[dict[str, Any]]:
    """A data set of mixed sizes, through two stages."""
    found = []
    for batches, cut in (("edges", "cost"), ("edges", "uniform"), ("none", "cost"), ("none", "uniform")):
        words = [
            *of_model(LADDER[2] | {"num_blocks": 3}), f"data.train={folder / 'mixed'}", "optim.batch_size=2",
            f"optim.gradient_accumulation={MICRO_BATCHES}", f"optim.max_steps={steps}",
            f"optim.load_balancing={batches}",
            f"parallel={{pipe: 2, zero: 1, stage_cut: {cut}, check_memory: false}}",
        ]  # fmt: skip
        found.append({"micro-batches": batches, "cut": cut, **run(folder, 2, words)})
        print(found[-1], flush=True)
    return found


def memory(folder: Path) -> list[dict[str, Any]]:
    """Twelve blocks that are wider than their graphs are large, as models that need stages are."""
    found = []
    wide = {"num_blocks": 12, "emb_size_edge": 512, "emb_size_atom": 512, "emb_size_trip": 64, "emb_size_bil_trip": 64}
    for recompute in ("none", "block"):
        for pipe in (1, 2):
            words = [
                *of_model(wide), f"data.train={folder / 'even'}", "data.limit=16", "optim.batch_size=1",
                "optim.gradient_accumulation=2", "optim.max_steps=2",
                f"parallel={{pipe: {pipe}, zero: 1, recompute: {recompute}, check_memory: false}}",
            ]  # fmt: skip
            found.append({"recompute": recompute, "pipe": pipe, **run(folder, pipe, words)})
            print(found[-1], flush=True)
    return found


def plot(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    one = [p for p in points if p["kind"] == "one rank"]
    for number, kind in enumerate(("graph", "pipeline", "graph + pipeline")):
        for data, style in ((1, "o-"), (2, "s--")):
            chosen = [p for p in [*one, *points] if p["data"] == data and p["kind"] in (kind, "one rank")]
            chosen = sorted({p["ranks"]: p for p in chosen}.values(), key=lambda p: p["ranks"])
            axes.plot(
                [p["ranks"] for p in chosen], [p["flops"] / 1e9 for p in chosen], style, color=f"C{number}",
                label=f"{kind}{', data 2' if data == 2 else ''}",
            )  # fmt: skip
    cores = os.cpu_count() or 1
    axes.axvline(cores, color="grey", linewidth=1)
    axes.annotate(f"{cores} cores", (cores, axes.get_ylim()[0]), textcoords="offset points", xytext=(4, 6))
    axes.set(
        xscale="log", yscale="log", xlabel="ranks", ylabel="GFLOP/s of all ranks", title="Models that grow with ranks"
    )
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def sections(results: dict[str, Any]) -> list[str]:
    found: list[str] = []
    if points := results.get("scaling"):
        rows = [
            (p["kind"], p["ranks"], p["data"], f"{p['structures_per_second']:.2f}", f"{p['flops'] / 1e9:.2f}",
             "-" if p["bubble"] is None else f"{p['bubble']:.2f}")
            for p in points
        ]  # fmt: skip
        header = ["model spread by", "ranks", "data", "structures/s", "GFLOP/s", "bubble"]
        found += ["## Figure 2b in small", table(header, rows)]
    if points := results.get("balance"):
        naive = points[-1]["structures_per_second"]
        rows = [
            ("balanced" if p["micro-batches"] == "edges" else "as they come", p["cut"],
             f"{p['structures_per_second']:.2f}", f"{p['structures_per_second'] / naive:.2f}", f"{p['bubble']:.2f}",
             f"{p['stage_imbalance']:.2f}")
            for p in points
        ]  # fmt: skip
        header = ["micro-batches", "cut", "structures/s", "against naive", "bubble", "stage imbalance"]
        found += ["## Mixed sizes, two stages", table(header, rows)]
    if points := results.get("memory"):
        whole = {p["recompute"]: max(p["peak_memory"]) for p in points if p["pipe"] == 1}
        rows = [
            (p["recompute"], p["pipe"], ", ".join(f"{peak / GIB:.2f}" for peak in p["peak_memory"]),
             f"{max(p['peak_memory']) / whole[p['recompute']]:.2f}")
            for p in points
        ]  # fmt: skip
        found += ["## Memory of a rank, twelve blocks", table(["recompute", "pipe", "GiB", "of one stage"], rows)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", default=["scaling", "balance", "memory"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--run-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_of:
        train(json.loads(args.run_of))
        return
    results: dict[str, Any] = {"environment": environment("cpu")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        if "scaling" in args.parts:
            results["scaling"] = scaling(folder, args.steps)
        if "balance" in args.parts:
            results["balance"] = balance(folder, args.steps + 4)
        if "memory" in args.parts:
            results["memory"] = memory(folder)
    if args.out is not None and "scaling" in results:
        plot(results["scaling"], args.out.with_suffix(".png"))
    write(args.out, "Pipeline stages", sections(results), results)


if __name__ == "__main__":
    main()
