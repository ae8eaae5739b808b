"""Conservative forces of a graph over several ranks: energies, forces and gradients of one process, in fp64.

Each world of P processes is started once and runs all checks; the tests look at what it found.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import shared_graphs
import small_models
import torch
from spawn import spawn
from torch import Tensor

from egnscale.data.sample import Sample
from egnscale.models import AtomModel
from egnscale.models.dual import dual_energies
from egnscale.scaling import partition
from egnscale.scaling.collectives import Site, Tally
from egnscale.scaling.recompute import set_recompute

WORLDS = (1, 2, 3)
TOLERANCE = 1e-10
MODELS = {
    "gemnet_t": {"name": "gemnet_t"},
    "gemnet_t, harmonic": {"name": "gemnet_t", "triplet_form": "harmonic"},
    "gemnet_t, mean energy": {"name": "gemnet_t", "extensive": False},
    "dimenetplusplus": {"name": "dimenetplusplus"},
    "dimenetplusplus, detached angles": {"name": "dimenetplusplus", "angles": "detached"},
}


def model(name: str) -> AtomModel:
    return small_models.conservative(cutoff=4.5, max_neighbors=20, **MODELS[name])


def largest_error(
    mesh: Any, name: str, samples: list[Sample], by: shared_graphs.Gradients = shared_graphs.gradients
) -> float:
    network = model(name)
    whole = small_models.graph_for(network, *samples)
    return shared_graphs.largest_error(mesh, network, whole, samples, floor=1e-2, by=by)


def exchanged(mesh: Any, name: str, samples: list[Sample], recompute: Any) -> tuple[dict[Site, Tally], ...]:
    """By a plain pass, forward and backward, and by one on dual numbers."""
    network = model(name)
    graph = shared_graphs.part_of(mesh, small_models.graph_for(network, *samples), samples)
    mesh.name_layers(network.layers)
    set_recompute(network, recompute, mesh.graph_group)
    mesh.traffic()
    graph.partition.total(network.atom_energies(graph)).sum().backward()
    plain = mesh.traffic()
    energies, slopes = dual_energies(network, graph, torch.ones_like(graph.positions))
    (energies.sum() + slopes.sum()).backward()
    return plain, mesh.traffic()


def forget_others(self: Any, x: Tensor, route: Any, index: Tensor, verb: str) -> Any:
    """Rows moved between ranks without the gradient of those that came from others."""
    way = route.post(x, self.group, verb)
    return partition._Pending(lambda: torch.cat([x, way.wait().detach()]).index_select(0, index))


def on_rank(world: Any) -> dict[str, Any]:
    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)
    found: dict[str, Any] = {
        f"{name}, {case}": largest_error(mesh, name, samples)
        for name in MODELS
        for case, samples in shared_graphs.cases().items()
    }
    found |= {
        f"{name}, {case}, on dual numbers": largest_error(mesh, name, samples, shared_graphs.gradients_by_dual_numbers)
        for name in MODELS
        for case, samples in shared_graphs.cases().items()
    }
    if world.size > 1:
        found["exchanged"] = {
            (name, case, how): exchanged(mesh, name, shared_graphs.cases()[case], how)
            for name in MODELS
            for case, how in product(("small slab", "fewer atoms than ranks"), ("none", "block"))
        }
        kept = partition.OwnerPartition._with_others
        partition.OwnerPartition._with_others = forget_others  # type: ignore[method-assign]
        found["control"] = largest_error(mesh, "dimenetplusplus", shared_graphs.cases()["small slab"])
        partition.OwnerPartition._with_others = kept  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("size", WORLDS)
def test_energies_forces_and_gradients_are_those_of_one_process(size: int) -> None:
    for found in spawn(size, on_rank):
        control = found.pop("control", 1.0)
        for case, (plain, dual) in found.pop("exchanged", {}).items():
            # A tangent travels with its value; element numbers have none.
            assert {site: tally.calls for site, tally in dual.items()} == {
                site: tally.calls for site, tally in plain.items()
            }, case
            for site, tally in dual.items():  # what a ring sends is rounded down
                assert plain[site].bytes <= tally.bytes <= 2 * plain[site].bytes + 1, (case, site)
            if case[1] == "small slab":
                sent, sent_plainly = (sum(tally.bytes for tally in found.values()) for found in (dual, plain))
                assert sent > 1.5 * sent_plainly, case
        assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}
        assert control > 1e-4, "a wrong backward goes unnoticed"
