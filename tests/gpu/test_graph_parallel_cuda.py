"""Graph parallelism over NCCL gives what one CPU process gives. Needs two CUDA devices; `pytest tests/gpu` runs it."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import structures
import torch
from spawn import spawn
from torch import Tensor

from egnscale.data.batch import cell_coordinates
from egnscale.models import AtomModel, ExtendedGraph, Prediction
from egnscale.scaling.partition import partition_by_owner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SAMPLES = [structures.far_apart("O"), structures.slab(size=(4, 4, 4)), structures.water(periodic=False)]


def model(name: str) -> AtomModel:
    if name == "gemnet, direct":
        return small_models.gemnet()
    return small_models.conservative(name)


def gradients(network: AtomModel, graph: ExtendedGraph) -> tuple[Prediction, list[Tensor]]:
    prediction = network(graph)
    forces = graph.partition.total(prediction.forces.square().sum(1, keepdim=True))
    loss = prediction.energy.square().sum() + forces.sum()
    return prediction, list(torch.autograd.grad(loss, list(network.parameters())))


def on_rank(world: Any, name: str) -> dict[str, float]:
    import torch.distributed as dist

    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)
    whole = small_models.graph_for(model(name), *SAMPLES)
    wanted, wanted_gradients = gradients(model(name), whole)
    graph = mesh.place(partition_by_owner(whole, cell_coordinates(SAMPLES), world.size, mesh.graph_rank)[0])
    found, found_gradients = gradients(model(name).to(world.device), graph)
    for gradient in found_gradients:
        dist.all_reduce(gradient)
    waited = sum(tally.seconds for tally in mesh.traffic().values())
    pairs = zip(found_gradients, wanted_gradients, strict=True)
    return {
        "energy": float((found.energy.cpu() - wanted.energy).norm() / wanted.energy.norm()),
        "forces": float(
            (mesh.collect(found.forces.detach(), graph).cpu() - wanted.forces).norm() / wanted.forces.norm()
        ),
        "gradients": max(float((a.cpu() / world.size - b).norm() / b.norm()) for a, b in pairs),
        "waited": waited,
    }


@pytest.mark.parametrize("name", ["gemnet, direct", "gemnet_t", "dimenetplusplus"])
def test_two_devices_agree_with_one_process(name: str) -> None:
    for found in spawn(2, on_rank, name):
        assert found.pop("waited") > 0
        assert {name: error for name, error in found.items() if not error < 1e-10} == {}
