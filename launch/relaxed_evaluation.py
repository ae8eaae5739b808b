"""Evaluate a model on IS2RE and IS2RS: from an initial structure to the relaxed energy, or to the relaxed structure.

IS2RS relaxes with the model's forces. So does IS2RE, and takes the model's energy where that ends; a model without
forces predicts the relaxed energy from the initial structure directly. One relaxation serves both tasks: where it is
written to a directory, the other task, or the same again, finds it there.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from egnscale.data.dataset import Dataset
from egnscale.data.sample import Sample
from egnscale.launch.loading import check_all_labelled, is_data, open_data
from egnscale.launch.reference import Reference
from egnscale.launch.relax_work import Patience, relax_into, relax_share, share_of
from egnscale.launch.relaxation import NO_FORCES, Potential, Relaxed, RelaxOptions
from egnscale.launch.relaxation_folder import RelaxationFolder, names_of
from egnscale.launch.relaxation_metrics import IS2REMetrics, IS2RSMetrics
from egnscale.launch.run_files import TrainedModel
from egnscale.launch.structures import First
from egnscale.launch.submission import Arrays, is2re_predictions, is2rs_predictions
from egnscale.scaling.engine import gather_over_ranks
from egnscale.scaling.layout import Mesh

RelaxedTask = Literal["is2re", "is2rs"]


@dataclass(frozen=True)
class Split:
    """One split and how it is evaluated."""

    name: str
    samples: First
    task: RelaxedTask
    reference: Reference | None  #: of forces at predicted structures, for is2rs
    energy_mean: float  #: eV, what the trivial guess predicts, for is2re; NaN: not known
    labelled: bool  #: whether structures have what the task compares with

    @classmethod
    def of(
        cls,
        name: str,
        store: Dataset,
        task: RelaxedTask,
        *,
        reference: Reference | None,
        energy_mean: float,
        max_structures: int | None = None,
        labels_needed: bool = True,
    ) -> Split:
        """Raises ValueError if the store is not of this task and labels are needed, which reference forces replace."""
        samples = First(store, max_structures)
        if not len(samples):
            raise ValueError(f"{store.path} holds no structures")
        field = "energy_relaxed" if task == "is2re" else "positions_relaxed"
        labelled = getattr(samples[0], field) is not None
        if labels_needed and not labelled and reference is None:
            forces = ", --reference or --reference-results judges forces without it" if task == "is2rs" else ""
            raise ValueError(
                f"{store.path}: structures have no {field}, which {task} needs; --predictions FILE writes predictions "
                f"of structures that are not labelled{forces}"
            )
        if labelled:
            check_all_labelled(store, field, task)
        return cls(name, samples, task, reference, energy_mean, labelled)


def trivial_energy(train: Path, trained: TrainedModel) -> float:
    """Mean relaxed energy (eV) of a training set.

    Without one at `train` that can be used, that of the checkpoint's own, where it learnt such energies; else NaN.
    """
    if train.is_dir() and is_data(train):
        # Evaluation does not need it, so what cannot be opened is as good as not there.
        with contextlib.suppress(ValueError, OSError):
            statistics = open_data(train).metadata["statistics"].get("energy_relaxed")
            if statistics is not None:
                return statistics["mean"]
    task = trained.run.get("config", {}).get("task", {})
    # A normalizer that was given, or came with the weights of another run, need not be of relaxed energies.
    own = task.get("name") == "is2re" and task.get("normalizer") == "auto" and task.get("init_from") is None
    return trained.normalizer.energy_mean if own else math.nan


@dataclass(frozen=True)
class Evaluated:
    """What came out for one split, the same on every rank."""

    metrics: dict[str, float]  #: empty where nothing is labelled
    predictions: Arrays  #: in the leaderboard's layout
    structures: list[Sample]  #: as predicted; empty for direct predictions


def evaluate_split(
    split: Split,
    potential: Potential,
    options: RelaxOptions,
    mesh: Mesh,
    *,
    batch_size: int,
    out: Path | None = None,
    settings: dict[str, Any] | None = None,
    quiet: bool = True,
) -> Evaluated:
    """Predict and compare, each replica a part of the structures. Collective.

    Args:
        out: directory of the split's relaxations: gone on with, or read if it is finished.
        settings: what decides the results, for `out`.

    Raises:
        ValueError: for is2rs with a model without forces; and as `RelaxationFolder`.
    """
    if not potential.has_forces and split.task == "is2rs":
        raise ValueError(NO_FORCES)
    share = share_of(split.samples, mesh)
    if not potential.has_forces:
        return _direct(split, potential, mesh, share, batch_size)
    if out is None:
        patience = Patience()
        results = list(
            relax_share(split.samples, share, potential, options, batch_size=batch_size, quiet=quiet, title=split.name)
        )
        patience.wait()
        everywhere = [relaxed for part in gather_over_ranks(results if mesh.stage == 0 else []) for relaxed in part]
    else:
        folder = RelaxationFolder(
            out, names_of(split.samples.store.path, split.samples.sid, split.samples.fid), settings or {}
        )
        everywhere = relax_into(
            folder, split.samples, potential, options, mesh, batch_size=batch_size, quiet=quiet, title=split.name
        )
        results = [everywhere[index] for index in share]
    everywhere.sort(key=lambda relaxed: relaxed.index)
    sids = [relaxed.sample.sid for relaxed in everywhere]
    if split.task == "is2re":
        energies = [float("nan") if relaxed.energy is None else relaxed.energy for relaxed in everywhere]
        predictions = is2re_predictions(sids, energies)
        metrics = _is2re(split, [(relaxed.sample, relaxed.energy) for relaxed in results], mesh)
    else:
        predictions = is2rs_predictions(sids, [relaxed.positions for relaxed in everywhere])
        metrics = _is2rs(split, results, mesh)
    structures = [replace(relaxed.sample, positions=relaxed.positions) for relaxed in everywhere]
    return Evaluated(metrics, predictions, structures)


def _direct(split: Split, potential: Potential, mesh: Mesh, share: list[int], batch_size: int) -> Evaluated:
    """Relaxed energies from initial structures."""
    results: list[tuple[int, Sample, float]] = []
    for first in range(0, len(share), batch_size):
        part = share[first : first + batch_size]
        samples = [split.samples[index] for index in part]
        energies, _ = potential.predict(samples)
        results += zip(part, samples, energies.tolist(), strict=True)
    own = [(i, sample.sid, e) for i, sample, e in results] if mesh.stage == 0 else []
    everywhere = sorted(row for rows in gather_over_ranks(own) for row in rows)
    predictions = is2re_predictions([sid for _, sid, _ in everywhere], [energy for *_, energy in everywhere])
    return Evaluated(_is2re(split, [(sample, energy) for _, sample, energy in results], mesh), predictions, [])


def _is2re(split: Split, results: list[tuple[Sample, float | None]], mesh: Mesh) -> dict[str, float]:
    if not split.labelled:
        return {}
    metrics = IS2REMetrics(split.energy_mean)
    for sample, energy in results:
        metrics.update(energy, _label(sample.energy_relaxed, sample))
    metrics.load_tensor(mesh.sum_over_data(metrics.tensor().to(mesh.device)).cpu())
    return metrics.compute()


def _is2rs(split: Split, results: list[Relaxed], mesh: Mesh) -> dict[str, float]:
    if not split.labelled and split.reference is None:
        return {}
    metrics = IS2RSMetrics()
    for relaxed in results:
        sample = relaxed.sample
        free = ~sample.fixed
        metrics.update(
            relaxed.positions,
            _label(sample.positions_relaxed, sample) if split.labelled else None,
            sample.positions,
            sample.cell,
            sample.pbc,
            free,
            steps=relaxed.steps,
            converged=relaxed.status == "converged",
            failed=relaxed.status == "failed",
        )
        if split.reference is not None:
            metrics.update_forces(split.reference(replace(sample, positions=relaxed.positions)), free)
            # The forces that a store has at the initial structure are its reference's.
            if sample.forces is not None:
                metrics.update_forces(sample.forces, free, initial=True)
    metrics.load_tensor(mesh.sum_over_data(metrics.tensor().to(mesh.device)).cpu())
    return metrics.compute()


def _label(value: Any, sample: Sample) -> Any:
    if value is None:
        raise ValueError(f"{sample.name} has no label, while others of its store have")
    return value if np.isscalar(value) else np.asarray(value)
