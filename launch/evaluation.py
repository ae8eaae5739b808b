"""Evaluate a model on a store: OC20's metrics of S2EF and of direct IS2RE, summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch
from egnscale.launch.metrics import S2EFMetrics
from egnscale.launch.relaxation_metrics import IS2REMetrics
from egnscale.launch.tasks import Normalizer
from egnscale.models import ExtendedGraph, Prediction

#: Predictions of several graphs, in normalised units.
Predict = Callable[[Sequence[ExtendedGraph]], Sequence[Prediction]]
OfBatch = Callable[[Prediction, ExtendedGraph, AtomBatch], None]


def evaluate_s2ef(
    predict: Predict,
    batches: Iterable[tuple[ExtendedGraph, AtomBatch]],
    normalizer: Normalizer,
    device: torch.device,
    *,
    free_atoms_only: bool = True,
    **how: Any,
) -> dict[str, float]:
    """S2EF metrics of normalised predictions over labelled batches.

    Args:
        how: as for `_evaluate`.

    Raises:
        ValueError: if a prediction is not finite, naming the structure.
    """
    metrics = S2EFMetrics(energy_mean=normalizer.energy_mean)

    def add(prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch) -> None:
        assert prediction.forces is not None
        assert batch.energy is not None
        assert batch.forces is not None
        free = ~batch.fixed if free_atoms_only else torch.ones_like(batch.fixed)
        metrics.update(prediction.energy, prediction.forces, batch.energy, batch.forces, free, graph.partition.total)

    return _evaluate(predict, batches, normalizer, device, metrics, add, **how)


def evaluate_is2re(
    predict: Predict,
    batches: Iterable[tuple[ExtendedGraph, AtomBatch]],
    normalizer: Normalizer,
    device: torch.device,
    *,
    energy_mean: float,
    **how: Any,
) -> dict[str, float]:
    """IS2RE metrics of relaxed energies that are predicted directly. As `evaluate_s2ef`.

    Args:
        energy_mean: mean relaxed energy of the training set, eV: the trivial guess.
    """
    metrics = IS2REMetrics(energy_mean=energy_mean)

    def add(prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch) -> None:
        assert batch.energy_relaxed is not None
        for found, wanted in zip(prediction.energy.tolist(), batch.energy_relaxed.tolist(), strict=True):
            metrics.update(found, wanted)

    return _evaluate(predict, batches, normalizer, device, metrics, add, **how)


@torch.no_grad()
def _evaluate(
    predict: Predict,
    batches: Iterable[tuple[ExtendedGraph, AtomBatch]],
    normalizer: Normalizer,
    device: torch.device,
    metrics: S2EFMetrics | IS2REMetrics,
    add: OfBatch,
    *,
    place: Callable[[ExtendedGraph], ExtendedGraph] | None = None,
    max_batches: int | None = None,
    at_once: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    record: OfBatch = lambda prediction, graph, batch: None,
    observe: Callable[[AtomBatch], None] = lambda batch: None,
) -> dict[str, float]:
    """What metrics come to over all batches; what the two above have in common.

    Args:
        add: gives the metrics a batch: called with (prediction in eV and eV/A, graph, batch).
        place: puts a graph on the device (`Mesh.place`; None: that is all).
        max_batches: stop after so many (None: all).
        at_once: graphs that are given to `predict` together.
        reduce: sums accumulators over replicas.
        record: called as `add` is.
        observe: called after each batch, for progress.
    """
    bad = ""
    batches = islice(batches, max_batches)
    while some := list(islice(batches, at_once)):
        placed = [(place(graph) if place else graph.to(device), batch.to(device)) for graph, batch in some]
        predictions = predict([graph for graph, _ in placed])
        for (graph, batch), normalised in zip(placed, predictions, strict=True):
            prediction = normalizer.physical(normalised)
            if not bad:
                bad = ", ".join(non_finite(prediction, graph, batch)[:3])
            add(prediction, graph, batch)
            record(prediction, graph, batch)
            observe(batch)
    sums = metrics.tensor().to(device)
    # Every replica learns that one failed, so that none waits for it in a later collective.
    sums = reduce(torch.cat([sums, sums.new_tensor([float(bool(bad))])]))
    if sums[-1]:
        raise ValueError(f"the model's prediction is not finite for {bad or 'structures of another rank'}")
    metrics.load_tensor(sums[:-1])
    return metrics.compute()


def non_finite(prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch) -> list[str]:
    """Names of the structures whose prediction is NaN or infinite. Collective over ranks that share a graph."""
    bad = ~torch.isfinite(prediction.energy)
    if prediction.forces is not None:
        rows = ~torch.isfinite(prediction.forces).all(dim=-1, keepdim=True)
        bad |= graph.partition.total(rows.double())[:, 0] > 0
    return [batch.names[index] for index in torch.nonzero(bad).flatten().tolist()]
