"""Training and prediction with a model whose layers are spread over the stages of a pipeline.

Every rank of a pipeline reads the same batches. Where forces are derivatives, a step goes through the pipeline twice:
forward and back to the positions for the forces, which all stages then know, and with them the loss; and forward on
dual numbers and back to the parameters (`egnscale.models.dual`, docs/conservative-pipeline.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch
from egnscale.launch.tasks import IS2RE, S2EF, detached
from egnscale.models import ExtendedGraph, Prediction
from egnscale.models.layered import LayeredModel
from egnscale.models.layers import ScaleFactor
from egnscale.models.scale_factors import fit_layers
from egnscale.models.stage import Leaves, Stage, at_positions
from egnscale.scaling.layout import Mesh
from egnscale.scaling.pipeline import Pipeline


class MicroBatch(NamedTuple):
    """What a stage knows of a micro-batch, on its device."""

    graph: ExtendedGraph
    atoms: AtomBatch
    counts: Tensor  #: as `S2EF.forward` takes them


class Outcome(NamedTuple):
    """What became of it."""

    loss: Tensor  #: on every stage
    prediction: Prediction | None  #: on the last stage; on all of them where forces are derivatives


class StagedModel:
    """The layers of this rank, and the pipeline that they are part of.

    Args:
        model: without parameters, but those of this stage.
        bounds: stage s has layers bounds[s]..bounds[s + 1] - 1.
        mesh: this rank's place.
        pipeline: DeepSpeed's.
    """

    def __init__(self, model: LayeredModel, bounds: Sequence[int], mesh: Mesh, pipeline: Pipeline) -> None:
        self.model, self.mesh, self.pipeline = model, mesh, pipeline
        self.stage = Stage(model, *bounds[mesh.stage : mesh.stage + 2])
        config: Any = getattr(model, "config", None)
        forces = "direct" if config is None else config.forces
        self.conservative, self.direct = forces == "conservative", forces == "direct"

    @property
    def at_once(self) -> int:
        """How many graphs keep stages busy three quarters of the time."""
        return 3 * self.pipeline.stages

    # Training

    def backward(self, objective: S2EF | IS2RE, batches: Sequence[MicroBatch]) -> list[Outcome]:
        """The losses of an optimizer step's micro-batches, and the gradient of their mean. Collective."""
        if self.conservative:
            assert isinstance(objective, S2EF)
            return self._reverse_over_forward(objective, batches)
        losses = [batch.counts.new_zeros(()) for batch in batches]
        predictions: dict[int, Prediction] = {}

        def compute(number: int, arrived: Leaves | None) -> Any:
            graph, atoms, counts = batches[number]
            state = self.stage.state(graph, arrived)
            if not self.stage.last:
                return self.stage.leaves(state)
            prediction = self.stage.prediction(state, graph)
            loss = objective.loss(prediction, graph, atoms, counts)
            losses[number], predictions[number] = loss.detach().double(), detached(prediction)
            return loss

        self.pipeline.forward_backward(compute, [mark(batch.graph, batch.atoms.names) for batch in batches])
        shared = self.mesh.sum_over_stages(torch.stack(losses))
        return [Outcome(loss, predictions.get(number)) for number, loss in enumerate(shared)]

    def _reverse_over_forward(self, objective: S2EF, batches: Sequence[MicroBatch]) -> list[Outcome]:
        marks = [mark(batch.graph, batch.atoms.names) for batch in batches]
        predictions = self._conservative([batch.graph for batch in batches], marks)
        slopes = [objective.slopes(found, *batch) for found, batch in zip(predictions, batches, strict=True)]

        def compute(number: int, arrived: Leaves | None) -> Any:
            graph = batches[number].graph
            _, of_energy, displacement = slopes[number]
            state = self.stage.dual_state(graph, displacement, arrived)
            if not self.stage.last:
                return self.stage.dual_leaves(state)
            energies, derivatives = self.stage.dual_energies(state, graph)
            return (of_energy * energies).sum() + derivatives.sum()

        self.pipeline.forward_backward(compute, marks)
        return [Outcome(loss, found) for (loss, *_), found in zip(slopes, predictions, strict=True)]

    # Prediction

    def predict(self, graphs: Sequence[ExtendedGraph]) -> list[Prediction]:
        """Of all graphs, on every stage; the more there are, the less stages wait for each other. Collective."""
        marks = marks_of_positions(graphs)
        if self.conservative:
            return self._conservative(graphs, marks)
        found: dict[int, Prediction] = {}

        def compute(number: int, arrived: Leaves | None) -> Any:
            state = self.stage.state(graphs[number], arrived)
            if self.stage.last:
                found[number] = self.stage.prediction(state, graphs[number])
                return None
            return self.stage.leaves(state)

        self.pipeline.forward(compute, marks)
        return self._shared(graphs, [found.get(number) for number in range(len(graphs))], forces=self.direct)

    def _conservative(self, graphs: Sequence[ExtendedGraph], marks: Sequence[int]) -> list[Prediction]:
        """Energies, and forces as minus their derivative, of which each stage has its share: all read positions."""
        at, positions = zip(*(at_positions(graph) for graph in graphs), strict=True) if graphs else ((), ())
        energies: dict[int, Tensor] = {}

        def compute(number: int, arrived: Leaves | None) -> Any:
            graph = at[number]
            state = self.stage.state(graph, arrived)
            if not self.stage.last:
                return self.stage.leaves(state)
            of_atoms = self.stage.atom_energies(state, graph)
            energies[number] = graph.partition.total(of_atoms).squeeze(-1).detach()
            return of_atoms.sum()

        shares = self.pipeline.differentiate(compute, lambda number: positions[number], marks)
        known = [
            Prediction(energies.get(number, graph.positions.new_zeros(graph.num_systems)), -share)
            for number, (graph, share) in enumerate(zip(graphs, shares, strict=True))
        ]
        return self._shared(graphs, known, forces=True)

    def _shared(
        self, graphs: Sequence[ExtendedGraph], known: Sequence[Prediction | None], *, forces: bool
    ) -> list[Prediction]:
        """Predictions of all graphs, summed over the stages, in one message."""
        if not graphs:
            return []
        rows = [3 * graph.num_atoms if forces else 0 for graph in graphs]
        sizes = [size for graph, row in zip(graphs, rows, strict=True) for size in (graph.num_systems, row)]
        flat = graphs[0].positions.new_zeros(sum(sizes))
        parts = flat.split(sizes)
        for number, one in enumerate(known):
            if one is not None:
                parts[2 * number].copy_(one.energy)
                if one.forces is not None:
                    parts[2 * number + 1].copy_(one.forces.reshape(-1))
        parts = self.mesh.sum_over_stages(flat).split(sizes)
        energies, of_atoms = parts[::2], parts[1::2]
        return [
            Prediction(energy, part.view(-1, 3) if forces else None)
            for energy, part in zip(energies, of_atoms, strict=True)
        ]

    # Scale factors

    def fit_scale_factors(
        self, graphs: Sequence[ExtendedGraph], reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """As `egnscale.models.scale_factors.fit_scale_factors`: stage by stage, each on what the fitted ones give."""
        stage, factors = self.stage, {}
        for turn in range(self.pipeline.stages):
            inputs: dict[int, tuple] = {}

            def compute(number: int, arrived: Leaves | None, inputs: dict[int, tuple] = inputs) -> Any:
                graph = graphs[number]
                inputs[number] = (graph,) if arrived is None else (stage.arrival(arrived, graph), graph)
                state = stage.state(graph, arrived)
                return None if stage.last else stage.leaves(state)

            self.pipeline.forward(compute, marks_of_positions(graphs))
            if turn == self.pipeline.stage:
                layers = [*stage.layers, *([self.model.readout] if stage.last else [])]
                with torch.no_grad():
                    factors = fit_layers(self.model, layers, [inputs[n] for n in range(len(graphs))], reduce)
        return self._share_factors(factors)

    def _share_factors(self, factors: dict[str, float]) -> dict[str, float]:
        """Every rank keeps all of them: they are few, and whoever writes a checkpoint writes them."""
        sites = {name: module for name, module in self.model.named_modules() if isinstance(module, ScaleFactor)}
        values = torch.tensor([factors.get(name, 0.0) for name in sites], dtype=torch.float64, device=self.mesh.device)
        shared = self.mesh.sum_over_stages(values).tolist()
        for site, value in zip(sites.values(), shared, strict=True):
            site.scale_factor.fill_(value)
        return dict(zip(sites, shared, strict=True))


def mark(graph: ExtendedGraph, facts: Any) -> int:
    """A number that different micro-batches hardly share."""
    return zlib.crc32(repr((graph.num_systems, graph.num_atoms, graph.num_edges, facts)).encode())


def marks_of_positions(graphs: Sequence[ExtendedGraph]) -> list[int]:
    """The same for structures that may have no names. The bits of their positions are added up, in any order."""
    if not graphs:
        return []
    sums = torch.stack([graph.positions.contiguous().view(torch.int32).sum() for graph in graphs]).tolist()
    return [mark(graph, total) for graph, total in zip(graphs, sums, strict=True)]
