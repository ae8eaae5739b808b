"""Periodic radius graphs against definitions spelled out in loops."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import structures
from matscipy.neighbours import neighbour_list

from egnscale.data.batch import Collate
from egnscale.data.neighbors import Edges, GraphSpec, count_edges, radius_graph
from egnscale.data.sample import Sample

#: (source, target, image of the source)
Edge = tuple[int, int, tuple[int, int, int]]
MASKS = list(product([False, True], repeat=3))
CELLS = {
    "box": np.diag([4.1, 5.2, 6.3]),
    "skewed, thinner than the cutoff": np.array([[2.6, 0.0, 0.0], [1.9, 2.5, 0.0], [-1.1, 0.8, 2.4]]),
    "left-handed": np.array([[0.0, 5.0, 0.3], [5.5, 0.0, 0.0], [0.2, 0.0, 6.0]]),
}


def random_sample(cell: np.ndarray, pbc: tuple = (True, True, True), atoms: int = 5, seed: int = 0) -> Sample:
    """Atoms in and around the cell: positions need no wrapping."""
    random = np.random.default_rng(seed)
    numbers = random.integers(1, 80, atoms)
    positions = random.uniform(-0.5, 1.5, (atoms, 3)) @ cell
    zeros = np.zeros(atoms, dtype=np.int64)
    return Sample(numbers, positions, cell, np.array(pbc), zeros, zeros.astype(bool))


def listing(edges: Edges) -> list[Edge]:
    return [
        (s, t, tuple(image))
        for s, t, image in zip(edges.source.tolist(), edges.target.tolist(), edges.image.tolist(), strict=True)
    ]


def length(sample: Sample, edge: Edge) -> float:
    source, target, image = edge
    return float(np.linalg.norm(sample.positions[source] + image @ sample.cell - sample.positions[target]))


def every_edge(sample: Sample, cutoff: float, reach: int = 6) -> list[Edge]:
    """All pairs through all images up to `reach` cells away."""
    images = np.array(list(product(*(range(-reach, reach + 1) if periodic else (0,) for periodic in sample.pbc))))
    edges = []
    for s, t in product(range(sample.num_atoms), repeat=2):
        distance = np.linalg.norm(sample.positions[s] + images @ sample.cell - sample.positions[t], axis=1)
        edges += [(s, t, tuple(image)) for image in images[(distance > 0.01) & (distance <= cutoff)].tolist()]
    return edges


def opposite(edge: Edge) -> Edge:
    source, target, image = edge
    return target, source, tuple(-i for i in image)


# --- which pairs ---


@pytest.mark.parametrize("pbc", MASKS, ids=lambda pbc: "".join("xyz"[i] if p else "-" for i, p in enumerate(pbc)))
@pytest.mark.parametrize("cell", CELLS)
def test_all_pairs_within_the_cutoff(cell: str, pbc: tuple) -> None:
    sample, cutoff = random_sample(CELLS[cell], pbc), 4.0
    edges = radius_graph([sample], GraphSpec(cutoff, max_neighbors=None))
    reach = 9 if cell.startswith("skewed") else 4
    assert Counter(listing(edges)) == Counter(every_edge(sample, cutoff, reach))
    assert count_edges(sample, GraphSpec(cutoff, max_neighbors=None)) == len(edges.source)


def test_all_pairs_that_matscipy_finds() -> None:
    sample = structures.slab(size=(3, 2, 4))
    edges = radius_graph([sample], GraphSpec(max_neighbors=None))
    target, source, image = neighbour_list(
        "ijS", cutoff=6.0, positions=sample.positions, cell=sample.cell, pbc=sample.pbc
    )
    theirs = zip(source.tolist(), target.tolist(), map(tuple, image.tolist()), strict=True)
    assert Counter(listing(edges)) == Counter(theirs)


def test_an_atom_s_own_images_are_neighbors_and_the_atom_is_not() -> None:
    edges = radius_graph([structures.crystal()], GraphSpec(cutoff=2.6))
    assert len(edges.source) == 12
    assert np.abs(edges.image).sum(axis=1).all()


def test_atoms_on_top_of_each_other_are_no_neighbors() -> None:
    sample = structures.far_apart("O", "O", "H")
    for apart, expected in ((0.009, 0), (0.011, 2)):
        sample.positions[1] = sample.positions[0] + [apart, 0, 0]
        assert count_edges(sample) == expected


# --- which of them are kept ---


def nearest(sample: Sample, spec: GraphSpec) -> set[Edge]:
    """Each atom's `max_neighbors` nearest."""
    kept: set[Edge] = set()
    edges = every_edge(sample, spec.cutoff)
    for atom in range(sample.num_atoms):
        into = [edge for edge in edges if edge[1] == atom]
        kept.update(sorted(into, key=lambda edge: length(sample, edge))[: spec.max_neighbors])
    return kept


