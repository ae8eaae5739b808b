"""The Extended Graph Network block: its seven functions, its symmetries, and the shares of its triplets."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import structures
import torch
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import EGN, EGNBlock, ExtendedGraph, Prediction
from egnscale.models.egn import State
from egnscale.models.graph import Triplets
from egnscale.scaling.all_reduce import bytes_per_block, partition_by_triplets

CUTOFF = 4.0
#: Names of the seven functions, in the paper's order.
SEVEN = (
    "triplet_update",
    "triplet_aggr",
    "edge_update",
    "edge_aggr",
    "node_update",
    "node_aggr",
    "global_update",
)


def small_model() -> EGN:
    """fp64, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EGN(node=6, edge=7, triplet=5, glob=4, cutoff=CUTOFF).double()


def graph_of(*samples: Sample) -> ExtendedGraph:
    graph = build_graph(samples, GraphSpec(CUTOFF, max_neighbors=None), torch.float64)
    return replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms))


@torch.no_grad()
def predict(*samples: Sample) -> Prediction:
    return small_model()(graph_of(*samples))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return float((a - b).detach().norm()) < tolerance * float(b.detach().norm())


# --- the block ---


def test_the_seven_functions_are_called_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def noted(name: str) -> None:
        original = getattr(EGNBlock, name)

        def call(self: EGNBlock, *args: object) -> Tensor:
            called.append(name)
            return original(self, *args)

        monkeypatch.setattr(EGNBlock, name, call)

    for name in SEVEN:
        noted(name)
    model, graph = small_model(), graph_of(structures.water(periodic=True))
    model.blocks[0](model.embedding(graph), graph)
    assert tuple(called) == SEVEN


def row_by_row(block: EGNBlock, state: State, graph: ExtendedGraph) -> State:
    """The block without verbs: one triplet, one edge, one atom, one system at a time."""
    u, h, m, t, (_, _, fade, size) = state
    half = 0.5**0.5
    source, target, system = (x.tolist() for x in (graph.source, graph.target, graph.system))
    triplets = [(c, b) for b in range(len(m)) for c in range(len(m)) if b != c and target[b] == target[c]]
    t = torch.stack(
        [(t[k] + block.of_triplet(torch.cat([t[k], m[c], m[b]]))) * half for k, (c, b) in enumerate(triplets)]
    )
    on_edges = [sum((t[k] * fade[c] for k, (c, b) in enumerate(triplets) if b == e), 0 * t[0]) for e in range(len(m))]
    ends = list(zip(source, target, strict=True))
    m = torch.stack(
        [(m[e] + block.of_edge(torch.cat([m[e], on_edges[e], h[s], h[a]]))) * half for e, (s, a) in enumerate(ends)]
    )
    on_atoms = [sum((m[e] * fade[e] for e, (_, a) in enumerate(ends) if a == v), 0 * m[0]) for v in range(len(h))]
    h = torch.stack([(h[v] + block.of_node(torch.cat([h[v], on_atoms[v], u[b]]))) * half for v, b in enumerate(system)])
    means = [sum((h[v] for v, of in enumerate(system) if of == b), 0 * h[0]) / size[b] for b in range(len(u))]
    u = torch.stack([(u[b] + block.of_system(torch.cat([u[b], means[b]]))) * half for b in range(len(u))])
    return State(u, h, m, t, state.geometry)


def test_a_block_is_what_it_says_row_by_row() -> None:
    model = small_model()
    graph = graph_of(structures.crystal(), structures.far_apart("O"), structures.water(periodic=False))
    assert graph.num_triplets > 100
    state = model.embedding(graph)
    found, wanted = model.blocks[0](state, graph), row_by_row(model.blocks[0], state, graph)
    for name in ("u", "h", "m", "t"):
        assert close(getattr(found, name), getattr(wanted, name), 1e-12), name
        assert not close(getattr(found, name), getattr(state, name), 1e-2), name


def test_a_graph_without_a_list_of_triplets_is_refused() -> None:
    graph = replace(graph_of(structures.slab()), triplets=None)
    with pytest.raises(ValueError, match="list of triplets"):
        small_model()(graph)
    with pytest.raises(ValueError, match="lists none"):
        partition_by_triplets(graph, 2, 0)


# --- symmetries ---


def test_rotation_turns_forces_and_leaves_energies() -> None:
    slab, rotation = structures.slab(), structures.random_rotation()
    before, after = predict(slab), predict(structures.rotated(slab, rotation))
    assert close(after.energy, before.energy)
    assert close(after.forces, before.forces @ torch.from_numpy(rotation.T))
    assert not close(after.forces, before.forces)


def test_translation_changes_nothing() -> None:
    slab = structures.slab()
    images = np.random.default_rng(0).integers(-2, 3, (slab.num_atoms, 3)) * slab.pbc
    before = predict(slab)
    for by in (np.array([1.7, -33.3, 4.1]), images @ slab.cell):
        after = predict(structures.translated(slab, by))
        assert close(after.energy, before.energy)
        assert close(after.forces, before.forces)


def test_permutation_of_atoms_permutes_forces() -> None:
    slab = structures.slab()
    order = np.random.default_rng(0).permutation(slab.num_atoms)
    before, after = predict(slab), predict(structures.permuted(slab, order))
    assert close(after.energy, before.energy)
    assert close(after.forces, before.forces[order])


