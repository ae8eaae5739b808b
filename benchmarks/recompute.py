"""What `parallel.recompute` keeps, and what it costs: none, selective and block.

Counted at full size on the meta device, which takes no memory: bytes alive between forward and backward, and operations
of forward and backward. Measured: time of a step in turns, and peak memory of each variant in a fresh process.

    python benchmarks/recompute.py --out benchmarks/results/DATE-recompute-cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import alternate, environment, in_fresh_process, peak_megabytes, spread, table, write
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import structures
from kept import kept_bytes

from egnscale.data.batch import build_graph
from egnscale.launch.loading import graph_spec
from egnscale.models import AtomModel, ExtendedGraph, Prediction, build_model
from egnscale.scaling.recompute import set_recompute

OURS = ("none", "selective", "block")
#: torch's own selective checkpointing: the results of matrix products are kept, all else is run again.
POLICIES = "torch's policies"
PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")]
COUNTED = (
    ("gemnet-dt", "direct", torch.float32),
    ("gemnet-xl", "direct", torch.float32),
    ("gemnet-xl", "direct", torch.bfloat16),
    ("gemnet-960m", "direct", torch.bfloat16),
    ("gemnet-2.5b", "direct", torch.bfloat16),
    ("gemnet-dt", "conservative", torch.float32),
    ("dimenet++-xl", "none", torch.float32),
    ("dimenet++-xl", "conservative", torch.float32),
)
NOTE = """\
A slab of 82 atoms. Kept: bytes of tensors that are alive between forward and backward, over weights and graph, divided
by edges; of conservative models, once forces are there. Operations: of matrix products in forward and backward."""
TIMES = """\
Forward, backward and AdamW in fp32; median [min-max] of {rounds} rounds, ratios round by round. On a CPU these are CPU
seconds of the process, which other load changes little. Peak: memory of forward and backward in a fresh process, over
what was there before (weights, gradients, graph)."""


def with_policies(layer: torch.nn.Module, *args: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def choose(model: AtomModel, how: str) -> None:
    if how == POLICIES:
        model.run = with_policies
    else:
        set_recompute(model, how)  # type: ignore[arg-type]


def loss(prediction: Prediction) -> torch.Tensor:
    found = prediction.energy.abs().mean()
    return found if prediction.forces is None else found + prediction.forces.norm(dim=1).mean()


def variants(forces: str) -> tuple[str, ...]:
    """torch's policies cannot be gone through twice, as conservative forces would."""
    return OURS if forces == "conservative" else (*OURS, POLICIES)


def build(preset: str, forces: str, device: str, precision: torch.dtype = torch.float32) -> AtomModel:
    torch.manual_seed(0)
    with torch.device(device):
        return build_model(preset, forces=forces).to(precision)


def slab_for(model: AtomModel, size: tuple[int, int, int], device: str) -> ExtendedGraph:
    return build_graph([structures.slab(size=size)], graph_spec(model.config)).to(device)


def count(args: argparse.Namespace, results: dict[str, Any]) -> str:
    rows, results["counted"] = [], []
    for preset, forces, precision in COUNTED:
        model = build(preset, forces, "meta", precision)
        graph = slab_for(model, (4, 4, 5), "meta")
        kept: dict[str, float] = {}
        operations: dict[str, float] = {}
        for how in variants(forces):
            choose(model, how)
            kept[how] = kept_bytes(model, graph) / graph.num_edges / 1024
            with FlopCounterMode(display=False) as flops:
                loss(model(graph)).backward()
            operations[how] = flops.get_total_flops()
        name = str(precision).removeprefix("torch.")
        results["counted"].append(
            {"model": preset, "forces": forces, "precision": name, "kib": kept, "flops": operations}
        )
        for how, size in kept.items():
            of_none, work = size / kept["none"], operations[how] / operations["none"]
            rows.append((f"{preset}, {forces}, {name}", how, f"{size:.1f}", f"{of_none:.3f}", f"{work:.3f}"))
    header = ("model", "recompute", "kept, KiB an edge", "of none's", "operations, of none's")
    return f"## Counted\n\n{NOTE}\n\n{table(header, rows)}"


def forward_backward(model: AtomModel, graph: ExtendedGraph, how: str) -> None:
    choose(model, how)
    model.zero_grad(set_to_none=False)
    loss(model(graph)).backward()


def peak(preset: str, forces: str, size: tuple[int, int, int], device: str, how: str) -> float:
    """MB, in this process."""
    model = build(preset, forces, device)
    graph = slab_for(model, size, device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there in every step but the first
    forward_backward(model, slab_for(model, (1, 1, 3), device), how)  # what is made once and stays
    return peak_megabytes(partial(forward_backward, model, graph, how), device)


def measure(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    sections, results["measured"] = [], []
    for preset, forces in args.models:
        model = build(preset, forces, args.device)
        graph = slab_for(model, args.size, args.device)
        # A learning rate of zero: all the work of an update, and the same weights for every variant.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, amsgrad=True)

        def step(how: str, model: Any = model, graph: Any = graph, optimizer: Any = optimizer) -> None:
            forward_backward(model, graph, how)
            optimizer.step()

        times = alternate({how: partial(step, how) for how in variants(forces)}, args.device, args.rounds)
        atoms, edges = graph.num_atoms, graph.num_edges
        del model, graph, optimizer, step
        what = {"preset": preset, "forces": forces, "size": args.size, "device": args.device}
        peaks = {how: in_fresh_process("--peak-of", json.dumps({**what, "how": how})) for how in times}
        results["measured"].append({**what, "seconds": times, "peak_mb": peaks})
        rows = [
            (
                how,
                spread(taken),
                spread([ours / none for ours, none in zip(taken, times["none"], strict=True)]),
                f"{peaks[how]:.0f}",
                f"{peaks[how] / peaks['none']:.3f}",
            )
            for how, taken in times.items()
        ]
        header = ("recompute", "s per step", "of none's", "peak MB", "of none's")
        title = f"## One step of {preset}, {forces} forces: {atoms} atoms, {edges} edges"
        sections.append(f"{title}\n\n{TIMES.format(rounds=args.rounds)}\n\n{table(header, rows)}")
    return sections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--models",
        type=lambda text: tuple(text.split(":")),
        nargs="*",
        default=[("gemnet-dt", "direct"), ("dimenet++-large", "conservative")],
        help="measured ones, PRESET:FORCES (default: gemnet-dt:direct dimenet++-large:conservative)",
    )
    parser.add_argument("--size", type=int, nargs=3, default=(4, 4, 5), help="of the slab in atoms (default: 4 4 5)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.md")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.peak_of:
        print(json.dumps(peak(**args.peak_of)))
        return
    results: dict[str, Any] = {"environment": environment(args.device)}
    sections = [count(args, results), *measure(args, results)]
    write(args.out, "Activations that are made again", sections, results)


if __name__ == "__main__":
    main()
