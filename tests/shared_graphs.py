"""Graphs that ranks share: batches worth sharing, a rank's part, and gradients of something that all evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structures
import torch
from torch import Tensor, nn

from egnscale.data.batch import cell_coordinates
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, Prediction
from egnscale.models.dual import dual_energies
from egnscale.scaling.partition import partition_by_owner


def cases() -> dict[str, list[Sample]]:
    return {
        "small slab": [structures.slab()],
        "mixed batch": [
            structures.far_apart("O"),
            structures.slab("fcc211"),
            structures.water(periodic=False),
            structures.crystal(),
            structures.slab(size=(2, 2, 4), seed=3),
        ],
        "fewer atoms than ranks": [structures.far_apart("H"), structures.crystal()],
        "isolated atoms": [structures.far_apart(*"OHCNOHCNOHCN")],
        "nothing": [],
    }


def part_of(mesh: Any, whole: ExtendedGraph, samples: list[Sample]) -> ExtendedGraph:
    """What a rank of the mesh holds of a whole graph."""
    if mesh.layout.graph == 1:
        return whole
    return mesh.place(partition_by_owner(whole, cell_coordinates(samples), mesh.layout.graph, mesh.graph_rank)[0])


def loss(prediction: Prediction, graph: ExtendedGraph) -> Tensor:
    """Something that weighs every output, the same on all ranks that share the graph."""
    weights = torch.arange(1.0, graph.num_systems + 1, dtype=torch.float64)
    found = prediction.energy.square() + prediction.energy
    if prediction.forces is not None:
        found = found + graph.partition.total((prediction.forces - 0.1).square().sum(1, keepdim=True))[:, 0]
    return (weights * found).sum()


Gradients = Callable[[Any, ExtendedGraph], tuple[Prediction, dict[str, Tensor]]]


def gradients(network: nn.Module, graph: ExtendedGraph) -> tuple[Prediction, dict[str, Tensor]]:
    """The prediction, and the gradient of `loss` for every parameter."""
    prediction = network(graph)
    found = torch.autograd.grad(loss(prediction, graph), list(network.parameters()))
    names = (name for name, _ in network.named_parameters())
    return prediction, dict(zip(names, found, strict=True))


def gradients_by_dual_numbers(network: Any, graph: ExtendedGraph) -> tuple[Prediction, dict[str, Tensor]]:
    """The same, of a model with conservative forces, by reverse over forward."""
    with torch.no_grad():
        prediction = network(graph)
    energy, forces = prediction.energy.requires_grad_(), prediction.forces.requires_grad_()
    of_energy, of_forces = torch.autograd.grad(loss(Prediction(energy, forces), graph), (energy, forces))
    sharing = graph.partition.reduce(of_forces.new_ones(1))  # as many losses depend on each force
    energies, slopes = dual_energies(network, graph, -of_forces / sharing)
    found = torch.autograd.grad((of_energy * energies).sum() + slopes.sum(), list(network.parameters()))
    names = (name for name, _ in network.named_parameters())
    return Prediction(energy.detach(), forces.detach()), dict(zip(names, found, strict=True))


def largest_error(
    mesh: Any,
    network: nn.Module,
    whole: ExtendedGraph,
    samples: list[Sample],
    floor: float,
    by: Gradients = gradients,
) -> float:
    """Of energies, forces and all parameter gradients of a shared graph, against one process.

    Args:
        by: how the gradients of the shared graph are found.
        floor: errors are relative, but to no less than this: what cancels to nothing (forces in a crystal) is as exact
            as the rounding of what it is a sum of.
    """
    import torch.distributed as dist

    wanted, wanted_gradients = gradients(network, whole)
    graph = part_of(mesh, whole, samples)
    found, found_gradients = by(network, graph)

    def error(ours: Tensor, theirs: Tensor) -> float:
        return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp(min=floor))

    errors = [error(found.energy, wanted.energy), error(mesh.collect(found.forces.detach(), graph), wanted.forces)]
    for name, gradient in found_gradients.items():
        dist.all_reduce(gradient)  # what DeepSpeed does: the mean over all ranks
        errors.append(error(gradient / mesh.layout.size, wanted_gradients[name]))
    return max(errors)
