"""The triplet sum in its two forms against degree, forward and backward: where `HARMONIC_ABOVE` comes from.

python benchmarks/triplets.py --out benchmarks/results/DATE-triplets-cpu
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import alternate, environment, spread, table, write

from egnscale.models.graph import EdgeBuckets
from egnscale.models.triplets import HARMONIC_ABOVE, angular_basis, bilinear, triplet_sum

NUM_SPHERICAL, INNER = 7, 16


def works(
    degree: int, features: int, out: int, args: argparse.Namespace
) -> tuple[int, dict[str, Callable[[], object]]]:
    """About `args.edges` edges, and the forward and backward of each form, with the bilinear layer that follows."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    buckets = EdgeBuckets.build(torch.full((max(1, args.edges // degree),), degree))
    buckets = buckets.map(lambda index: index.to(args.device))
    edges = len(buckets.rows)
    direction = torch.nn.functional.normalize(torch.randn(edges, 3, device=args.device), dim=1)
    angular = {form: angular_basis(direction, buckets, NUM_SPHERICAL, form) for form in ("block", "harmonic")}

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=args.device, requires_grad=True)

    x, radial, weight = leaf(edges, features), leaf(edges, INNER, NUM_SPHERICAL), leaf(features, INNER, out)
    sums, d_sums, d_out = leaf(edges, NUM_SPHERICAL, features), leaf(edges, NUM_SPHERICAL, features), leaf(edges, out)

    def run(output: Callable[[], torch.Tensor], gradient: torch.Tensor) -> Callable[[], object]:
        return lambda: output().backward(gradient.detach())

    return edges, {
        "block": run(lambda: triplet_sum(x, angular["block"], buckets), d_sums),
        "harmonic": run(lambda: triplet_sum(x, angular["harmonic"], buckets), d_sums),
        "bilinear": run(lambda: bilinear(sums, radial, weight), d_out),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--edges", type=int, default=2400)
    parser.add_argument("--degrees", type=int, nargs="*", default=(12, 24, 32, 40, 48, 56, 64, 80, 100))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    results: dict[str, Any] = {"environment": environment(args.device), "rows": []}
    rows = []
    for features, out in ((64, 64), (384, 192)):
        for degree in args.degrees:
            edges, pieces = works(degree, features, out, args)
            times = {
                name: [1e6 * t / edges for t in ts] for name, ts in alternate(pieces, args.device, args.rounds).items()
            }
            results["rows"].append({"features": features, "out": out, "degree": degree, "edges": edges, "us": times})
            ratio = statistics.median(times["block"]) / statistics.median(times["harmonic"])
            rows.append((f"{features}, {out}", degree, *(spread(ts) for ts in times.values()), f"{ratio:.2f}"))
    note = (
        f"Microseconds per edge, {args.dtype}, forward and backward, median [min-max] of {args.rounds} rounds; about "
        f"{args.edges} edges, all atoms of one degree. `auto` takes the harmonic form above degree {HARMONIC_ABOVE}."
    )
    header = ("features, out", "degree", "block", "harmonic", "bilinear layer after it", "block / harmonic")
    write(args.out, "Triplet sums: block against harmonic form", [note, table(header, rows)], results)


if __name__ == "__main__":
    main()
