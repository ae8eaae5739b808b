"""GemNet-T, with direct forces (GemNet-dT) or conservative ones, as an Extended Graph Network.

What is notable:
* Edges carry most of the features; two edges into the same atom form a triplet. Angles enter through `triplet_sum`,
  which lists no triplet and stores no triplet-sized tensor.
* Exact rewritings of the published layers: one product for the bilinear layer; the exchange of m_ca and m_ac before the
  up-projection instead of after it (it acts row by row); `[h_source, h_target, m] W` as three products, two of them per
  atom; the force head as one narrow product. Weights, outputs and gradients stay those of the published form.
* A model is a list of layers, `[Embedding, Block, ..., Block, Readout]`, each mapping (State, graph) -> State.

Source: Gasteiger, Becker, Guennemann (NeurIPS 2021); the OC20 variant of Sriram et al. (ICLR 2022).
Shapes: V atoms, E edges, B systems; A, D, T, O the sizes emb_size_{atom, edge, trip, bil_trip}; I emb_size_{rbf, cbf}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from egnscale.models.basis import RADIAL_BASES
from egnscale.models.forces import EnergyModel, Forces, Prediction
from egnscale.models.graph import ExtendedGraph, Pending
from egnscale.models.layered import Blocks
from egnscale.models.layers import INV_SQRT_2, Dense, ScaleFactor, he_orthogonal_, residuals, scaled_silu
from egnscale.models.remake import cheap
from egnscale.models.segments import segment_sum_backend
from egnscale.models.triplets import AngularBasis, TripletForm, angular_basis, bilinear, triplet_sum


@dataclass(frozen=True, kw_only=True)
class GemNetConfig:
    """Hyperparameters, under their published names."""

    name: ClassVar[str] = "gemnet_t"
    gathers_at_source: ClassVar[bool] = False

    num_blocks: int
    emb_size_atom: int
    emb_size_edge: int
    emb_size_trip: int
    emb_size_bil_trip: int
    emb_size_rbf: int = 16
    emb_size_cbf: int = 16
    num_spherical: int = 7
    num_radial: int = 128
    num_before_skip: int = 1
    num_after_skip: int = 2
    num_concat: int = 1
    num_atom: int = 3
    num_elements: int = 83  #: atomic numbers 1..num_elements can be embedded
    cutoff: float = 6.0  #: A
    max_neighbors: int | None = 50
    symmetrize: str = "union"
    rbf: str = "gaussian"
    envelope_exponent: int = 5
    forces: Forces = "direct"
    extensive: bool = True  #: energy is the sum over atoms; else their mean
    output_init: str = "HeOrthogonal"  #: or "zeros"
    segment_sum: str = "native"  #: or "torch_scatter"
    triplet_form: TripletForm = "auto"

    def __post_init__(self) -> None:
        if self.forces not in ("direct", "conservative", "none"):
            raise ValueError(f"forces is {self.forces!r}; choose direct, conservative or none")
        if self.symmetrize not in ("union", "oc20"):
            raise ValueError(f"symmetrize is {self.symmetrize!r}; GemNet needs every edge's reverse: union or oc20")


class Geometry(NamedTuple):
    """What follows from positions alone."""

    distance: Tensor  #: (E,) A
    direction: Tensor  #: (E, 3) unit vector from source to target
    angular: AngularBasis


class EdgeBasis(NamedTuple):
    """Radial features of edges, shared by all blocks."""

    rbf: Tensor  #: (E, I) for the triplet interaction
    cbf: Tensor  #: (E, I, S) radial part of the angular basis
    rbf_atom: Tensor  #: (E, I) for edge -> atom sums
    rbf_out: Tensor  #: (E, I) for the output blocks


class State(NamedTuple):
    """What changes from layer to layer."""

    h: Tensor  #: (V, A) atom features
    m: Tensor  #: (E, D) edge features
    energy: Tensor  #: (V, 1) energy of each atom so far, normalised
    force: Tensor | None  #: (E, 1) force along each edge so far, normalised; None where forces are not direct
    basis: EdgeBasis
    geometry: Geometry


class AtomSum(nn.Module):
    """Edge features, weighted by their distance, summed into atoms and transformed. (E, D) -> (V, A)."""

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.segment_sum = segment_sum_backend(config.segment_sum, conservative=config.forces == "conservative")
        self.dense_rbf = Dense(config.emb_size_rbf, config.emb_size_edge)
        self.scale_sum = ScaleFactor()
        self.layers = nn.Sequential(
            Dense(config.emb_size_edge, config.emb_size_atom, activation=True),
            *residuals(config.num_atom, config.emb_size_atom),
        )

    def forward(self, m: Tensor, rbf: Tensor, graph: ExtendedGraph) -> Tensor:
        x = graph.partition.aggregate(m * self.dense_rbf(rbf), self.segment_sum)  # EdgeAggr
        return self.layers(self.scale_sum(x, reference=m))


class ForceHead(nn.Module):
    """Force along each edge. (E, D) -> (E, 1).

    Published: out(scale(x * dense_rbf(rbf))). Both matrices being linear, it equals ((x (W_rbf * w_out)) * rbf) summed
    over the I radial features: an (E, I) intermediate in place of two (E, D).
    """

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        width = config.emb_size_edge
        self.layers = nn.Sequential(Dense(width, width, activation=True), *residuals(config.num_atom, width))
        self.dense_rbf = Dense(config.emb_size_rbf, width)
        self.scale_had = ScaleFactor()
        self.out = Dense(width, 1)

    def forward(self, m: Tensor, rbf: Tensor) -> Tensor:
        x = self.layers(m)
        if self.scale_had.observer is not None:
            # Fitting needs the product that the short form never makes.
            return self.out(self.scale_had(x * self.dense_rbf(rbf), reference=x))
        narrow = x @ (self.dense_rbf.weight * self.out.weight.t())
        return (narrow * rbf).sum(-1, keepdim=True) * self.scale_had.alpha.to(x.dtype)


class OutputBlock(nn.Module):
    """Adds one contribution to the energies of atoms and, where they are direct, to the forces along edges."""

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.atom_sum = AtomSum(config)
        self.out_energy = Dense(config.emb_size_atom, 1)
        self.force = ForceHead(config) if config.forces == "direct" else None
        if config.output_init == "zeros":
            nn.init.zeros_(self.out_energy.weight)
            if self.force is not None:
                nn.init.zeros_(self.force.out.weight)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        m, rbf = state.m, state.basis.rbf_out
        energy = self.out_energy(self.atom_sum(m, rbf, graph))  # EdgeAggr, NodeUpdate
        state = state._replace(energy=state.energy + energy.to(state.energy.dtype))
        if self.force is None or state.force is None:
            return state
        force = self.force(m, rbf)  # of edges; `Readout` sums them into atoms
        return state._replace(force=state.force + force.to(state.force.dtype))


class EdgeEmbedding(nn.Module):
    """act([h_source, h_target, m] W^T). (V, A), (E, F) -> (E, D)."""

    def __init__(self, config: GemNetConfig, edge_features: int) -> None:
        super().__init__()
        self.atom_features = config.emb_size_atom
        self.dense = Dense(2 * config.emb_size_atom + edge_features, config.emb_size_edge, activation=True)

    def forward(self, h: Tensor, m: Tensor, graph: ExtendedGraph) -> Tensor:
        of_source, of_target, of_edge = self.dense.weight.split(
            [self.atom_features, self.atom_features, self.dense.weight.shape[1] - 2 * self.atom_features], dim=1
        )
        h = h.to(of_source.dtype)
        sources = graph.partition.gather_sources(h, of_source)
        targets = (h @ of_target.t()).index_select(0, graph.target)
        edges = m.to(of_edge.dtype) @ of_edge.t()
        return scaled_silu(sources.wait() + targets + edges)


class TripletInteraction(nn.Module):
    """Messages from all other edges into the same atom, weighted by distance and angle. (E, D) -> (E, D).

    In two halves, so that the block has work for the time that messages are on their way to the reverse edges.
    """

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        edge, trip, out = config.emb_size_edge, config.emb_size_trip, config.emb_size_bil_trip
        self.dense_ba = Dense(edge, edge, activation=True)
        self.mlp_rbf = Dense(config.emb_size_rbf, edge)
        self.scale_rbf = ScaleFactor()
        self.down_projection = Dense(edge, trip, activation=True)
        self.mlp_cbf = nn.Parameter(he_orthogonal_(torch.empty(trip, config.emb_size_cbf, out)))
        self.scale_cbf_sum = ScaleFactor()
        self.up_projection_ca = Dense(out, edge, activation=True)
        self.up_projection_ac = Dense(out, edge, activation=True)

    def send(self, m: Tensor, basis: EdgeBasis, angular: AngularBasis, graph: ExtendedGraph) -> tuple[Tensor, Pending]:
        """(E, O) messages, and those of the reverse edges, which may be under way."""
        x = self.dense_ba(m)
        x = self.scale_rbf(cheap(torch.mul, x, self.mlp_rbf(basis.rbf)), reference=x)
        x = self.down_projection(x)
        y = bilinear(triplet_sum(x, angular, graph.buckets), basis.cbf, self.mlp_cbf)
        y = self.scale_cbf_sum(y, reference=x)
        return y, graph.partition.swap(y)

    def receive(self, y: Tensor, swapped: Pending) -> Tensor:
        """What `send` gave -> (E, D)."""
        ca = self.up_projection_ca(y)
        return (ca + self.up_projection_ac(swapped.wait())) * INV_SQRT_2


class InteractionBlock(nn.Module):
    """One round of message passing: edges from triplets, atoms from edges, edges from atoms.

    As an Extended Graph Network block (`egn.py`), with the paper's two additions: the exchange of m_ca and m_ac, and a
    second edge update after the node update. Features of triplets and of the system are not kept from block to block.
    """

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        edge = config.emb_size_edge
        self.dense_ca = Dense(edge, edge, activation=True)
        self.trip_interaction = TripletInteraction(config)
        self.layers_before_skip = residuals(config.num_before_skip, edge)
        self.layers_after_skip = residuals(config.num_after_skip, edge)
        self.atom_update = AtomSum(config)
        self.concat_layer = EdgeEmbedding(config, edge)
        self.residual_m = residuals(config.num_concat, edge)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        h, m, basis = state.h, state.m, state.basis
        messages = self.trip_interaction.send(m, basis, state.geometry.angular, graph)  # TripletUpdate, TripletAggr
        skip = self.dense_ca(m)
        x = (skip + self.trip_interaction.receive(*messages)) * INV_SQRT_2  # with the messages of reverse edges
        m = (m + self.layers_before_skip(x)) * INV_SQRT_2
        m = self.layers_after_skip(m)  # EdgeUpdate
        h = (h + self.atom_update(m, basis.rbf_atom, graph)) * INV_SQRT_2  # EdgeAggr, NodeUpdate
        m = (m + self.residual_m(self.concat_layer(h, m, graph))) * INV_SQRT_2  # EdgeUpdate, the second
        return state._replace(h=h, m=m)


class Embedding(nn.Module):
    """Layer 0: from structure to features, and the first output."""

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.num_spherical, self.triplet_form = config.num_spherical, config.triplet_form
        radial = RADIAL_BASES[config.rbf]
        self.radial_basis = radial(config.num_radial, config.cutoff, config.envelope_exponent)
        self.radial_basis_cbf = radial(config.num_radial, config.cutoff, config.envelope_exponent)
        self.mlp_rbf = Dense(config.num_radial, config.emb_size_rbf)
        self.mlp_cbf = nn.Parameter(
            he_orthogonal_(torch.empty(config.num_spherical, config.num_radial, config.emb_size_cbf))
        )
        self.mlp_rbf_atom = Dense(config.num_radial, config.emb_size_rbf)
        self.mlp_rbf_out = Dense(config.num_radial, config.emb_size_rbf)
        self.atom_embedding = nn.Parameter(torch.empty(config.num_elements, config.emb_size_atom))
        if not self.atom_embedding.is_meta:
            nn.init.uniform_(self.atom_embedding, -(3**0.5), 3**0.5)
        self.edge_embedding = EdgeEmbedding(config, config.num_radial)
        self.output = OutputBlock(config)

    def forward(self, graph: ExtendedGraph) -> State:
        geometry = self.geometry(graph)
        rbf = self.radial_basis(geometry.distance)
        rbf_cbf = self.radial_basis_cbf(geometry.distance).to(self.mlp_cbf.dtype)
        spherical, radial, inner = self.mlp_cbf.shape
        cbf = rbf_cbf @ self.mlp_cbf.permute(1, 2, 0).reshape(radial, inner * spherical)
        basis = EdgeBasis(
            rbf=self.mlp_rbf(rbf),
            cbf=cbf.view(-1, inner, spherical),
            rbf_atom=self.mlp_rbf_atom(rbf),
            rbf_out=self.mlp_rbf_out(rbf),
        )
        h = self.atom_embedding.index_select(0, graph.atomic_numbers - 1)
        state = State(
            h=h,
            m=self.edge_embedding(h, rbf, graph),
            energy=rbf.new_zeros(graph.num_atoms, 1),
            force=None if self.output.force is None else rbf.new_zeros(graph.num_edges, 1),
            basis=basis,
            geometry=geometry,
        )
        return self.output(state, graph)

    def geometry(self, graph: ExtendedGraph) -> Geometry:
        """Distances, directions and angular factors, in the precision of the positions."""
        at_target = graph.positions.index_select(0, graph.target)
        vector = at_target - graph.partition.gather_sources(graph.positions).wait() - graph.shift
        distance = torch.linalg.vector_norm(vector, dim=-1)
        direction = vector / distance[:, None]
        return Geometry(
            distance, direction, angular_basis(direction, graph.buckets, self.num_spherical, self.triplet_form)
        )


class Block(nn.Module):
    """Layers 1..num_blocks: an interaction and an output."""

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.interaction = InteractionBlock(config)
        self.output = OutputBlock(config)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        return self.output(self.interaction(state, graph), graph)


class Readout(nn.Module):
    """Last layer: energies of systems and, where they are direct, forces on atoms."""

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.extensive = config.extensive
        self.segment_sum = segment_sum_backend(config.segment_sum, conservative=config.forces == "conservative")

    def forward(self, state: State, graph: ExtendedGraph) -> Prediction:
        # NodeAggr; u is the energy, so GlobalUpdate is nothing more
        energy = graph.partition.total(self.atom_energies(state, graph)).squeeze(-1)
        if state.force is None:
            return Prediction(energy, None)
        forces = graph.partition.aggregate(state.force * state.geometry.direction, self.segment_sum)  # EdgeAggr
        return Prediction(energy, forces)

    def atom_energies(self, state: State, graph: ExtendedGraph) -> Tensor:
        """(V, 1) what each atom adds to the energy of its system."""
        if self.extensive:
            return state.energy
        atoms = graph.partition.total(torch.ones_like(state.energy))
        return state.energy / atoms.index_select(0, graph.system)


class GemNetT(EnergyModel):
    """GemNet-T: `model(graph) -> Prediction`, with the kind of forces that its configuration says."""

    State = State

    def __init__(self, config: GemNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = Blocks(Block(config) for _ in range(config.num_blocks))
        self.readout = Readout(config)
