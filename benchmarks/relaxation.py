"""Relaxing slabs as a batch, against one after the other with ASE's LBFGS and the calculator.

Both relax the same structures of a store with the same checkpoint, settings, precision and number of torch threads, in
turns; the ratio is wall time over wall time, round by round. Final energies are compared structure by structure. What
each side spends its time on is measured in one more round on one thread, and what the size of a batch does to graph and
model by themselves.

    python benchmarks/relaxation.py RUN STORE --threads 1 2 --out benchmarks/results/DATE-relaxation-cpu
    python benchmarks/relaxation.py STORE --preset gemnet-dt --structures 8 --fmax 0 --steps 2      # random weights
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.optimize import LBFGS
from report import environment, spread, table, write
from torch import nn

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.data.store import Store
from egnscale.launch import Calculator
from egnscale.launch.lbfgs import LBFGSOptions
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.relaxation import Potential, RelaxOptions, relax
from egnscale.launch.run_files import TrainedModel, load_trained
from egnscale.launch.tasks import Normalizer
from egnscale.models import build_model, count_parameters

BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Timed:
    """A callable that adds up how long it takes."""

    def __init__(self, work: Callable[..., Any], device: torch.device) -> None:
        self.work, self.device, self.seconds = work, device, 0.0

    def __call__(self, *args: Any) -> Any:
        start = now(self.device)
        result = self.work(*args)
        self.seconds += now(self.device) - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class OneByOne:
    """`Calculator` and ASE's LBFGS."""

    def __init__(self, trained: TrainedModel, device: torch.device, dtype: torch.dtype, options: RelaxOptions) -> None:
        # As `Calculator(checkpoint)` makes itself, also for models that are no checkpoint.
        self.calculator = Calculator.__new__(Calculator)
        super(Calculator, self.calculator).__init__()
        model = trained.model.to(device, dtype)
        self.calculator.mesh, self.calculator.device, self.calculator.model = None, device, model
        self.calculator.normalizer = trained.normalizer
        self.calculator.collate = PartCollate(Collate(graph_spec(model.config), model.config.num_elements, dtype))
        self.options = options

    def __call__(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """Final energies in eV, and steps."""
        energies, steps = [], []
        for sample in samples:
            atoms = sample.to_atoms()
            atoms.calc = self.calculator
            optimizer = LBFGS(atoms, logfile=None, **asdict(self.options.optimizer))
            optimizer.run(fmax=self.options.fmax, steps=self.options.steps)
            energies.append(atoms.get_potential_energy())
            steps.append(optimizer.nsteps)
        return np.array(energies), np.array(steps)


class Batched:
    """`egnscale relax`, without its files."""

    def __init__(self, trained: TrainedModel, device: torch.device, dtype: torch.dtype, options: RelaxOptions) -> None:
        self.potential = Potential.of(trained, device, dtype)
        self.options = options

    def __call__(self, samples: Sequence[Sample], lanes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        results = list(
            relax(
                samples,
                self.potential,
                self.options,
                max_atoms=self.potential.max_atoms,
                lanes=lanes or self.potential.lanes,
            )
        )
        results.sort(key=lambda relaxed: relaxed.index)
        return np.array([relaxed.energy for relaxed in results]), np.array([relaxed.steps for relaxed in results])


def compare(single: OneByOne, batched: Batched, samples: list[Sample], args: argparse.Namespace) -> dict[str, Any]:
    works = {"one by one": single, "batch": batched}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    busy: dict[str, list[float]] = {name: [] for name in works}
    per_step: dict[str, list[float]] = {name: [] for name in works}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for work in works.values():
        work(samples[:2])  # not counted
    for _ in range(args.rounds):
        for name, work in works.items():
            start, start_busy = now(batched.potential.device), time.process_time()
            found[name] = work(samples)
            taken = now(batched.potential.device) - start
            busy[name].append(time.process_time() - start_busy)
            seconds[name].append(taken)
            per_step[name].append(1e3 * taken / (found[name][1] + 1).sum())
    atoms = np.array([sample.num_atoms for sample in samples])
    difference = np.abs(found["batch"][0] - found["one by one"][0]) / atoms
    steps = {name: values[1] for name, values in found.items()}
    return {
        "seconds": seconds,
        "CPU seconds": busy,
        "ratio": [a / b for a, b in zip(seconds["one by one"], seconds["batch"], strict=True)],
        "CPU ratio": [a / b for a, b in zip(busy["one by one"], busy["batch"], strict=True)],
        "ms per structure and step": per_step,
        "ratio per step": [a / b for a, b in zip(per_step["one by one"], per_step["batch"], strict=True)],
        "steps": {name: int(values.sum()) for name, values in steps.items()},
        "same number of steps": int((steps["batch"] == steps["one by one"]).sum()),
        "converged": {name: int((values < args.steps).sum()) for name, values in steps.items()},
        "energy difference, eV/atom": {
            "median": float(np.median(difference)),
            "largest": float(difference.max()),
            "within 0.01": int((difference < 0.01).sum()),
        },
    }


def split_of_time(single: OneByOne, batched: Batched, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """ms per structure and step on one thread: graph, model, and everything else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = batched.potential.device
    result = {}
    for name in ("one by one", "batch"):
        model: Any = single.calculator.model if name == "one by one" else batched.potential.model
        collate = single.calculator.collate if name == "one by one" else batched.potential.collate
        timed_model, timed_collate = Timed(model, device), Timed(collate, device)
        start = now(device)
        if name == "one by one":
            single.calculator.model, single.calculator.collate = timed_model, timed_collate  # type: ignore[assignment]
            _, steps = single(samples)
            single.calculator.model, single.calculator.collate = model, collate  # type: ignore[assignment]
        else:
            watched = replace(batched.potential, model=timed_model, collate=timed_collate)  # type: ignore[arg-type]
            _, steps = Batched.__call__(_with(batched, watched), samples, lanes=1)
        total = now(device) - start
        each = 1e3 / (steps + 1).sum()
        parts = {"graph": timed_collate.seconds, "model": timed_model.seconds}
        result[name] = {part: each * value for part, value in parts.items()}
        result[name] |= {"rest": each * (total - sum(parts.values())), "total": each * total}
    torch.set_num_threads(threads)
    return result


def _with(batched: Batched, potential: Potential) -> Batched:
    other = Batched.__new__(Batched)
    other.potential, other.options = potential, batched.options
    return other


def batch_sizes(potential: Potential, samples: list[Sample], rounds: int) -> list[dict[str, Any]]:
    """ms per structure of building a graph and of the model, evaluated at once on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for size in (size for size in BATCHES if size <= len(samples)):
        graphs, models = [], []
        for turn in range(rounds + 1):
            start = now(potential.device)
            graph, _ = potential.collate(samples[:size])
            middle = now(potential.device)
            graph = graph.to(potential.device)
            with torch.no_grad():
                potential.model(graph)
            end = now(potential.device)
            if turn:
                graphs.append(1e3 * (middle - start) / size)
                models.append(1e3 * (end - middle) / size)
        rows.append({"structures": size, "edges": graph.num_edges, "graph": graphs, "model": models})
    torch.set_num_threads(threads)
    return rows


def report(results: dict[str, Any], args: argparse.Namespace) -> list[str]:
    model = results["model"]
    sections = [
        f"{model['name']}, {model['parameters']:,} parameters, {args.dtype}; {args.structures} slabs of "
        f"{model['atoms']:.0f} atoms and {model['edges']:.0f} edges (means); fmax {args.fmax} eV/A, at most "
        f"{args.steps} steps, maxstep {args.maxstep} A. Median [min-max] of {args.rounds} rounds in turns. CPU seconds "
        "are those of all threads: other load on the machine changes them less than wall time."
    ]
    for threads, compared in results["comparison"].items():
        energy = compared["energy difference, eV/atom"]
        rows = [
            (
                name,
                spread(compared["seconds"][name], 1),
                spread(compared["CPU seconds"][name], 1),
                spread(compared["ms per structure and step"][name]),
                f"{compared['steps'][name]:,}",
                compared["converged"][name],
            )
            for name in ("one by one", "batch")
        ]
        sections.append(
            f"## Torch threads: {threads}\n\n"
            + table(("", "s", "CPU s", "ms per structure and step", "steps", "converged"), rows)
            + f"\n\nThe batch is **{spread(compared['ratio'])}** times as fast; per structure and step, "
            f"{spread(compared['ratio per step'])} times; in CPU seconds, {spread(compared['CPU ratio'])} times.\n"
            f"Final energies differ by {energy['median']:.1e} eV/atom (median; largest {energy['largest']:.1e}); "
            f"{energy['within 0.01']} of {args.structures} by less than 0.01, "
            f"{compared['same number of steps']} took the same number of steps."
        )
    return [
        *sections,
        "## Where the time goes: ms per structure and step, one thread\n\n"
        + table(
            ("", "graph", "model", "rest", "total"),
            [(name, *(f"{value:.2f}" for value in part.values())) for name, part in results["split"].items()],
        ),
        "## What is evaluated at once: ms per structure, one thread\n\n"
        + table(
            ("structures", "edges", "graph", "model"),
            [
                (row["structures"], f"{row['edges']:,}", spread(row["graph"]), spread(row["model"]))
                for row in results["batch sizes"]
            ],
        ),
    ]


def trained_model(args: argparse.Namespace) -> TrainedModel:
    if args.preset is None:
        return load_trained(args.checkpoint)
    torch.manual_seed(0)
    model = build_model(args.preset, **dict(args.set))
    return TrainedModel(model.eval(), Normalizer(0.0, 1.0, 0.1), {}, Path(args.preset))


def _setting(text: str) -> tuple[str, int | float]:
    name, value = text.split("=")
    return name, float(value) if "." in value else int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="left out with --preset")
    parser.add_argument("store", type=Path)
    parser.add_argument("--preset", help="a model of random weights: for time only, with --fmax 0 and few steps")
    parser.add_argument(
        "--set", type=_setting, nargs="*", default=(), metavar="KEY=N", help="change that model's sizes"
    )
    parser.add_argument("--structures", type=int, default=64)
    parser.add_argument("--fmax", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--maxstep", type=float, default=0.04)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch; each is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.preset is None):
        parser.error("give either a checkpoint or --preset")

    store = Store(args.store)
    samples = [store[index] for index in range(min(args.structures, len(store)))]
    args.structures = len(samples)
    trained = trained_model(args)
    options = RelaxOptions(args.fmax, args.steps, LBFGSOptions(maxstep=args.maxstep))
    how = (torch.device(args.device), getattr(torch, args.dtype), options)
    single, batched = OneByOne(trained, *how), Batched(trained, *how)
    graph, _ = batched.potential.collate(samples)
    model: nn.Module = trained.model
    results: dict[str, Any] = {
        "environment": environment(args.device),
        "model": {
            "name": " ".join([args.preset, *(f"{k}={v}" for k, v in args.set)]) if args.preset else "GemNet-T",
            "parameters": count_parameters(model),
            "atoms": statistics.mean(sample.num_atoms for sample in samples),
            "edges": graph.num_edges / len(samples),
            "atoms at once": batched.potential.max_atoms,
        },
        "comparison": {},
    }
    for threads in args.threads:
        torch.set_num_threads(threads)
        results["comparison"][threads] = compare(single, batched, samples, args)
    results["split"] = split_of_time(single, batched, samples[:8])
    results["batch sizes"] = batch_sizes(batched.potential, samples, 3)
    write(args.out, "Relaxations: a batch against one by one", report(results, args), results)


if __name__ == "__main__":
    main()