@pytest.mark.parametrize("max_neighbors", [1, 7, 50])
@pytest.mark.parametrize("pbc", [(True, True, False), (True, True, True)])
def test_cap_keeps_exactly_the_nearest(max_neighbors: int, pbc: tuple) -> None:
    sample, spec = random_sample(CELLS["box"], pbc, atoms=24), GraphSpec(6.0, max_neighbors)
    kept = nearest(sample, spec)
    assert len(kept) < len(every_edge(sample, spec.cutoff))
    assert set(listing(radius_graph([sample], spec))) == kept | {opposite(edge) for edge in kept}


@pytest.mark.parametrize("max_neighbors", [7, None])
@pytest.mark.parametrize("cell", CELLS)
def test_public_symmetrisation_keeps_what_its_rule_says(cell: str, max_neighbors: int | None) -> None:
    sample, spec = random_sample(CELLS[cell]), GraphSpec(4.0, max_neighbors, symmetrize="oc20")
    kept = {
        (source, target, image)
        for source, target, image in nearest(sample, spec)
        if source < target or (source == target and image < (0, 0, 0))
    }
    assert set(listing(radius_graph([sample], spec))) == kept | {opposite(edge) for edge in kept}


@pytest.mark.parametrize("max_neighbors", [5, 11, 30, 50])
@pytest.mark.parametrize("kind", ["fcc111", "fcc211"])
def test_ties_at_the_cap_break_the_same_way_in_any_frame_order_and_company(kind: str, max_neighbors: int) -> None:
    slab, spec = structures.slab(kind, rattle=0), GraphSpec(max_neighbors=max_neighbors)
    before = set(listing(radius_graph([slab], spec)))
    edges = every_edge(slab, 6.0)
    shells = [sorted(length(slab, e) for e in edges if e[1] == atom) for atom in range(slab.num_atoms)]
    at_cap = [d[max_neighbors] - d[max_neighbors - 1] for d in shells if len(d) > max_neighbors]
    assert min(at_cap) < 1e-9, "there should be a tie to break"

    for seed in range(3):
        moved = structures.translated(structures.rotated(slab, structures.random_rotation(seed)), np.array([0.3, 1, 5]))
        assert set(listing(radius_graph([moved], spec))) == before

    order = np.random.default_rng(1).permutation(slab.num_atoms)
    shuffled = listing(radius_graph([structures.permuted(slab, order)], spec))
    assert {(int(order[s]), int(order[t]), image) for s, t, image in shuffled} == before

    other = structures.slab(seed=3)
    both = listing(radius_graph([other, slab, other], spec))
    n = other.num_atoms
    assert {(s - n, t - n, image) for s, t, image in both if n <= t < n + slab.num_atoms} == before


# --- how they are listed ---


@pytest.mark.parametrize("symmetrize", ["union", "oc20"])
def test_edges_are_sorted_unique_and_paired(symmetrize: str) -> None:
    samples = [
        structures.slab(rattle=0),
        structures.far_apart("O"),
        structures.crystal(CELLS["skewed, thinner than the cutoff"]),
    ]
    edges = radius_graph(samples, GraphSpec(symmetrize=symmetrize))
    keys = [(t, s, image) for s, t, image in listing(edges)]
    assert keys == sorted(set(keys))
    assert [opposite(edge) for edge in listing(edges)] == [listing(edges)[r] for r in edges.reverse.tolist()]
    cells = np.repeat([s.cell for s in samples], [s.num_atoms for s in samples], axis=0)
    np.testing.assert_allclose(edges.shift, np.einsum("ei,eij->ej", edges.image, cells[edges.target]), atol=1e-12)
    assert (edges.source != samples[0].num_atoms).all()  # the isolated atom


def test_a_batch_lists_the_edges_of_each_structure() -> None:
    samples = [structures.slab(), structures.water(periodic=False), structures.slab("fcc211")]
    expected, first = [], 0
    for sample in samples:
        expected += [(s + first, t + first, image) for s, t, image in listing(radius_graph([sample], GraphSpec()))]
        first += sample.num_atoms
    assert listing(radius_graph(samples, GraphSpec())) == expected


def test_nothing_gives_an_empty_graph() -> None:
    edges = radius_graph([], GraphSpec())
    assert edges.image.shape == edges.shift.shape == (0, 3)
    assert len(edges.source) == len(edges.target) == len(edges.reverse) == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"cutoff": 0.0}, "cutoff is 0.0 A; it must be positive"),
        ({"cutoff": float("nan")}, "must be positive"),
        ({"max_neighbors": 0}, "at least 1, or null for no cap"),
        ({"symmetrize": "both"}, "choose 'union', 'oc20' or 'none'"),
    ],
    ids=str,
)
def test_a_spec_that_makes_no_sense_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraphSpec(**wrong)


def test_an_element_that_the_model_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match=r"sid 0 fid 0 holds atomic number 84; the model knows 1\.\.83"):
        Collate(GraphSpec())([structures.far_apart("O", "Po")])
