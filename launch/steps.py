"""How the gradient of an optimizer step comes about, and predictions in between: on ranks that have all layers, or in a
pipeline.

A step's loss is a mean over all of its structures, however they are dealt to replicas and micro-batches: its batches
are read, and counted, before the first is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch
from egnscale.launch.norms import LayerNorms
from egnscale.launch.pipelining import MicroBatch, StagedModel
from egnscale.launch.tasks import IS2RE, S2EF
from egnscale.models import ExtendedGraph, Prediction
from egnscale.models.scale_factors import fit_scale_factors
from egnscale.scaling.engine import Engine, sum_over_ranks
from egnscale.scaling.layout import Mesh
from egnscale.scaling.pipeline import Pipeline, StageTime

#: A batch as the loader gives it.
Read = tuple[ExtendedGraph, AtomBatch]


class Computed(NamedTuple):
    """What became of a micro-batch."""

    loss: Tensor  #: of this replica, detached
    prediction: Prediction | None  #: normalised; None where another stage has it


class Counts(NamedTuple):
    """What a step is made of, over all ranks."""

    divisors: Tensor  #: (2,) what a micro-batch's sums over structures and atoms are divided by
    structures: float
    atoms: float
    edges: float


def count(read: Sequence[Read], objective: S2EF | IS2RE, mesh: Mesh) -> Counts:
    """Count a step's batches. Collective."""
    local = torch.zeros(4, dtype=torch.float64)
    if mesh.stage == 0:
        for graph, atoms in read:
            # Ranks that share a graph each have their own atoms and edges, and all of its structures.
            structures = graph.num_systems if mesh.graph_rank == 0 else 0
            trained = int(objective.trained_atoms(atoms).sum())
            local += torch.tensor([structures, trained, graph.num_atoms, graph.num_edges])
    total = sum_over_ranks(local.to(mesh.device))
    # The mean over replicas and micro-batches of sums divided by these is the mean over all.
    divisors = (total[:2] / (mesh.layout.data * len(read))).clamp(min=1e-12)
    structures, _, atoms, edges = total.tolist()
    return Counts(divisors, structures, atoms, edges)


class Computation(Protocol):
    """What the trainer asks for. All of it is collective."""

    def backward(self, read: Sequence[Read], counts: Counts, norms: LayerNorms | None) -> list[Computed]:
        """Forward and backward of a step's batches; the step itself is yet to be taken."""
        ...

    def again(self, read: Read) -> tuple[Callable[[], tuple[Tensor, Prediction | None]], Callable[[Tensor], None]]:
        """How a batch goes forward, and its loss backward, once more: to find what is wrong."""
        ...

    def predict(self, graphs: Sequence[ExtendedGraph]) -> list[Prediction]: ...

    def fit_scale_factors(self, graphs: Sequence[ExtendedGraph]) -> dict[str, float]: ...

    def stage_time(self) -> StageTime | None:
        """What this rank's stage did since the last time; None where there is one stage. Local."""
        ...

    @property
    def at_once(self) -> int:
        """How many graphs `predict` likes to have."""
        ...


class WholeModel:
    """Every rank has all layers."""

    at_once = 1

    def __init__(self, objective: S2EF | IS2RE, engine: Engine, mesh: Mesh) -> None:
        self.objective, self.engine, self.mesh = objective, engine, mesh

    def backward(self, read: Sequence[Read], counts: Counts, norms: LayerNorms | None) -> list[Computed]:
        done = []
        for number, batch in enumerate(read):
            graph, atoms = self._place(batch)  # one by one: memory is foretold for one
            with norms.watching() if norms else nullcontext():
                loss, prediction = self.engine(graph, atoms, counts.divisors)
            if norms:
                norms.see_prediction(prediction)
            self.engine.backward(loss)
            if number < len(read) - 1:
                self.engine.step()  # counts a micro-batch
            done.append(Computed(loss.detach(), prediction))
        return done

    def again(self, read: Read) -> tuple[Callable[[], tuple[Tensor, Prediction | None]], Callable[[Tensor], None]]:
        def forward() -> tuple[Tensor, Prediction]:
            divisors = count([read], self.objective, self.mesh).divisors
            return self.engine(*self._place(read), divisors)

        return forward, self.engine.backward

    def predict(self, graphs: Sequence[ExtendedGraph]) -> list[Prediction]:
        with self.engine.calling_module():
            return [self.objective.model(graph) for graph in graphs]

    def fit_scale_factors(self, graphs: Sequence[ExtendedGraph]) -> dict[str, float]:
        with self.engine.calling_module():
            return fit_scale_factors(self.objective.model, graphs, reduce=self.mesh.sum_over_data)

    def stage_time(self) -> StageTime | None:
        return None

    def _place(self, read: Read) -> Read:
        graph, atoms = read
        return self.mesh.place(graph), atoms.to(self.mesh.device)


class StagedComputation:
    """Every rank has the layers of its stage."""

    def __init__(self, objective: S2EF | IS2RE, engine: Pipeline, mesh: Mesh, staged: StagedModel) -> None:
        self.objective, self.engine, self.mesh, self.staged = objective, engine, mesh, staged

    @property
    def at_once(self) -> int:
        return self.staged.at_once

    def backward(self, read: Sequence[Read], counts: Counts, norms: LayerNorms | None) -> list[Computed]:
        batches = [self._place(one, counts) for one in read]
        with norms.watching() if norms else nullcontext():
            outcomes = self.staged.backward(self.objective, batches)
        if norms:
            for outcome in outcomes:
                if outcome.prediction is not None:
                    norms.see_prediction(outcome.prediction)
        return [Computed(*outcome) for outcome in outcomes]

    def again(self, read: Read) -> tuple[Callable[[], tuple[Tensor, Prediction | None]], Callable[[Tensor], None]]:
        """A pipeline goes back before anybody sees the loss."""

        def forward() -> tuple[Tensor, Prediction | None]:
            batch = self._place(read, count([read], self.objective, self.mesh))
            return self.staged.backward(self.objective, [batch])[0]

        return forward, lambda loss: None

    def predict(self, graphs: Sequence[ExtendedGraph]) -> list[Prediction]:
        return self.staged.predict(graphs)

    def fit_scale_factors(self, graphs: Sequence[ExtendedGraph]) -> dict[str, float]:
        return self.staged.fit_scale_factors(graphs, self.mesh.sum_over_data)

    def stage_time(self) -> StageTime | None:
        return self.engine.time()

    def _place(self, read: Read, counts: Counts) -> MicroBatch:
        graph, atoms = read
        return MicroBatch(self.mesh.place(graph), atoms.to(self.mesh.device), counts.divisors)