def test_a_batch_is_its_structures() -> None:
    samples = [structures.slab(), structures.far_apart("O"), structures.water(periodic=True), structures.crystal()]
    alone, together = [predict(sample) for sample in samples], predict(*samples)
    assert close(together.energy, torch.cat([prediction.energy for prediction in alone]))
    assert close(together.forces, torch.cat([prediction.forces for prediction in alone]))


def test_two_cells_have_twice_the_energy() -> None:
    slab = structures.slab()
    once, twice = predict(slab), predict(structures.repeated(slab, 0))
    assert close(twice.energy, 2 * once.energy)
    assert close(twice.forces, once.forces.repeat(2, 1))


def test_the_angle_matters() -> None:
    """The same distances to the central atom, which alone is in reach of the others."""

    def energy(angle: float) -> float:
        sample = structures.far_apart("O", "H", "H")
        end = np.array([[0, 0, 0], [3.5, 0, 0], [3.5 * np.cos(angle), 3.5 * np.sin(angle), 0]])
        return float(predict(replace(sample, positions=end)).energy)

    assert abs(energy(np.pi) - energy(np.pi / 2)) > 1e-6


# --- derivatives ---


def energy_at(positions: Tensor, graph: ExtendedGraph) -> Tensor:
    return small_model()(replace(graph, positions=positions)).energy.sum()


@pytest.mark.parametrize(
    "sample", [structures.slab(), structures.crystal(pbc=(True, False, False))], ids=["slab", "row"]
)
def test_derivatives_of_the_energy(sample: Sample) -> None:
    """First and second, against differences. A row of images has angles of 0 and 180 degrees and nothing else."""
    graph = graph_of(sample)
    generator = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, *graph.positions.shape, generator=generator, dtype=torch.float64)
    x = graph.positions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy_at(x, graph), x, create_graph=True)
    (curvature,) = torch.autograd.grad((gradient * v).sum(), x)
    step = 1e-4
    along = [graph.positions + s * step * w for s in (1, -1)]
    difference = (energy_at(along[0], graph) - energy_at(along[1], graph)) / (2 * step)
    torch.testing.assert_close((gradient * w).sum(), difference, rtol=1e-6, atol=1e-8)

    def slope(at: Tensor) -> Tensor:
        at.requires_grad_()
        return (torch.autograd.grad(energy_at(at, graph), at)[0] * v).sum()

    difference = (slope(along[0]) - slope(along[1])) / (2 * step)
    torch.testing.assert_close((curvature * w).sum(), difference, rtol=1e-6, atol=1e-8)


def test_energy_is_smooth_where_an_edge_appears() -> None:
    def energy(distance: float) -> float:
        sample = structures.far_apart("Cu", "O", "H")
        ends = np.array([[0, 0, 0], [distance, 0, 0], [0, 1.5, 0]])
        return float(predict(replace(sample, positions=ends)).energy)

    assert abs(energy(CUTOFF - 1e-5) - energy(CUTOFF + 1e-5)) < 1e-10
    assert abs(energy(CUTOFF - 0.5) - energy(CUTOFF + 1e-5)) > 1e-6


def test_bf16_weights() -> None:
    graph = graph_of(structures.slab(), structures.far_apart("O")).to("cpu", torch.float32)
    model = small_model().bfloat16()
    in_bf16 = model(graph)
    (in_bf16.energy.sum() + in_bf16.forces.square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    in_fp32 = model.float()(graph)
    for ours, theirs in zip(in_bf16, in_fp32, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-5 < (ours - theirs).norm() / theirs.norm() < 5e-2


# --- shares of triplets ---


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 1000])
def test_triplets_are_shared_out_evenly(parts: int) -> None:
    """More parts than triplets included: some get none."""
    graph = graph_of(structures.water(periodic=True), structures.far_apart("O"))
    shares = [partition_by_triplets(graph, parts, part) for part in range(parts)]
    triplets = [share.triplets for share in shares]
    for name in Triplets._fields:
        assert torch.equal(torch.cat([getattr(t, name) for t in triplets]), getattr(graph.triplets, name))
    numbers = [len(t.sender) for t in triplets]
    assert max(numbers) - min(numbers) <= 1
    for share in shares:
        assert torch.equal(share.positions, graph.positions)
        assert torch.equal(share.source, graph.source)
        assert (sum(share.exchange.atoms), sum(share.exchange.edges)) == (graph.num_atoms, graph.num_edges)


def test_a_part_travels_from_a_loader_alone_and_wants_to_be_joined() -> None:
    graph = graph_of(structures.slab(size=(3, 3, 3)))
    part = partition_by_triplets(graph, 4, 1)
    assert len(pickle.dumps(part.triplets)) < len(pickle.dumps(graph.triplets)) / 3
    moved = pickle.loads(pickle.dumps(part)).to("cpu", torch.float32)
    with pytest.raises(ValueError, match="one part of a graph"):
        moved.partition  # noqa: B018


def test_bytes_of_a_block() -> None:
    graph = graph_of(structures.slab(), structures.far_apart("O"))
    found = bytes_per_block(graph, 4, triplet=5, edge=7, node=6)
    ring = 2 * 3 / 4 * 4  # 2 (P - 1) / P of the payload, in fp32
    assert found == {
        "aggregate_triplets": ring * graph.num_edges * 5,
        "aggregate": ring * graph.num_atoms * 7,
        "total": ring * 2 * 6,
    }
    assert bytes_per_block(graph, 4, triplet=5, edge=7, node=6, dtype=torch.bfloat16) == found
    assert not any(bytes_per_block(graph, 1, triplet=5, edge=7, node=6).values())
