"""Graph parallelism over NCCL gives what one CPU process gives. Needs two CUDA devices; `pytest tests/gpu` runs it."""

from __future__ import annotations

from typing import Any

import pytest
import structures
import torch
from spawn import spawn
from torch import Tensor

from egnscale.data.batch import build_graph, cell_coordinates
from egnscale.data.neighbors import GraphSpec
from egnscale.models import ExtendedGraph, GemNetT, Prediction, build_model
from egnscale.scaling.partition import partition_by_owner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SAMPLES = [structures.far_apart("O"), structures.slab(size=(4, 4, 4)), structures.water(periodic=False)]


def model() -> GemNetT:
    torch.manual_seed(0)
    return build_model(
        num_blocks=2, emb_size_atom=32, emb_size_edge=48, emb_size_trip=20, emb_size_bil_trip=24, num_radial=24
    ).double()


def gradients(network: GemNetT, graph: ExtendedGraph) -> tuple[Prediction, list[Tensor]]:
    prediction = network(graph)
    forces = graph.partition.total(prediction.forces.square().sum(1, keepdim=True))
    loss = prediction.energy.square().sum() + forces.sum()
    return prediction, list(torch.autograd.grad(loss, list(network.parameters())))


def on_rank(world: Any) -> dict[str, float]:
    import torch.distributed as dist

    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)
    whole = build_graph(SAMPLES, GraphSpec(), torch.float64)
    wanted, wanted_gradients = gradients(model(), whole)
    graph = mesh.place(partition_by_owner(whole, cell_coordinates(SAMPLES), world.size, mesh.graph_rank)[0])
    found, found_gradients = gradients(model().to(world.device), graph)
    for gradient in found_gradients:
        dist.all_reduce(gradient)
    waited = sum(tally.seconds for tally in mesh.traffic().values())
    pairs = zip(found_gradients, wanted_gradients, strict=True)
    return {
        "energy": float((found.energy.cpu() - wanted.energy).norm() / wanted.energy.norm()),
        "forces": float((mesh.collect(found.forces, graph).cpu() - wanted.forces).norm() / wanted.forces.norm()),
        "gradients": max(float((a.cpu() / world.size - b).norm() / b.norm()) for a, b in pairs),
        "waited": waited,
    }


def test_two_devices_agree_with_one_process() -> None:
    for found in spawn(2, on_rank):
        assert found.pop("waited") > 0
        assert {name: error for name, error in found.items() if not error < 1e-10} == {}
