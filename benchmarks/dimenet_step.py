"""One conservative training step: this DimeNet++, triplet-free, against the plain triplet form of the same network.

Energies, forces as their gradient, the gradient of the loss (double backward) and AdamW. Same weights, same graph, one
run, variants in turns; memory of each variant in a fresh process. The plain form is the tests' oracle, with angles as
the public code computes them: a message and an embedded basis are gathered for each triplet. Listing triplets is not
measured.

    python benchmarks/dimenet_step.py --out benchmarks/results/DATE-dimenet-step-cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from report import alternate, environment, in_fresh_process, peak_megabytes, spread, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle_dimenet
import structures
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from egnscale.data.batch import build_graph
from egnscale.launch.loading import graph_spec
from egnscale.models import DimeNetPlusPlus, ExtendedGraph, Prediction, build_model, dimenet, layers
from egnscale.models.triplets import PathHarmonics

#: `plain, own SiLU` has this package's activation function in place of torch's, `no triplets` neither form's triplet
#: sums: what both have in common.
VARIANTS = ("plain", "plain, own SiLU", "egnscale", "no triplets")
NOTE = """\
fp32; median [min-max] of {rounds} rounds, ratios round by round. Peak: memory of forward, forces and backward in a
fresh process, over what was there before (weights, gradients, graph, list of triplets). On a CPU, resident memory with
MALLOC_MMAP_THRESHOLD_=65536, so that what is freed is given back. Difference: of energies and forces from those of the
plain form, relative, with random weights in the last layers."""


def straight_through(x: Tensor, angular: PathHarmonics, graph: ExtendedGraph) -> Tensor:
    """In place of a triplet sum: as large a result, and all layers before and after it still have work."""
    return x[0]


class Case:
    """A model, a graph, and one training step in each variant."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        with torch.device(args.device):
            self.model: DimeNetPlusPlus = build_model(args.preset)
        for name, parameter in self.model.named_parameters():
            if name.endswith("output.lin.weight"):  # starts at zero
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        graph = build_graph([structures.slab(size=args.size)], graph_spec(self.model.config))
        paths = oracle_dimenet.list_paths(graph)
        self.graph = graph.to(args.device)
        self.paths = oracle_dimenet.Paths(*(rows.to(args.device) for rows in paths))
        # A learning rate of zero: all the work of an update, and the same weights for every variant.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # there in every step but the first

    def predict(self, variant: str) -> Prediction:
        if variant.startswith("plain"):
            act = silu if variant == "plain" else layers.silu
            return oracle_dimenet.dimenet(self.model, self.graph, angle="arctangent", paths=self.paths, act=act)
        if variant == "no triplets":
            with mock.patch.object(dimenet, "path_sum", straight_through):
                return self.model(self.graph)
        return self.model(self.graph)

    def forward_backward(self, variant: str) -> None:
        energy, forces = self.predict(variant)
        assert forces is not None
        self.optimizer.zero_grad(set_to_none=False)
        (energy.abs().mean() + 50 * forces.norm(dim=1).mean()).backward()

    def step(self, variant: str) -> None:
        self.forward_backward(variant)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="dimenet++-large")
    parser.add_argument("--size", type=int, nargs=3, default=(4, 4, 5), help="of the slab in atoms (default: 4 4 5)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    case = Case(args)
    if args.memory_of:
        print(json.dumps(peak_megabytes(partial(case.forward_backward, args.memory_of), args.device)))
        return
    plain, ours = (case.predict(variant) for variant in ("plain", "egnscale"))
    difference = max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(ours, plain, strict=True))
    del plain, ours
    times = alternate({variant: partial(case.step, variant) for variant in VARIANTS}, args.device, args.rounds)
    peaks = {variant: in_fresh_process("--memory-of", variant) for variant in VARIANTS}
    with FlopCounterMode(display=False) as flops:
        case.forward_backward("no triplets")
    results: dict[str, Any] = {
        "environment": environment(args.device),
        "seconds": times,
        "peak_megabytes": peaks,
        "difference": difference,
        "common_flops": flops.get_total_flops(),
    }
    rows = [
        (
            variant,
            spread(times[variant]),
            spread(ratios(times["plain"], times[variant])),
            f"{peaks[variant]:.0f}",
            f"{peaks['plain'] / peaks[variant]:.2f}",
        )
        for variant in VARIANTS
    ]
    rest = times["no triplets"]
    of_triplets = {name: [t - r for t, r in zip(times[name], rest, strict=True)] for name in ("plain", "egnscale")}
    graph = case.graph
    title = f"{args.preset}: {graph.num_atoms} atoms, {graph.num_edges} edges, {len(case.paths.kj)} triplets"
    body = table(("form", "s per step", "times faster", "peak MB", "times smaller"), rows)
    note = f"{NOTE.format(rounds=args.rounds)} It is {difference:.1e}."
    remark = (
        f"What both have in common, products of edge features of {flops.get_total_flops() / 1e9:.0f} GFLOP, bounds how "
        f"much faster any form of the triplets can be: {spread(ratios(times['plain'], rest))} times. The triplets by "
        f"themselves (time less that without triplets) are {spread(ratios(*of_triplets.values()))} times faster."
    )
    sections = [f"## {title}", note, body, remark]
    write(args.out, "DimeNet++: a conservative training step without triplets", sections, results)


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


if __name__ == "__main__":
    main()
