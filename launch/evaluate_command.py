"""`egnscale evaluate CHECKPOINT DATA`: metrics of a checkpoint on one store, or on every split of a data set."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its latest)")
    parser.add_argument("data", type=Path, help="a store, or a data set: then all its validation splits")
    parser.add_argument("--task", choices=["s2ef"], default="s2ef")
    parser.add_argument("--batch-size", type=int, default=8, help="structures per batch (default 8)")
    parser.add_argument("--workers", type=int, default=0, help="processes that build graphs (default 0)")
    parser.add_argument("--all-atoms", action="store_true", help="count forces of fixed atoms too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be at least 1 and --workers at least 0")

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from egnscale.data.sampler import BalancedBatchSampler
    from egnscale.launch.evaluation import evaluate_s2ef
    from egnscale.launch.loading import make_loader, open_labelled, validation_splits
    from egnscale.launch.reporting import s2ef_table
    from egnscale.launch.run_files import load_trained

    trained = load_trained(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    results: dict[str, dict[str, float]] = {}
    with Progress(console=Console(stderr=True), disable=args.json or not sys.stderr.isatty()) as progress:
        for name, path in validation_splits(args.data).items():
            store = open_labelled(path, model.config.num_elements)
            sampler = BalancedBatchSampler(store.num_edges, args.batch_size, 1, 0, shuffle=False)
            advance = partial(_advance, progress, progress.add_task(name, total=len(store)))
            results[name] = evaluate_s2ef(
                model,
                make_loader(store, sampler, model.config, args.workers, device.type == "cuda"),
                trained.normalizer,
                device,
                free_atoms_only=not args.all_atoms,
                observe=advance,
            )
    if not args.json:
        Console().print(s2ef_table(results))
    return {"checkpoint": str(trained.path), "step": trained.run["step"], "splits": results}


def _advance(progress: Any, bar: Any, batch: Any) -> None:
    progress.advance(bar, len(batch.sid))
