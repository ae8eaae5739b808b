"""Periodic radius graph of a batch of structures, with OC20's rules.

1. Candidates: all pairs closer than the cutoff (d^2 <= r^2), through every periodic image, a structure's own images
   included; pairs closer than 0.01 A are the same atom. Found by vesin, one cell list for each structure.
2. Cap: each atom keeps its `max_neighbors` nearest neighbours, strictly. Neighbours at the same distance (closer than
   1e-6 A to each other) are ranked by a fixed generic linear form of the displacement in fractional coordinates, so the
   choice does not depend on the order of the atoms, on rotations, translations, or on what else is in the batch.
   (Structures without a full cell use Cartesian components: there, a tie right at the cap can turn with the frame.)
3. Symmetrisation: an edge exists together with its reverse, or not at all; `none` leaves this step out (DimeNet++).
   `union` (default): if either end keeps the other. Independent of the order of atoms.
   `oc20`: if the end with the higher index keeps the other (for an atom and its own image: the lexicographically
   negative image). It is what the public OC20 code does, and it makes energies depend on the order of the atoms
   wherever the cap cuts; use it to reproduce published checkpoints.
   With these two an atom's degree can exceed `max_neighbors`.

Edges are sorted by (target, source, image), so a structure's edges do not depend on the batch either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import vesin

from egnscale.data.sample import Sample

Symmetrize = Literal["union", "oc20", "none"]

#: Neighbours of one atom whose distances differ by less (A) count as equally far.
TIE_TOLERANCE = 1e-6
#: Rationally independent, so that different displacements get different ranks.
TIE_DIRECTION = np.array([1.0, 2**0.5, 3**0.5])
SAME_ATOM = 0.01


@dataclass(frozen=True)
class GraphSpec:
    """What makes a graph out of atoms. Part of the model: a checkpoint carries it."""

    cutoff: float = 6.0  #: A
    max_neighbors: int | None = 50  #: None: no cap
    symmetrize: Symmetrize = "union"
    leaving: bool = False  #: list edges by the atom that they leave, too

    def __post_init__(self) -> None:
        if not (np.isfinite(self.cutoff) and self.cutoff > 0):
            raise ValueError(f"cutoff is {self.cutoff} A; it must be positive")
        if self.max_neighbors is not None and self.max_neighbors < 1:
            raise ValueError(f"max_neighbors is {self.max_neighbors}; it must be at least 1, or null for no cap")
        if self.symmetrize not in ("union", "oc20", "none"):
            raise ValueError(f"symmetrize is {self.symmetrize!r}; choose 'union', 'oc20' or 'none'")


@dataclass(frozen=True, eq=False)
class Edges:
    """Directed edges of a batch, sorted by target. E edges."""

    source: np.ndarray  #: (E,) int64
    target: np.ndarray  #: (E,) int64
    image: np.ndarray  #: (E, 3) int64, the lattice translation of the source
    shift: np.ndarray  #: (E, 3) float64, A: image @ cell
    reverse: np.ndarray  #: (E,) int64; -1: there is none


def radius_graph(samples: Sequence[Sample], spec: GraphSpec) -> Edges:
    """Build the graph of a batch; atom indices run through the samples in order.

    Raises:
        ValueError: if a sample's positions or cell make no sense (see `Sample.validate`).
    """
    source, target, image, distance, vector = _candidates(samples, spec.cutoff)
    num_atoms = sum(sample.num_atoms for sample in samples)
    cells = np.stack([sample.cell for sample in samples]) if samples else np.zeros((0, 3, 3))
    owner = np.repeat(np.arange(len(samples)), [sample.num_atoms for sample in samples])
    if spec.max_neighbors is not None:
        rank = _rank_of_ties(vector, cells, owner[target])
        keep = _nearest(target, distance, rank, spec.max_neighbors, num_atoms)
        source, target, image = source[keep], target[keep], image[keep]
    if spec.symmetrize != "none":
        source, target, image = _symmetrize(source, target, image, spec.symmetrize)
    order = np.lexsort((image[:, 2], image[:, 1], image[:, 0], source, target))
    source, target, image = source[order], target[order], image[order]
    reverse = _reverse(source, target, image, symmetric=spec.symmetrize != "none")
    shift = np.einsum("ei,eij->ej", image.astype(np.float64), cells[owner[target]])
    return Edges(source, target, image, shift, reverse)


def _reverse(source: np.ndarray, target: np.ndarray, image: np.ndarray, *, symmetric: bool) -> np.ndarray:
    """The row of each edge's reverse, of edges sorted by (target, source, image)."""
    turned = np.lexsort((-image[:, 2], -image[:, 1], -image[:, 0], target, source))
    reverse = np.empty_like(turned)
    if symmetric:
        # Sorting by the reverse edge's key lists the edges in the order of their reverses: rank for rank.
        reverse[turned] = np.arange(len(turned))
        return reverse
    # Edges and reverses of edges in one order: where two neighbours are the same, the edge has a reverse.
    keys = np.column_stack([target, source, image])
    both = np.concatenate([keys, np.column_stack([source, target, -image])])
    order = np.lexsort(both.T[::-1])  # stable: an edge stands before the reverse that equals it
    same = (both[order[:-1]] == both[order[1:]]).all(axis=1)
    reverse[:] = -1
    reverse[order[1:][same] - len(keys)] = order[:-1][same]
    return reverse


