"""S2EF predictions of whole splits, collected for a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np
import torch

from egnscale.data.batch import AtomBatch
from egnscale.data.dataset import Dataset
from egnscale.launch.evaluation import Predict
from egnscale.launch.submission import Arrays, s2ef_predictions
from egnscale.launch.tasks import Normalizer
from egnscale.models import ExtendedGraph, Prediction
from egnscale.scaling.engine import gather_over_ranks
from egnscale.scaling.layout import Mesh

Key = tuple[int, int]


class Recorder:
    """Keeps what was predicted: energies, and forces of free atoms.

        recorder = Recorder(mesh)
        evaluate_s2ef(..., record=recorder)
        arrays = recorder.arrays(store)

    Calling it is collective over ranks that share a graph or have other layers, `arrays` over all.
    """

    def __init__(self, mesh: Mesh, *, full_precision: bool = False) -> None:
        self.mesh, self.full_precision = mesh, full_precision
        self._predictions: dict[Key, tuple[float, np.ndarray]] = {}

    def __call__(self, prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch) -> None:
        """Add a batch, in eV and eV/A.

        Raises:
            ValueError: if the model predicts no forces.
        """
        if prediction.forces is None:
            raise ValueError("the model predicts no forces, and s2ef predictions hold them")
        # Collected together, so that ranks exchange once: whether an atom is fixed is known to the rank that owns it.
        rows = torch.cat([prediction.forces.double(), batch.fixed[:, None].double()], dim=1)
        rows = self.mesh.collect(rows, graph).cpu()
        if self.mesh.graph_rank > 0 or self.mesh.stage > 0:
            return
        keys = zip(batch.sid.tolist(), batch.fid.tolist(), strict=True)
        for key, energy, own in zip(
            keys, prediction.energy.tolist(), rows.split(batch.num_atoms.tolist()), strict=True
        ):
            forces = own[own[:, 3] == 0, :3].numpy()
            self._predictions[key] = (energy, forces.astype("float32" if self.full_precision else "float16"))

    def arrays(self, store: Dataset, count: int) -> Arrays:
        """Of the first `count` structures of the store, in its order; the same on every rank."""
        together: dict[Key, tuple[float, np.ndarray]] = {}
        for part in gather_over_ranks(self._predictions):
            together |= part
        keys = list(zip(store.sid[:count].tolist(), store.fid[:count].tolist(), strict=True))
        energies, forces = zip(*(together[key] for key in keys), strict=True)
        return s2ef_predictions(keys, energies, forces, full_precision=self.full_precision)


@torch.no_grad()
def predict_s2ef(
    predict: Predict,
    batches: Iterable[tuple[ExtendedGraph, AtomBatch]],
    normalizer: Normalizer,
    mesh: Mesh,
    record: Recorder,
    observe: Callable[[AtomBatch], None],
    at_once: int = 1,
) -> None:
    """Predict structures that have no labels, so many graphs at once."""
    batches = iter(batches)
    while some := list(islice(batches, at_once)):
        graphs = [mesh.place(graph) for graph, _ in some]
        for graph, (_, batch), prediction in zip(graphs, some, predict(graphs), strict=True):
            batch = batch.to(mesh.device)
            record(normalizer.physical(prediction), graph, batch)
            observe(batch)
