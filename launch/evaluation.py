"""Evaluate a model on a store: OC20's S2EF metrics, summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch
from egnscale.launch.metrics import S2EFMetrics
from egnscale.launch.tasks import Normalizer
from egnscale.models import ExtendedGraph, Prediction


@torch.no_grad()
def evaluate_s2ef(
    predict: Callable[[ExtendedGraph], Prediction],
    batches: Iterable[tuple[ExtendedGraph, AtomBatch]],
    normalizer: Normalizer,
    device: torch.device,
    *,
    place: Callable[[ExtendedGraph], ExtendedGraph] | None = None,
    free_atoms_only: bool = True,
    max_batches: int | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    record: Callable[[Prediction, ExtendedGraph, AtomBatch], None] = lambda prediction, graph, batch: None,
    observe: Callable[[AtomBatch], None] = lambda batch: None,
) -> dict[str, float]:
    """Metrics of normalised predictions over labelled batches.

    Args:
        place: puts a graph on the device (`Mesh.place`; None: that is all).
        max_batches: stop after so many (None: all).
        reduce: sums accumulators over replicas.
        record: called with each batch's prediction, in eV and eV/A.
        observe: called after each batch, for progress.

    Raises:
        ValueError: if a prediction is not finite, naming the structure.
    """
    metrics = S2EFMetrics(energy_mean=normalizer.energy_mean)
    bad = ""
    for graph, batch in islice(batches, max_batches):
        graph, batch = place(graph) if place else graph.to(device), batch.to(device)
        prediction = normalizer.physical(predict(graph))
        if not bad:
            bad = ", ".join(non_finite(prediction, graph, batch)[:3])
        assert prediction.forces is not None
        assert batch.energy is not None
        assert batch.forces is not None
        free = ~batch.fixed if free_atoms_only else torch.ones_like(batch.fixed)
        metrics.update(prediction.energy, prediction.forces, batch.energy, batch.forces, free, graph.partition.total)
        record(prediction, graph, batch)
        observe(batch)
    sums = metrics.tensor()
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
