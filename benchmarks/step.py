"""One training step: this GemNet-T, triplet-free, against the plain padded-triplet formulation of the same network.

Same weights, same graph, one run, variants in turns. Memory of each variant in a fresh process. The plain formulation
is the tests' oracle in the shape of the public code: messages gathered into a zero-padded (edges, most triplets of an
edge, features) tensor, and the bilinear layer as a (features, edges, out) product.

    python benchmarks/step.py --out benchmarks/results/DATE-gemnet-step-cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from report import MB, alternate, environment, in_fresh_process, peak_megabytes, spread, table, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle
import structures

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec, count_edges
from egnscale.models import ExtendedGraph, GemNetT, Prediction, build_model
from egnscale.models.triplets import TripletForm

VARIANTS = ("plain", "auto", "harmonic", "block")
NOTE = """\
Forward, backward and AdamW in fp32; median [min-max] of {rounds} rounds, ratios round by round. Peak: memory of forward
and backward in a fresh process, over what was there before (weights, gradients, graph). Saved: what forward keeps for
backward. On a CPU, resident memory with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed is given back. Difference:
of energies and forces from those of the plain form, relative."""
Size = tuple[int, int, int]


class Case:
    """A model, a graph, and one training step in each variant."""

    def __init__(self, preset: str, device: str, size: Size, spec: GraphSpec, edges: int = 1) -> None:
        """As many copies of the slab as it takes to have `edges` edges."""
        torch.manual_seed(0)
        with torch.device(device):
            self.model: GemNetT = build_model(preset, cutoff=spec.cutoff)
        slab = structures.slab(size=size)
        copies = max(1, round(edges / count_edges(slab, spec)))
        self.graph: ExtendedGraph = build_graph([slab] * copies, spec).to(device)
        self.triplets = oracle.list_triplets(self.graph)  # not part of any measurement
        # A learning rate of zero: all the work of an update, and the same weights for every variant.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, amsgrad=True)

    def predict(self, variant: str) -> Prediction:
        if variant == "plain":
            return oracle.gemnet(self.model, self.graph, padded_triplets=True, triplets=self.triplets)
        self.model.embedding.triplet_form = cast(TripletForm, variant)
        return self.model(self.graph)

    def forward_backward(self, variant: str) -> None:
        prediction = self.predict(variant)
        self.optimizer.zero_grad(set_to_none=False)
        (prediction.energy.abs().mean() + prediction.forces.norm(dim=1).mean()).backward()

    def step(self, variant: str) -> None:
        self.forward_backward(variant)
        self.optimizer.step()


def memory(case: Case, variant: str, device: str) -> dict[str, float]:
    """MB saved for backward, and the peak of forward and backward over what was there before."""
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there in every step but the first
    peak = peak_megabytes(partial(case.forward_backward, variant), device)
    saved: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        prediction = case.predict(variant)
    for tensor in (*case.model.parameters(), *case.triplets[:3]):  # there in any case
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    del prediction
    return {"saved": sum(saved.values()) / MB, "peak": peak}


def memory_in_fresh_process(variant: str, size: Size, spec: GraphSpec, edges: int = 1) -> dict[str, float]:
    what = {"variant": variant, "size": size, "spec": asdict(spec), "edges": edges}
    return in_fresh_process("--memory-of", json.dumps(what))


def compare_steps(case: Case, args: argparse.Namespace, results: dict[str, Any]) -> str:
    with torch.no_grad():
        outputs = {variant: case.predict(variant) for variant in VARIANTS}
    differences = {
        variant: max(float((a - b).norm() / b.norm()) for a, b in zip(output, outputs["plain"], strict=True))
        for variant, output in outputs.items()
    }
    times = alternate({variant: partial(case.step, variant) for variant in VARIANTS}, args.device, args.rounds)
    used = {variant: memory_in_fresh_process(variant, args.size, GraphSpec()) for variant in VARIANTS}
    results["step"] = {"seconds": times, "megabytes": used, "differences": differences}
    rows = [
        (
            variant,
            spread(times[variant]),
            spread([plain / ours for plain, ours in zip(times["plain"], times[variant], strict=True)]),
            f"{used[variant]['peak']:.0f}",
            f"{used['plain']['peak'] / used[variant]['peak']:.2f}",
            f"{used[variant]['saved']:.0f}",
            f"{differences[variant]:.1e}",
        )
        for variant in VARIANTS
    ]
    graph = case.graph
    header = ("form", "s per step", "times faster", "peak MB", "times smaller", "saved MB", "relative difference")
    title = (
        f"One step of {args.preset}: {graph.num_atoms} atoms, {graph.num_edges} edges, {graph.num_triplets} triplets"
    )
    return f"## {title}\n\n{NOTE.format(rounds=args.rounds)}\n\n{table(header, rows)}"


def compare_cutoffs(args: argparse.Namespace, results: dict[str, Any]) -> str:
    size, about, rows, results["cutoffs"] = (1, 1, 5), 2000, [], []
    for cutoff in args.cutoffs:
        spec = GraphSpec(cutoff, max_neighbors=None)
        case = Case(args.preset, args.device, size, spec, about)
        atoms, edges = case.graph.num_atoms, case.graph.num_edges
        pair = {variant: partial(case.forward_backward, variant) for variant in ("plain", "auto")}
        times = alternate(pair, args.device, args.rounds)
        del case, pair
        used = {variant: memory_in_fresh_process(variant, size, spec, about) for variant in times}
        results["cutoffs"].append({"cutoff": cutoff, "edges": edges, "seconds": times, "megabytes": used})
        per_edge = [spread([1e3 * t / edges for t in taken]) for taken in times.values()]
        ratio = spread([plain / ours for plain, ours in zip(times["plain"], times["auto"], strict=True)])
        peaks = [round(1024 * used[variant]["peak"] / edges) for variant in times]
        rows.append((cutoff, edges, round(edges / atoms), *per_edge, ratio, *peaks))
    medians = [statistics.median(row["seconds"]["auto"]) / row["edges"] for row in results["cutoffs"]]
    header = (
        "cutoff, A",
        "edges",
        "per atom",
        "plain, ms",
        "auto, ms",
        "times faster",
        "plain, peak KB",
        "auto, peak KB",
    )
    note = (
        f"As many copies of a slab of 7 atoms as have about {about} edges; forward and backward. "
        f"Time of `auto` for each edge, largest over smallest: {max(medians) / min(medians):.2f}."
    )
    return f"## Cost of an edge against the cutoff, neighbours not capped\n\n{note}\n\n{table(header, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="gemnet-dt")
    parser.add_argument("--size", type=int, nargs=3, default=(4, 4, 5), help="of the slab in atoms (default: 4 4 5)")
    parser.add_argument("--cutoffs", type=float, nargs="*", default=(4.0, 5.0, 6.0, 7.5, 9.0))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.memory_of:
        what = args.memory_of
        case = Case(args.preset, args.device, what["size"], GraphSpec(**what["spec"]), what["edges"])
        print(json.dumps(memory(case, what["variant"], args.device)))
        return
    case = Case(args.preset, args.device, args.size, GraphSpec())
    results: dict[str, Any] = {"environment": environment(args.device)}
    sections = [compare_steps(case, args, results)]
    del case
    if args.cutoffs:
        sections.append(compare_cutoffs(args, results))
    write(args.out, "GemNet-T: a training step without triplets", sections, results)


if __name__ == "__main__":
    main()
