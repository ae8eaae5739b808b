"""Conservative forces are minus the gradient of the energy, and their own gradients are exact, for every model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import structures
import torch
from small_models import BATCHES, assert_same, dimenet, gemnet, graph_for
from small_models import conservative as model
from torch import Tensor

from egnscale.data.sample import Sample
from egnscale.models import AtomModel, ExtendedGraph, conservative

STEP = 3e-4  # A; of a stencil of fourth order


def row_of_atoms() -> Sample:
    """Every angle is 0 or 180 degrees."""
    return structures.repeated(structures.crystal(cell=np.diag([2.5, 20.0, 20.0]), pbc=(True, False, False)), 0)


@torch.no_grad()
def finite_differences(network: AtomModel, graph: ExtendedGraph, atoms: list[int]) -> Tensor:
    """(atoms, 3) forces from energies at displaced positions; the edges are those of the undisplaced structure."""

    def energy(atom: int, axis: int, by: float) -> float:
        positions = graph.positions.clone()
        positions[atom, axis] += by
        return float(network.atom_energies(replace(graph, positions=positions)).sum())

    def slope(atom: int, axis: int) -> float:
        near, far = (energy(atom, axis, n * STEP) - energy(atom, axis, -n * STEP) for n in (1, 2))
        return (8 * near - far) / (12 * STEP)

    return -torch.tensor([[slope(atom, axis) for axis in range(3)] for atom in atoms], dtype=torch.float64)


STRUCTURES = {
    "slab": lambda: structures.slab(),
    "small cell, an atom near its own images": lambda: structures.slab(size=(1, 1, 3)),
    "molecule": lambda: structures.water(periodic=False),
    "row, all angles 0 or 180 degrees": lambda: row_of_atoms(),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["gemnet_t", "dimenetplusplus"])
def test_forces_are_the_finite_difference_of_the_energy(name: str, structure: str) -> None:
    network = model(name)
    graph = graph_for(network, STRUCTURES[structure]())
    atoms = list(range(0, graph.num_atoms, max(1, graph.num_atoms // 5)))
    forces = network(graph).forces.detach()
    wanted = finite_differences(network, graph, atoms)
    scale = forces.norm(dim=1).max().clamp(min=1e-3)
    assert float((forces[atoms] - wanted).abs().max()) < 1e-6 * float(scale)


def test_detached_angles_are_not() -> None:
    network = model("dimenetplusplus", angles="detached")
    graph = graph_for(network, structures.slab())
    forces = network(graph).forces.detach()
    error = (forces[:3] - finite_differences(network, graph, [0, 1, 2])).abs().max()
    assert float(error) > 1e-3 * float(forces.abs().max())


@pytest.mark.parametrize("form", ["block", "harmonic"])
@pytest.mark.parametrize("batch", BATCHES)
def test_gemnet_agrees_with_the_oracle(form: str, batch: str) -> None:
    network = model("gemnet_t", triplet_form=form)
    graph = graph_for(network, *BATCHES[batch]())
    assert_same(network(graph), oracle.gemnet(network, graph), network, tolerance=1e-10)


def test_intensive_energies_have_the_gradient_of_the_mean() -> None:
    network = model("gemnet_t", extensive=False)
    graph = graph_for(network, structures.slab(), structures.water(periodic=False))
    assert_same(network(graph), oracle.gemnet(network, graph), network, tolerance=1e-10)


@pytest.mark.parametrize("name", ["gemnet_t", "dimenetplusplus"])
def test_without_gradients_nothing_is_kept_and_values_are_the_same(name: str) -> None:
    network = model(name)
    graph = graph_for(network, structures.slab())
    kept = network(graph)
    with torch.no_grad():
        free = network(graph)
    assert kept.forces.requires_grad
    assert not free.forces.requires_grad
    assert not free.energy.requires_grad
    torch.testing.assert_close(free.forces, kept.forces.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(free.energy, kept.energy.detach(), rtol=1e-12, atol=1e-12)


def test_any_energy_model_has_forces() -> None:
    """A pair potential of one line, with a minimum."""

    def energies(graph: ExtendedGraph) -> Tensor:
        ends = graph.positions[graph.target] - graph.positions[graph.source] - graph.shift
        distance = ends.norm(dim=1, keepdim=True)
        return graph.partition.aggregate((distance - 1.0).square() / 2)

    graph = graph_for(model("gemnet_t"), structures.water(periodic=False))
    energy, forces = conservative(energies, graph)
    # Each pair counts from both ends: (d - 1)^2, which pulls with 2 (d - 1) along the bond.
    away = graph.positions[None] - graph.positions[:, None]
    distance = away.norm(dim=2)
    others = ~torch.eye(graph.num_atoms, dtype=torch.bool)
    assert graph.num_edges == others.sum() == 6
    torch.testing.assert_close(energy.detach(), (distance - 1).square()[others].sum()[None] / 2)
    pulls = 2 * (distance - 1)[..., None] * torch.nn.functional.normalize(away, dim=2)
    torch.testing.assert_close(forces.detach(), pulls.sum(1), rtol=1e-10, atol=1e-12)
    assert (distance > 1).sum() == 2
    assert forces.detach().norm(dim=1).min() > 0.01, "stretched and compressed bonds"


@pytest.mark.parametrize("name", ["gemnet_t", "dimenetplusplus"])
def test_models_without_forces_predict_the_same_energies(name: str) -> None:
    network = model(name)
    silent = gemnet(forces="none") if name == "gemnet_t" else dimenet(forces="none")
    silent.load_state_dict(network.state_dict())
    graph = graph_for(network, structures.slab())
    energy, forces = silent(graph)
    assert forces is None
    torch.testing.assert_close(energy, network(graph).energy, rtol=1e-12, atol=1e-12)
