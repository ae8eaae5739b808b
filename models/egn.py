"""The Extended Graph Network (EGN) block as the paper draws it, and a small complete model of such blocks.

A graph is (u, V, E, T): systems, atoms, edges, and triplets, pairs of edges into one atom; every level has features. A
block updates the highest level first and aggregates downwards:

    TripletUpdate -> TripletAggr -> EdgeUpdate -> EdgeAggr -> NodeUpdate -> NodeAggr -> GlobalUpdate

What is notable:
* Updates are MLPs on concatenated rows, and triplets are listed: a block to read and to test with. GemNet-T
  (`gemnet.py`) is a block of the same kind that stores nothing triplet-sized.
* Aggregates, and rows of source atoms, come through the verbs of `graph.partition`; all else acts row by row.
* Features depend on distances and angles alone: energies are invariant, forces turn with the atoms. Angles enter as
  Legendre polynomials of their cosine, which are smooth at 0 and 180 degrees.
* What an edge gives to a sum fades to zero at the cutoff, so energies are smooth in the positions, and -dE/dx is a
  force as well.

Source: Sriram et al. (ICLR 2022), section on Extended Graph Networks.
Shapes: V atoms, E edges, T triplets, B systems; Dv, De, Dt, Du the widths `node`, `edge`, `triplet`, `glob`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from egnscale.models.basis import GaussianBasis, polynomial_envelope
from egnscale.models.forces import Prediction
from egnscale.models.graph import ExtendedGraph, Pending, Triplets
from egnscale.models.harmonics import circular_harmonics
from egnscale.models.layered import Blocks, LayeredModel
from egnscale.models.layers import INV_SQRT_2, Dense


class Geometry(NamedTuple):
    """What follows from positions alone."""

    distance: Tensor  #: (E,) A
    direction: Tensor  #: (E, 3) unit vector from source to target
    fade: Tensor  #: (E, 1) 1 at distance zero, 0 at the cutoff
    size: Tensor  #: (B, 1) atoms of each system


class State(NamedTuple):
    """Features of the four levels."""

    u: Tensor  #: (B, Du)
    h: Tensor  #: (V, Dv)
    m: Tensor  #: (E, De)
    t: Tensor  #: (T, Dt)
    geometry: Geometry


def mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Two activated layers. (N, in) -> (N, out)."""
    return nn.Sequential(
        Dense(in_features, out_features, activation=True), Dense(out_features, out_features, activation=True)
    )


def listed(graph: ExtendedGraph) -> Triplets:
    """The triplets of a graph.

    Raises:
        ValueError: if it lists none.
    """
    if graph.triplets is None:
        raise ValueError(
            "EGN needs a list of triplets, and this graph has none (most models do without); make one with "
            "dataclasses.replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms))"
        )
    return graph.triplets


class EGNBlock(nn.Module):
    """One round of updates, from triplets down to systems. State -> State."""

    def __init__(self, *, node: int, edge: int, triplet: int, glob: int) -> None:
        super().__init__()
        self.of_triplet = mlp(triplet + 2 * edge, triplet)
        self.of_edge = mlp(edge + triplet + 2 * node, edge)
        self.of_node = mlp(node + edge + glob, node)
        self.of_system = mlp(glob + node, glob)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        u, h, m, t, geometry = state
        sources = graph.partition.gather_sources(h)  # may be under way while triplets are updated
        t = self.triplet_update(t, m, graph)
        m = self.edge_update(m, self.triplet_aggr(t, geometry, graph), h, sources, graph)
        h = self.node_update(h, self.edge_aggr(m, geometry, graph), u, graph)
        u = self.global_update(u, self.node_aggr(h, geometry, graph))
        return State(u, h, m, t, geometry)

    def triplet_update(self, t: Tensor, m: Tensor, graph: ExtendedGraph) -> Tensor:
        """Triplets from both of their edges. (T, Dt), (E, De) -> (T, Dt)."""
        sender, receiver = listed(graph)
        x = torch.cat([t, m.index_select(0, sender), m.index_select(0, receiver)], dim=-1)
        return (t + self.of_triplet(x)) * INV_SQRT_2

    def triplet_aggr(self, t: Tensor, geometry: Geometry, graph: ExtendedGraph) -> Tensor:
        """Sum over the triplets that an edge receives. (T, Dt) -> (E, Dt)."""
        return graph.partition.aggregate_triplets(t * geometry.fade.index_select(0, listed(graph).sender))

    def edge_update(self, m: Tensor, of_triplets: Tensor, h: Tensor, sources: Pending, graph: ExtendedGraph) -> Tensor:
        """Edges from their triplets and both of their atoms. (E, De), (E, Dt), (V, Dv) -> (E, De)."""
        x = torch.cat([m, of_triplets, sources.wait(), h.index_select(0, graph.target)], dim=-1)
        return (m + self.of_edge(x)) * INV_SQRT_2

    def edge_aggr(self, m: Tensor, geometry: Geometry, graph: ExtendedGraph) -> Tensor:
        """Sum over the edges into an atom. (E, De) -> (V, De)."""
        return graph.partition.aggregate(m * geometry.fade)

    def node_update(self, h: Tensor, of_edges: Tensor, u: Tensor, graph: ExtendedGraph) -> Tensor:
        """Atoms from their edges and their system. (V, Dv), (V, De), (B, Du) -> (V, Dv)."""
        x = torch.cat([h, of_edges, u.index_select(0, graph.system)], dim=-1)
        return (h + self.of_node(x)) * INV_SQRT_2

    def node_aggr(self, h: Tensor, geometry: Geometry, graph: ExtendedGraph) -> Tensor:
        """Mean over the atoms of a system, so that u does not grow with it. (V, Dv) -> (B, Dv)."""
        return graph.partition.total(h) / geometry.size

    def global_update(self, u: Tensor, of_nodes: Tensor) -> Tensor:
        """Systems from their atoms. (B, Du), (B, Dv) -> (B, Du)."""
        return (u + self.of_system(torch.cat([u, of_nodes], dim=-1))) * INV_SQRT_2