def count_edges(sample: Sample, spec: GraphSpec | None = None) -> int:
    """Number of directed edges of one structure; the default graph is OC20's (6 A, 50 neighbours)."""
    return len(radius_graph([sample], spec or GraphSpec()).source)


def _candidates(samples: Sequence[Sample], cutoff: float) -> tuple[np.ndarray, ...]:
    """(source, target, image, distance, vector) of all pairs within the cutoff; vector points from target to source."""
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=False)
    parts: list[tuple[np.ndarray, ...]] = []
    first = 0
    for sample in samples:
        sample.validate()
        center, neighbor, image, distance, vector = search.compute(
            points=sample.positions,
            box=sample.cell,
            periodic=sample.pbc,
            quantities="ijSdD",
            copy=True,
        )
        keep = distance > SAME_ATOM
        parts.append(
            (
                neighbor[keep].astype(np.int64) + first,
                center[keep].astype(np.int64) + first,
                image[keep].astype(np.int64),
                distance[keep],
                vector[keep],
            )
        )
        first += sample.num_atoms
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros((0, 3), dtype=np.int64), np.zeros(0), np.zeros((0, 3))
    source, target, image, distance, vector = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return source, target, image, distance, vector


def _rank_of_ties(vector: np.ndarray, cells: np.ndarray, system: np.ndarray) -> np.ndarray:
    """TIE_DIRECTION . (fractional coordinates of `vector`), in one product: v inv(cell) . t = v . (inv(cell) t)."""
    full = np.abs(np.linalg.det(cells)) > 1e-9
    frames = np.where(full[:, None, None], cells, np.eye(3))
    form = np.linalg.solve(frames, np.broadcast_to(TIE_DIRECTION[:, None], (len(cells), 3, 1)))[..., 0]
    return np.einsum("ei,ei->e", vector, form[system])


def _nearest(
    target: np.ndarray, distance: np.ndarray, rank_of_ties: np.ndarray, count: int, num_atoms: int
) -> np.ndarray:
    """Indices of the edges that are among the `count` nearest of their target."""
    degree = np.bincount(target, minlength=num_atoms)
    crowded = np.flatnonzero((degree > count)[target])
    if not len(crowded):
        return np.arange(len(target))
    keep = np.ones(len(target), dtype=bool)
    keep[crowded] = False
    order = crowded[np.lexsort((distance[crowded], target[crowded]))]
    start = np.r_[True, np.diff(target[order]) != 0]
    shell = np.cumsum(start | (np.diff(distance[order], prepend=-np.inf) > TIE_TOLERANCE))
    order = order[np.lexsort((rank_of_ties[order], shell))]
    first = np.flatnonzero(np.r_[True, np.diff(target[order]) != 0])
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    keep[order[rank < count]] = True
    return np.flatnonzero(keep)


def _symmetrize(
    source: np.ndarray, target: np.ndarray, image: np.ndarray, rule: Symmetrize
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Close the edge list under reversal: (s, t, image) -> (t, s, -image)."""
    first_nonzero = np.take_along_axis(image, (image != 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    half = (source < target) | ((source == target) & (first_nonzero < 0))
    if rule == "oc20":
        source, target, image = source[half], target[half], image[half]
    else:
        # Turn every edge into the half where source < target, then keep one of each.
        turned = ~half
        source, target = np.where(turned, target, source), np.where(turned, source, target)
        image = np.where(turned[:, None], -image, image)
        order = np.lexsort((image[:, 2], image[:, 1], image[:, 0], source, target))
        source, target, image = source[order], target[order], image[order]
        same = (
            (np.diff(source, prepend=-1) == 0)
            & (np.diff(target, prepend=-1) == 0)
            & (np.diff(image, axis=0, prepend=image[:1] + 1) == 0).all(axis=1)
        )
        source, target, image = source[~same], target[~same], image[~same]
    return np.r_[source, target], np.r_[target, source], np.r_[image, -image]
