"""`egnscale evaluate CHECKPOINT DATA`: metrics of a checkpoint on one store, or on every split of a data set."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egnscale.launch.relax_command import add_pipe_argument, add_relaxation_arguments, relax_options

if TYPE_CHECKING:
    from egnscale.data.dataset import Dataset
    from egnscale.data.sample import Sample
    from egnscale.launch.reference import Reference
    from egnscale.launch.run_files import TrainedModel, TrainedRun
    from egnscale.launch.submission import Arrays
    from egnscale.scaling.layout import Mesh

Results = dict[str, dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory (its latest)")
    parser.add_argument("data", type=Path, help="a store, or a data set: then all its validation splits")
    parser.add_argument(
        "--task",
        choices=["s2ef", "is2re", "is2rs"],
        default="s2ef",
        help="energies and forces (default), relaxed energies, or relaxed structures",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="B", help="structures per batch (default 8; 64 where they are relaxed)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that build graphs (default 0)")
    parser.add_argument(
        "--graph", type=int, default=1, metavar="P", help="ranks that share each graph, under a launcher (default 1)"
    )
    add_pipe_argument(parser)
    parser.add_argument("--all-atoms", action="store_true", help="count forces of fixed atoms too")
    parser.add_argument("--max-structures", type=int, metavar="N", help="the first N of each split (default: all)")
    parser.add_argument(
        "--predictions", type=Path, metavar="OUT.npz", help="write predictions as OC20's leaderboard takes them"
    )
    parser.add_argument(
        "--full-precision", action="store_true", help="forces in --predictions as float32 (default: float16, as OC20)"
    )
    group = parser.add_argument_group("is2re and is2rs")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="keep relaxations in DIR/SPLIT: they go on there when stopped, and serve both tasks",
    )
    group.add_argument(
        "--reference",
        choices=["emt", "none"],
        help="forces for FbT and AFbT: ASE's EMT, or none (default: emt for data that were made with it)",
    )
    group.add_argument(
        "--reference-results", type=Path, metavar="FILE", help="such forces from a file that ASE reads, by sid"
    )
    group.add_argument(
        "--reference-inputs", type=Path, metavar="DIR", help="write the structures at which such forces are wanted"
    )
    add_relaxation_arguments(parser, batch_size=False)


def run(args: argparse.Namespace) -> dict[str, Any]:
    relaxed = args.task != "s2ef"
    batch_size = (64 if relaxed else 8) if args.batch_size is None else args.batch_size
    if min(batch_size, args.graph, args.pipe) < 1 or args.workers < 0:
        raise ValueError("--batch-size, --graph and --pipe must be at least 1 and --workers at least 0")
    if args.max_structures is not None and args.max_structures < 1:
        raise ValueError("--max-structures must be at least 1")
    _check(args, relaxed)

    from rich.console import Console

    from egnscale.launch.relaxation_tables import task_table
    from egnscale.launch.run_files import load_trained, read_trained
    from egnscale.launch.submission import write_predictions
    from egnscale.scaling.engine import once, start_world
    from egnscale.scaling.failure import watched
    from egnscale.scaling.layout import Mesh

    checkpoint = read_trained(args.checkpoint)
    _check_model(args, checkpoint)
    world = start_world()
    with watched(world.rank, world.size, f"egnscale {args.command}"):
        mesh = Mesh.of_world(world.device, graph=args.graph, pipe=args.pipe)
        trained = load_trained(checkpoint, mesh)
        evaluate = _evaluate_relaxed if relaxed else _evaluate
        results, predictions = evaluate(args, trained, mesh, batch_size)
        if args.predictions is not None:
            once(lambda: write_predictions(args.predictions, predictions))
    if world.is_main and not args.json:
        console = Console()
        if results:
            # A pipe has no width; the usual 80 columns would break the numbers.
            (console if console.is_terminal else Console(width=120)).print(task_table(args.task, results))
        if args.predictions is not None:
            print(f"{args.predictions}: {args.task} predictions of {', '.join(predictions)}")
        if args.reference_inputs is not None:
            print(f"{args.reference_inputs}: predicted structures; --reference-results reads their forces back")
    report: dict[str, Any] = {"checkpoint": str(trained.path), "step": trained.run["step"], "splits": results}
    if relaxed:
        # What there was nothing to average over is null: JSON has no NaN.
        known = {
            name: {metric: None if math.isnan(value) else value for metric, value in metrics.items()}
            for name, metrics in results.items()
        }
        report |= {"task": args.task, "splits": known}
    return report


def _check(args: argparse.Namespace, relaxed: bool) -> None:
    """Arguments that do not go together."""
    from egnscale.launch.submission import check_name

    if args.predictions is not None:
        check_name(args.predictions)
    if relaxed and args.graph > 1:
        raise ValueError(
            f"--task {args.task} relaxes whole structures on each rank; leave --graph out "
            "(for one that does not fit a device: Calculator(checkpoint, mesh=...) with an ASE optimizer)"
        )
    if args.reference and args.reference_results:
        raise ValueError("--reference and --reference-results are two sources of the same forces; give one")
    for name in ("reference", "reference_results", "reference_inputs"):
        if getattr(args, name) and args.task != "is2rs":
            raise ValueError(f"--{name.replace('_', '-')} is for --task is2rs")
    for name in ("all_atoms", "workers", "full_precision"):
        if getattr(args, name) and relaxed:
            raise ValueError(f"--{name.replace('_', '-')} is for --task s2ef; leave it out")
    if args.full_precision and args.predictions is None:
        raise ValueError("--full-precision is for the forces in --predictions FILE; add it, or leave this out")
    if not relaxed:
        _check_no_relaxation(args, "--task s2ef")
    relax_options(args)


def _check_model(args: argparse.Namespace, trained: TrainedRun) -> None:
    """Arguments that do not go together with the model."""
    if trained.config.forces != "none":
        return
    if args.task != "is2re":
        raise ValueError(f"{trained.path}: the model predicts no forces; use --task is2re")
    _check_no_relaxation(args, "a model without forces", but="dtype")


def _check_no_relaxation(args: argparse.Namespace, what: str, but: str = "") -> None:
    """Raises ValueError for arguments that say how to relax, where nothing is."""
    if args.out is not None:
        raise ValueError(f"--out keeps relaxations, and {what} makes none; use --predictions")
    parser = argparse.ArgumentParser()
    add_relaxation_arguments(parser, batch_size=False)
    for name, default in vars(parser.parse_args([])).items():
        if name != but and getattr(args, name) != default:
            raise ValueError(f"--{name} is for relaxations, and {what} makes none; leave it out")


def _evaluate(
    args: argparse.Namespace, trained: TrainedModel, mesh: Mesh, batch_size: int
) -> tuple[Results, dict[str, Arrays]]:
    """S2EF metrics of each split that has labels, and predictions where they are asked for."""
    from rich.console import Console
    from rich.progress import Progress

    from egnscale.data.sampler import BalancedBatchSampler
    from egnscale.launch.evaluation import evaluate_s2ef
    from egnscale.launch.loading import make_loader, validation_splits
    from egnscale.launch.relaxation_folder import names_of
    from egnscale.launch.run_files import together
    from egnscale.launch.s2ef_predictions import Recorder, predict_s2ef

    model = trained.model.to(mesh.device)
    predict, at_once = together(model)
    results: Results = {}
    predictions: dict[str, Arrays] = {}
    quiet = args.json or mesh.rank > 0 or not sys.stderr.isatty()
    splits = {}
    for name, path in validation_splits(args.data).items():
        store, labelled = _open(path, model.config.num_elements, args.predictions is not None)
        count = len(store) if args.max_structures is None else min(args.max_structures, len(store))
        if args.predictions is not None:
            names_of(path, store.sid[:count], store.fid[:count])  # what the file calls them
        splits[name] = (store, labelled, count)
    with Progress(console=Console(stderr=True), disable=quiet) as progress:
        for name, (store, labelled, count) in splits.items():
            replicas = mesh.layout.data
            sampler = BalancedBatchSampler(store.num_edges[:count], batch_size, replicas, mesh.data_rank, shuffle=False)
            loader = make_loader(store, sampler, model.config, mesh, args.workers, "s2ef" if labelled else None)
            observe = partial(_advance, progress, progress.add_task(name, total=count), replicas)
            recorder = Recorder(mesh, full_precision=args.full_precision)
            if labelled:
                results[name] = evaluate_s2ef(
                    predict,
                    loader,
                    trained.normalizer,
                    mesh.device,
                    place=mesh.place,
                    at_once=at_once,
                    free_atoms_only=not args.all_atoms,
                    reduce=mesh.sum_over_data,
                    record=recorder if args.predictions is not None else _ignore,
                    observe=observe,
                )
            else:
                predict_s2ef(predict, loader, trained.normalizer, mesh, recorder, observe, at_once)
            if args.predictions is not None:
                predictions[name] = recorder.arrays(store, count)
    return results, predictions


def _open(path: Path, num_elements: int, unlabelled: bool) -> tuple[Dataset, bool]:
    """A store, and whether it has labels; if it must have them, the usual error where it has not."""
    from egnscale.launch.loading import check_elements, open_data, open_labelled

    if unlabelled:
        store = open_data(path)
        if len(store) and (store[0].energy is None or store[0].forces is None):
            check_elements(path, store, num_elements)
            return store, False
    return open_labelled(path, num_elements), True


def _evaluate_relaxed(
    args: argparse.Namespace, trained: TrainedModel, mesh: Mesh, batch_size: int
) -> tuple[Results, dict[str, Arrays]]:
    """IS2RE or IS2RS metrics of each split that has labels, and predictions."""
    import torch

    from egnscale.launch.loading import check_elements, open_data, validation_splits
    from egnscale.launch.reference import check_sids, write_inputs
    from egnscale.launch.relax_work import settings_of
    from egnscale.launch.relaxation import Potential
    from egnscale.launch.relaxed_evaluation import Split, evaluate_split, trivial_energy
    from egnscale.scaling.engine import once

    options = relax_options(args)
    potential = Potential.of(trained, mesh.device, getattr(torch, args.dtype))
    results: Results = {}
    predictions: dict[str, Arrays] = {}
    inputs: list[Sample] = []
    splits = []
    paths = validation_splits(args.data, "is2re")
    # The training set beside a split, once for all splits beside it.
    trivial = {
        folder: trivial_energy(folder / "train", trained) if args.task == "is2re" else math.nan
        for folder in dict.fromkeys(path.absolute().parent for path in paths.values())
    }
    for name, path in paths.items():
        store = open_data(path)
        check_elements(path, store, trained.model.config.num_elements)
        splits.append(
            Split.of(
                name,
                store,
                args.task,
                reference=_reference(args, store),
                energy_mean=trivial[path.absolute().parent],
                max_structures=args.max_structures,
                labels_needed=args.predictions is None and args.reference_inputs is None,
            )
        )
    if args.reference_inputs is not None:
        check_sids([sid for split in splits for sid in split.samples.sid.tolist()])
    for split in splits:
        done = evaluate_split(
            split,
            potential,
            options,
            mesh,
            batch_size=batch_size,
            out=None if args.out is None else args.out / split.name,
            settings=settings_of(trained.path, options, args.dtype)
            | {"input": str(split.samples.store.path.resolve())},
            quiet=args.json or mesh.rank > 0,
        )
        predictions[split.name] = done.predictions
        inputs += done.structures
        if done.metrics:
            results[split.name] = done.metrics
    if args.reference_inputs is not None:
        once(lambda: write_inputs(args.reference_inputs, inputs))
    return results, predictions


def _reference(args: argparse.Namespace, store: Dataset) -> Reference | None:
    from egnscale.launch.reference import emt_forces, made_with_emt, read_results

    if args.task != "is2rs" or args.reference == "none":
        return None
    if args.reference_results is not None:
        return read_results(args.reference_results)
    if args.reference == "emt" or (args.reference_inputs is None and made_with_emt(store.metadata)):
        return emt_forces
    return None


def _ignore(*_: Any) -> None:
    """What is not to be written is not collected: it would grow with the split."""


def _advance(progress: Any, bar: Any, replicas: int, batch: Any) -> None:
    progress.advance(bar, len(batch.sid) * replicas)
