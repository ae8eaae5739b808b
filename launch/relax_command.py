"""`egnscale relax CHECKPOINT STRUCTURES OUT`: relax structures with a model, many at once."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from egnscale.launch.relaxation import Relaxed, RelaxOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run directory (its latest)"
    )
    parser.add_argument(
        "structures",
        metavar="STRUCTURES",
        type=Path,
        help="a file of one or more structures that ASE reads, or a store; atoms held by FixAtoms stay",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write; what was stopped there goes on")
    add_relaxation_arguments(parser)
    add_pipe_argument(parser)
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--traj",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write every step to OUT/trajectories (default: yes)",
    )


def add_pipe_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipe",
        type=int,
        default=1,
        metavar="S",
        help="stages that the model's layers are spread over, under a launcher (default 1)",
    )


def add_relaxation_arguments(parser: argparse.ArgumentParser, *, batch_size: bool = True) -> None:
    """Arguments of all commands that relax."""
    group = parser.add_argument_group("relaxation (defaults: OC20's)")
    group.add_argument(
        "--fmax", type=float, default=0.02, metavar="F", help="eV/A, where it ends (default %(default)s)"
    )
    group.add_argument("--steps", type=int, default=200, metavar="K", help="steps at most (default %(default)s)")
    group.add_argument(
        "--maxstep", type=float, default=0.04, metavar="A", help="how far an atom moves in a step (default %(default)s)"
    )
    group.add_argument("--memory", type=int, default=50, metavar="M", help="of L-BFGS, in steps (default %(default)s)")
    group.add_argument("--damping", type=float, default=1.0, metavar="D", help="factor of a step (default %(default)s)")
    group.add_argument("--alpha", type=float, default=70.0, metavar="H", help="first curvature (default %(default)s)")
    if batch_size:
        group.add_argument(
            "--batch-size", type=int, default=64, metavar="B", help="structures at the same time (default %(default)s)"
        )
    group.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="precision of the model; float64 makes relaxations smoother (default float32)",
    )


def relax_options(args: argparse.Namespace) -> RelaxOptions:
    """Raises ValueError for settings that make no sense."""
    from egnscale.launch.lbfgs import LBFGSOptions
    from egnscale.launch.relaxation import RelaxOptions

    return RelaxOptions(args.fmax, args.steps, LBFGSOptions(args.memory, args.damping, args.alpha, args.maxstep))


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.batch_size < 1 or args.pipe < 1:
        raise ValueError("--batch-size and --pipe must be at least 1")
    options = relax_options(args)

    import torch
    from rich.console import Console

    from egnscale.launch.relax_work import relax_into, settings_of
    from egnscale.launch.relaxation import NO_FORCES, Potential
    from egnscale.launch.relaxation_folder import RelaxationFolder, names_of, summary
    from egnscale.launch.run_files import load_trained, read_trained
    from egnscale.launch.structures import read_structures
    from egnscale.scaling.engine import start_world
    from egnscale.scaling.failure import watched
    from egnscale.scaling.layout import Mesh

    checkpoint = read_trained(args.checkpoint)
    samples = read_structures(args.structures, checkpoint.config.num_elements)
    names = names_of(args.structures, samples.sid, samples.fid)
    world = start_world()
    device = _device(args.device, world.size, world.device)
    settings = settings_of(checkpoint.path, options, args.dtype) | {
        "trajectories": args.traj,
        "input": str(args.structures.resolve()),
    }
    folder = RelaxationFolder(args.out, names, settings)
    start = time.monotonic()
    with watched(world.rank, world.size, f"egnscale {args.command}"):
        mesh = Mesh.of_world(world.device, pipe=args.pipe)
        potential = Potential.of(load_trained(checkpoint, mesh), device, getattr(torch, args.dtype))
        if not potential.has_forces:
            raise ValueError(f"{checkpoint.path}: {NO_FORCES}")
        results = relax_into(
            folder,
            samples,
            potential,
            options,
            mesh,
            batch_size=args.batch_size,
            trajectories=args.traj,
            retry=True,
            quiet=args.json or not world.is_main,
        )
    report = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.run["step"],
        "out": str(args.out),
        **summary(results, names),
        "seconds": round(time.monotonic() - start, 2),
    }
    if world.is_main and not args.json:
        Console().print(_table(results, report["seconds"]))
        for name, reason in list(report["failed"].items())[:20]:
            print(f"failed: {name}: {reason}")
        if report["failed"]:
            print("the same command tries what failed again")
        print(f"{args.out}: relaxed.extxyz, relaxed_positions.npz" + ", trajectories" * args.traj)
    return report


def _device(wanted: str | None, ranks: int, default: torch.device) -> torch.device:
    import torch

    if wanted is None:
        return default
    if ranks > 1:
        raise ValueError("--device is for one process; under a launcher every rank has its own device")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted} cannot be used here: {' '.join(str(error).split())[:120]}") from None
    return device


def _table(results: Sequence[Relaxed], seconds: float) -> Table:
    """How the relaxations ended."""
    import statistics

    from rich.table import Table

    table = Table(caption=f"{sum(relaxed.steps for relaxed in results):,} steps in {seconds:.1f} s")
    for heading in ("", "structures", "steps\n(median)", "steps\n(most)", "largest force\n(median) \\[eV/Å]"):
        table.add_column(heading, justify="right" if heading else "left")
    for status in ("converged", "step limit", "failed"):
        those = [relaxed for relaxed in results if relaxed.status == status]
        if not those:
            continue
        steps = [relaxed.steps for relaxed in those]
        forces = [relaxed.largest_force for relaxed in those if relaxed.forces is not None]
        table.add_row(
            status,
            str(len(those)),
            f"{statistics.median(steps):g}",
            str(max(steps)),
            f"{statistics.median(forces):.3f}" if forces else "-",
        )
    return table
