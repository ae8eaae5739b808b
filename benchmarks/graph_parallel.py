"""One large graph over P ranks: seconds of a training step, memory of a rank, and what is waited for.

Each measurement is a run of its own under torchrun, one thread for each rank; numbers of ranks take turns. Forward and
backward of one slab in fp32; a step on a small slab before it, so that nothing is done for the first time.

    python benchmarks/graph_parallel.py --out benchmarks/results/DATE-graph-parallel-cpu
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import environment, spread, table, write
from torch import Tensor

from egnscale.data.batch import build_graph, cell_coordinates
from egnscale.data.neighbors import GraphSpec
from egnscale.launch.bench_comm import slab
from egnscale.models import ExtendedGraph, build_model, model_config
from egnscale.scaling.collectives import added
from egnscale.scaling.layout import Mesh
from egnscale.scaling.partition import partition_by_owner

MB = 2**20
MARK = "measured "


def part(atoms: int, metal: int, preset: str, mesh: Mesh) -> ExtendedGraph:
    config = model_config(preset)
    sample = slab(atoms, metal)
    graph = build_graph([sample], GraphSpec(config.cutoff, config.max_neighbors))
    if mesh.layout.graph > 1:
        graph, _ = partition_by_owner(graph, cell_coordinates([sample]), mesh.layout.graph, mesh.graph_rank)
    return mesh.place(graph)


def rank(spec: dict[str, Any]) -> None:
    """One rank's work; prints what it saw."""
    import torch.distributed as dist

    from egnscale.scaling.engine import gather_over_ranks, start_world

    torch.set_num_threads(1)
    world = start_world()
    mesh = Mesh.of_world(world.device, graph=world.size)
    torch.manual_seed(0)
    model = build_model(spec["preset"]).to(world.device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there in every step but the first
    saved: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def step(graph: ExtendedGraph) -> None:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            prediction = model(graph)
        forces = graph.partition.total(prediction.forces.norm(dim=1, keepdim=True))
        (prediction.energy.abs().sum() + forces.sum()).backward()

    step(part(60, spec["metal"], spec["preset"], mesh))
    graph = part(spec["atoms"], spec["metal"], spec["preset"], mesh)
    mesh.traffic()
    saved.clear()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
    dist.barrier()
    begun = time.perf_counter()
    step(graph)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    own = time.perf_counter() - begun
    dist.barrier()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else _resident("VmHWM")
    tally = added(mesh.traffic().values())
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    mine = {
        "edges": graph.num_edges,
        "seconds": seconds,
        "own": own,
        "waited": tally.seconds,
        "sent": tally.bytes,
        "calls": tally.calls,
        "peak": (peak - before) / MB,
        "saved": sum(saved.values()) / MB,
    }
    ranks = gather_over_ranks(mine)
    if world.is_main:
        print(MARK + json.dumps(ranks), flush=True)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def run(spec: dict[str, Any], ranks: int, *, exact_memory: bool = False) -> list[dict[str, float]]:
    """What each of `ranks` ranks measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    if exact_memory:  # every tensor a mapping of its own, so that resident memory is what tensors hold
        variables["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command += [str(Path(__file__).resolve()), "--rank-of", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(done.stderr)
    return json.loads(lines[-1].removeprefix(MARK))


def times(spec: dict[str, Any], args: argparse.Namespace, results: dict[str, Any]) -> str:
    taken: dict[int, list[list[dict[str, float]]]] = {ranks: [] for ranks in args.ranks}
    for _ in range(args.rounds):
        for ranks in args.ranks:
            taken[ranks].append(run(spec, ranks))
            print(f"{ranks} ranks: {taken[ranks][-1][0]['seconds']:.1f} s", file=sys.stderr, flush=True)
    results["times"] = taken
    rows = []
    base = [one[0]["seconds"] for one in taken[args.ranks[0]]]
    for ranks, found in taken.items():
        seconds = [one[0]["seconds"] for one in found]
        rows.append(
            (
                ranks,
                f"{max(r['edges'] for r in found[0]):,.0f}",
                spread(seconds),
                spread([a / b for a, b in zip(base, seconds, strict=True)]),
                spread([max(r["waited"] for r in one) for one in found], 3),
                f"{sum(r['sent'] for r in found[0]) / 1e6:.1f}",
                f"{max(r['calls'] for r in found[0]):.0f}",
            )
        )
    header = ("ranks", "most edges", "s per step", "times faster", "s waited, at most", "MB sent", "calls of a rank")
    note = f"Wall time, median [min-max] of {args.rounds} rounds, ratios round by round."
    return f"## Strong scaling\n\n{note}\n\n{table(header, rows)}"


def memory(spec: dict[str, Any], args: argparse.Namespace, results: dict[str, Any]) -> str:
    found = {ranks: run(spec, ranks, exact_memory=True) for ranks in args.memory_ranks}
    results["memory"] = found
    first = found[args.memory_ranks[0]]
    most = {ranks: {name: max(r[name] for r in all_) for name in ("peak", "saved")} for ranks, all_ in found.items()}
    base = most[args.memory_ranks[0]]
    rows = [
        (
            ranks,
            f"{max(r['edges'] for r in found[ranks]) / first[0]['edges']:.3f}",
            *(cell for name in ("saved", "peak") for cell in (f"{use[name]:.0f}", f"{use[name] / base[name]:.3f}")),
        )
        for ranks, use in most.items()
    ]
    header = ("ranks", "of all edges", "saved, MB", "of one rank's", "peak, MB", "of one rank's")
    note = (
        "The rank with the most. Saved: what forward keeps for backward. "
        "Peak: memory during forward and backward over what was there before."
    )
    return f"## Memory of a rank\n\n{note}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemnet-dt")
    parser.add_argument("--atoms", type=int, default=1000)
    parser.add_argument("--metal", type=int, default=5, help="which metal (5: Pt, whose slabs have fewer edges)")
    parser.add_argument("--ranks", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--memory-ranks", type=int, nargs="*", default=(1, 2, 4))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank(args.rank_of)
        return
    spec = {"preset": args.preset, "atoms": args.atoms, "metal": args.metal}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"environment": {**environment(device), "threads": "1 for each rank"}, "spec": spec}
    sections = []
    if args.ranks:
        sections.append(times(spec, args, results))
    if args.memory_ranks:
        sections.append(memory(spec, args, results))
    config = model_config(args.preset)
    graph = build_graph([slab(args.atoms, args.metal)], GraphSpec(config.cutoff, config.max_neighbors))
    title = f"One graph over several ranks: {args.preset}, {graph.num_atoms} atoms, {graph.num_edges:,} edges"
    write(args.out, title, sections, results)


if __name__ == "__main__":
    main()