class Embedding(nn.Module):
    """Layer 0: from structure to the first features of every level."""

    def __init__(
        self,
        *,
        node: int,
        edge: int,
        triplet: int,
        glob: int,
        num_radial: int,
        num_spherical: int,
        num_elements: int,
        cutoff: float,
    ) -> None:
        super().__init__()
        self.cutoff, self.num_spherical = cutoff, num_spherical
        self.radial_basis = GaussianBasis(num_radial, cutoff)
        self.elements = nn.Parameter(torch.empty(num_elements, node))
        if not self.elements.is_meta:
            nn.init.normal_(self.elements)
        self.of_edge = mlp(2 * node + num_radial, edge)
        self.of_triplet = mlp(num_spherical + 2 * edge, triplet)
        self.of_system = mlp(node, glob)

    def forward(self, graph: ExtendedGraph) -> State:
        sender, receiver = listed(graph)
        h = self.elements.index_select(0, graph.atomic_numbers - 1)
        sources = graph.partition.gather_sources(h)
        geometry = self.geometry(graph)
        distance, direction, _, size = geometry
        targets = h.index_select(0, graph.target)
        m = self.of_edge(torch.cat([sources.wait(), targets, self.radial_basis(distance)], dim=-1))
        cosine = (direction.index_select(0, sender) * direction.index_select(0, receiver)).sum(-1)
        angle = circular_harmonics(cosine, self.num_spherical)
        t = self.of_triplet(torch.cat([angle, m.index_select(0, sender), m.index_select(0, receiver)], dim=-1))
        u = self.of_system(graph.partition.total(h) / size)
        return State(u, h, m, t, geometry)

    def geometry(self, graph: ExtendedGraph) -> Geometry:
        """Distances, directions and sizes, in the precision of the positions."""
        positions = graph.partition.gather_sources(graph.positions).wait()
        vector = graph.positions.index_select(0, graph.target) - positions - graph.shift
        distance = torch.linalg.vector_norm(vector, dim=-1)
        fade = polynomial_envelope(distance / self.cutoff)[:, None]
        size = graph.partition.total(torch.ones_like(graph.positions[:, :1])).clamp(min=1)
        return Geometry(distance, vector / distance[:, None], fade, size)


class Readout(nn.Module):
    """Last layer: energies of systems, and forces on atoms as sums of forces along edges."""

    def __init__(self, *, node: int, edge: int, glob: int) -> None:
        super().__init__()
        self.energy = nn.Sequential(mlp(node + glob, node), Dense(node, 1))
        self.force = nn.Sequential(mlp(edge, edge), Dense(edge, 1))

    def forward(self, state: State, graph: ExtendedGraph) -> Prediction:
        u, h, m, _, (_, direction, fade, _) = state
        energy = self.energy(torch.cat([h, u.index_select(0, graph.system)], dim=-1))
        forces = graph.partition.aggregate(self.force(m) * fade * direction)
        return Prediction(graph.partition.total(energy.to(direction.dtype)).squeeze(-1), forces)


class EGN(LayeredModel):
    """A model of `EGNBlock`s: `model(graph) -> Prediction`, for graphs that list their triplets.

    Args:
        num_blocks: number of blocks.
        node, edge, triplet, glob: features of an atom, an edge, a triplet and a system.
        num_radial: functions of a distance.
        num_spherical: functions of an angle.
        num_elements: atomic numbers 1..num_elements can be embedded.
        cutoff: A, the one that the graph was built with.
    """

    State = State

    def __init__(
        self,
        num_blocks: int = 2,
        node: int = 16,
        edge: int = 16,
        triplet: int = 16,
        glob: int = 8,
        *,
        num_radial: int = 8,
        num_spherical: int = 4,
        num_elements: int = 83,
        cutoff: float = 6.0,
    ) -> None:
        super().__init__()
        self.embedding = Embedding(
            node=node, edge=edge, triplet=triplet, glob=glob, num_radial=num_radial, num_spherical=num_spherical,
            num_elements=num_elements, cutoff=cutoff,
        )  # fmt: skip
        self.blocks = Blocks(EGNBlock(node=node, edge=edge, triplet=triplet, glob=glob) for _ in range(num_blocks))
        self.readout = Readout(node=node, edge=edge, glob=glob)
