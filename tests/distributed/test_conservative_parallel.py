"""Conservative forces of a graph over several ranks: energies, forces and gradients of one process, in fp64.

Each world of P processes is started once and runs all checks; the tests look at what it found.
"""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import structures
import torch
from spawn import spawn
from torch import Tensor

from egnscale.data.batch import cell_coordinates
from egnscale.data.sample import Sample
from egnscale.models import AtomModel, ExtendedGraph, Prediction
from egnscale.scaling import partition
from egnscale.scaling.partition import partition_by_owner

WORLDS = (1, 2, 3)
TOLERANCE = 1e-10
MODELS = {
    "gemnet_t": {"name": "gemnet_t"},
    "gemnet_t, harmonic": {"name": "gemnet_t", "triplet_form": "harmonic"},
    "gemnet_t, mean energy": {"name": "gemnet_t", "extensive": False},
    "dimenetplusplus": {"name": "dimenetplusplus"},
    "dimenetplusplus, detached angles": {"name": "dimenetplusplus", "angles": "detached"},
}


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


def model(name: str) -> AtomModel:
    return small_models.conservative(cutoff=4.5, max_neighbors=20, **MODELS[name])


def loss(prediction: Prediction, graph: ExtendedGraph) -> Tensor:
    """Something that weighs every output, the same on all ranks that share the graph."""
    weights = torch.arange(1.0, graph.num_systems + 1, dtype=torch.float64)
    assert prediction.forces is not None
    forces = graph.partition.total((prediction.forces - 0.1).square().sum(1, keepdim=True))[:, 0]
    return (weights * (prediction.energy.square() + prediction.energy + forces)).sum()


def gradients(network: AtomModel, graph: ExtendedGraph) -> tuple[Prediction, dict[str, Tensor]]:
    prediction = network(graph)
    found = torch.autograd.grad(loss(prediction, graph), list(network.parameters()))
    names = (name for name, _ in network.named_parameters())
    return prediction, dict(zip(names, found, strict=True))


def largest_error(mesh: Any, name: str, samples: list[Sample]) -> float:
    """Of energies, forces and all parameter gradients, against one process, each relative to the largest."""
    import torch.distributed as dist

    network = model(name)
    whole = small_models.graph_for(network, *samples)
    wanted, wanted_gradients = gradients(network, whole)
    graph = whole
    if mesh.layout.graph > 1:
        graph, _ = partition_by_owner(whole, cell_coordinates(samples), mesh.layout.graph, mesh.graph_rank)
        graph = mesh.place(graph)
    found, found_gradients = gradients(network, graph)
    assert found.forces is not None

    def error(ours: Tensor, theirs: Tensor) -> float:
        # What cancels to nothing (forces in a crystal) is compared with the rounding of what it is a sum of.
        return float((ours - theirs).detach().norm() / theirs.detach().norm().clamp(min=1e-2))

    errors = [error(found.energy, wanted.energy), error(mesh.collect(found.forces.detach(), graph), wanted.forces)]
    for parameter, gradient in found_gradients.items():
        dist.all_reduce(gradient)  # what DeepSpeed does: the mean over all ranks
        errors.append(error(gradient / mesh.layout.size, wanted_gradients[parameter]))
    return max(errors)


def forget_others(self: Any, x: Tensor, route: Any, index: Tensor, verb: str) -> Any:
    """Rows moved between ranks without the gradient of those that came from others."""
    way = route.post(x, self.group, verb)
    return partition._Pending(lambda: torch.cat([x, way.wait().detach()]).index_select(0, index))


def on_rank(world: Any) -> dict[str, Any]:
    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)
    found: dict[str, Any] = {
        f"{name}, {case}": largest_error(mesh, name, samples) for name in MODELS for case, samples in cases().items()
    }
    if world.size > 1:
        kept = partition.OwnerPartition._with_others
        partition.OwnerPartition._with_others = forget_others  # type: ignore[method-assign]
        found["control"] = largest_error(mesh, "dimenetplusplus", cases()["small slab"])
        partition.OwnerPartition._with_others = kept  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("size", WORLDS)
def test_energies_forces_and_gradients_are_those_of_one_process(size: int) -> None:
    for found in spawn(size, on_rank):
        control = found.pop("control", 1.0)
        assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}
        assert control > 1e-4, "a wrong backward goes unnoticed"
