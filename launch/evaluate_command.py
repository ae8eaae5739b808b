"""`egnscale evaluate CHECKPOINT DATA`: metrics of a checkpoint on one store, or on every split of a data set."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egnscale.launch.run_files import TrainedModel
    from egnscale.scaling.layout import Mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its latest)")
    parser.add_argument("data", type=Path, help="a store, or a data set: then all its validation splits")
    parser.add_argument("--task", choices=["s2ef"], default="s2ef")
    parser.add_argument("--batch-size", type=int, default=8, help="structures per batch (default 8)")
    parser.add_argument("--workers", type=int, default=0, help="processes that build graphs (default 0)")
    parser.add_argument(
        "--graph", type=int, default=1, metavar="P", help="ranks that share each graph, under a launcher (default 1)"
    )
    parser.add_argument("--all-atoms", action="store_true", help="count forces of fixed atoms too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.batch_size < 1 or args.workers < 0 or args.graph < 1:
        raise ValueError("--batch-size and --graph must be at least 1 and --workers at least 0")

    from rich.console import Console

    from egnscale.launch.reporting import s2ef_table
    from egnscale.launch.run_files import load_trained
    from egnscale.scaling.engine import start_world
    from egnscale.scaling.failure import watched
    from egnscale.scaling.layout import Mesh

    trained = load_trained(args.checkpoint)
    world = start_world()
    with watched(world.rank, world.size, f"egnscale {args.command}"):
        results = _evaluate(args, trained, Mesh.of_world(world.device, graph=args.graph))
    if world.is_main and not args.json:
        Console().print(s2ef_table(results))
    return {"checkpoint": str(trained.path), "step": trained.run["step"], "splits": results}


def _evaluate(args: argparse.Namespace, trained: TrainedModel, mesh: Mesh) -> dict[str, dict[str, float]]:
    """Metrics of each split."""
    from rich.console import Console
    from rich.progress import Progress

    from egnscale.data.sampler import BalancedBatchSampler
    from egnscale.launch.evaluation import evaluate_s2ef
    from egnscale.launch.loading import make_loader, open_labelled, validation_splits

    model = trained.model.to(mesh.device)
    results: dict[str, dict[str, float]] = {}
    quiet = args.json or mesh.rank > 0 or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        for name, path in validation_splits(args.data).items():
            store = open_labelled(path, model.config.num_elements)
            replicas = mesh.layout.data
            sampler = BalancedBatchSampler(store.num_edges, args.batch_size, replicas, mesh.data_rank, shuffle=False)
            results[name] = evaluate_s2ef(
                model,
                make_loader(store, sampler, model.config, mesh, args.workers),
                trained.normalizer,
                mesh.device,
                place=mesh.place,
                free_atoms_only=not args.all_atoms,
                reduce=mesh.sum_over_data,
                observe=partial(_advance, progress, progress.add_task(name, total=len(store)), replicas),
            )
    return results


def _advance(progress: Any, bar: Any, replicas: int, batch: Any) -> None:
    progress.advance(bar, len(batch.sid) * replicas)
