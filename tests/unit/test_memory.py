"""No triplet-sized tensor is ever made, and an edge costs the same however many neighbours there are.

Counted, not timed: every operation of forward and backward is seen by a dispatch mode. On the meta device that takes
no memory, so gemnet-dt is counted at its full widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import oracle_dimenet
import pytest
import structures
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.launch.loading import graph_spec
from egnscale.models import AtomModel, DimeNetPlusPlus, ExtendedGraph, GemNetT, Prediction, build_model

Predict = Callable[[Any, ExtendedGraph], Prediction]


class Allocations(TorchDispatchMode):
    """The tensors that operations make, in numbers of elements; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.largest, self.total = max(self.largest, elements), self.total + elements
        return result


def step(predict: Predict, model: AtomModel, graph: ExtendedGraph) -> tuple[Allocations, int]:
    """Allocations and floating-point operations of one forward and backward."""
    with Allocations() as allocations, FlopCounterMode(display=False) as flops:
        prediction = predict(model, graph)
        forward = flops.get_total_flops()
        (prediction.energy.sum() + prediction.forces.sum()).backward()
    assert flops.get_total_flops() > 2.5 * forward, "backward was not counted"
    return allocations, flops.get_total_flops()


def slab_graph(cutoff: float, max_neighbors: int | None = None, device: str = "meta") -> ExtendedGraph:
    sample = structures.slab(size=(4, 4, 5))
    return build_graph([sample], GraphSpec(cutoff, max_neighbors)).to(device)


def gemnet_dt(device: str, **hyperparameters: Any) -> GemNetT:
    with torch.device(device):
        return build_model("gemnet-dt", **hyperparameters)


def of_model(model: GemNetT, graph: ExtendedGraph) -> Prediction:
    return model(graph)


def of_oracle(graph: ExtendedGraph, *, padded: bool) -> Predict:
    """The plain form, its triplets listed beforehand."""
    listed = oracle.list_triplets(graph)
    triplets = oracle.Triplets(*(part.to("meta") if isinstance(part, Tensor) else part for part in listed))
    return lambda model, graph: oracle.gemnet(model, graph, padded_triplets=padded, triplets=triplets)


@pytest.mark.parametrize("form", ["auto", "block", "harmonic"])
def test_no_triplet_sized_tensor_is_made(form: str) -> None:
    graph = slab_graph(6.0, max_neighbors=50, device="cpu")
    size = graph.num_triplets * 64
    allocations, _ = step(of_model, gemnet_dt("meta", triplet_form=form), graph.to("meta"))
    assert allocations.largest < size / 2


@pytest.mark.parametrize("padded", [False, True])
def test_the_plain_form_makes_one(padded: bool) -> None:
    graph = slab_graph(6.0, max_neighbors=50, device="cpu")
    allocations, _ = step(of_oracle(graph, padded=padded), gemnet_dt("meta"), graph.to("meta"))
    assert allocations.largest >= graph.num_triplets * 64


@pytest.mark.parametrize("form", ["auto", "block", "harmonic"])
def test_nor_does_the_cpu_make_one(form: str) -> None:
    graph = slab_graph(6.0, max_neighbors=50, device="cpu")
    narrow = {"emb_size_atom": 32, "emb_size_edge": 64, "num_blocks": 1, "num_radial": 16, "emb_size_cbf": 4}
    allocations, _ = step(of_model, gemnet_dt("cpu", triplet_form=form, **narrow), graph)
    assert allocations.largest < graph.num_triplets * 64 / 2


def per_edge(predict: Callable[[ExtendedGraph], Predict]) -> dict[str, list[float]]:
    """Cost of a gemnet-dt step for each edge, at cutoffs from 4 to 9 A without a cap."""
    costs: dict[str, list[float]] = {"edges": [], "largest": [], "total": [], "flops": []}
    for cutoff in (4.0, 6.0, 9.0):
        graph = slab_graph(cutoff, device="cpu")
        allocations, flops = step(predict(graph), gemnet_dt("meta", cutoff=cutoff), graph.to("meta"))
        costs["edges"].append(graph.num_edges)
        for name, cost in (("largest", allocations.largest), ("total", allocations.total), ("flops", flops)):
            costs[name].append(cost / graph.num_edges)
    return costs


def test_cost_of_an_edge_is_flat_as_neighbours_grow() -> None:
    costs = per_edge(lambda graph: of_model)
    assert costs["edges"][-1] > 6 * costs["edges"][0]
    for name in ("largest", "total", "flops"):
        assert max(costs[name]) < 1.15 * min(costs[name]), f"{name} for each edge: {costs[name]}"


def test_cost_of_an_edge_of_the_plain_form_grows() -> None:
    costs = per_edge(lambda graph: of_oracle(graph, padded=True))
    assert costs["largest"][-1] > 2 * costs["largest"][0]


# DimeNet++, conservative: forward, forces, and the gradient of both. Its triplets are the paths k -> j -> i.


def dimenet_large(device: str, **hyperparameters: Any) -> DimeNetPlusPlus:
    with torch.device(device):
        return build_model("dimenet++-large", **hyperparameters)


def path_graph(cutoff: float, max_neighbors: int | None = None) -> tuple[ExtendedGraph, oracle_dimenet.Paths]:
    spec = graph_spec(dimenet_large("meta", cutoff=cutoff, max_neighbors=max_neighbors).config)
    graph = build_graph([structures.slab(size=(4, 4, 5))], spec)
    return graph, oracle_dimenet.list_paths(graph)


def of_plain_paths(paths: oracle_dimenet.Paths) -> Predict:
    on_meta = oracle_dimenet.Paths(*(rows.to("meta") for rows in paths))
    return lambda model, graph: oracle_dimenet.dimenet(model, graph, paths=on_meta)


def test_no_path_sized_tensor_is_made_for_conservative_forces() -> None:
    graph, paths = path_graph(6.0, max_neighbors=50)
    size = len(paths.kj) * 64
    allocations, _ = step(of_model, dimenet_large("meta"), graph.to("meta"))
    assert allocations.largest < size / 4
    plain, _ = step(of_plain_paths(paths), dimenet_large("meta"), graph.to("meta"))
    assert plain.largest >= size


def test_cost_of_an_edge_of_dimenet_is_flat_as_neighbours_grow() -> None:
    ours: dict[str, list[float]] = {"largest": [], "total": [], "flops": []}
    plain: list[float] = []
    for cutoff in (4.0, 6.0, 9.0):
        graph, paths = path_graph(cutoff)
        model = dimenet_large("meta", cutoff=cutoff)
        allocations, flops = step(of_model, model, graph.to("meta"))
        for name, cost in (("largest", allocations.largest), ("total", allocations.total), ("flops", flops)):
            ours[name].append(cost / graph.num_edges)
        plain.append(step(of_plain_paths(paths), model, graph.to("meta"))[0].total / graph.num_edges)
    for name, costs in ours.items():
        # Few neighbours leave more padding in the batches of atoms.
        assert max(costs) < 1.25 * min(costs), f"{name} for each edge: {costs}"
    assert plain[-1] > 2 * plain[0]
