"""DimeNet++, an energy model with angles, as an Extended Graph Network.

What is notable:
* A triplet k -> j -> i joins an edge into atom j with an edge out of it; k = i through the same image is left out.
  The sum over triplets goes through the atom j by the addition theorem of the spherical harmonics (`path_sum`): no
  triplet is listed, nothing of a triplet's size is stored, and the cost is linear in edges. The published form gathers
  a (triplets, int_emb_size) tensor in every block.
* No angle is ever computed. Harmonics are polynomials of unit vectors, so every derivative exists at 0 and 180 degrees
  too, and forces and their gradients need nothing but ordinary double backward.
* Edges are not symmetrised: an edge may be without its reverse.
* Rows of edges are moved once in a block, from the atom that they leave to the one that they enter (`to_targets`).

Source: Gasteiger, Groß, Günnemann (ICLR 2020) and Gasteiger et al. (2020), "DimeNet++"; the OC20 variant of Sriram et
al. (ICLR 2022). Layers carry their published names.
Shapes: V atoms, E edges that enter them, L edges that leave them, B systems; H hidden_channels, I int_emb_size, C
basis_emb_size, O out_emb_channels, S num_spherical, R num_radial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from egnscale.models.basis import BesselBasis, SineBasis
from egnscale.models.forces import EnergyModel, Forces, Prediction
from egnscale.models.graph import ExtendedGraph, Pending
from egnscale.models.layered import Blocks
from egnscale.models.layers import BiasedResidual, Linear, silu
from egnscale.models.remake import cheap
from egnscale.models.segments import segment_sum_backend
from egnscale.models.triplets import PathHarmonics, path_harmonics, path_sum

Angles = Literal["exact", "detached"]


@dataclass(frozen=True, kw_only=True)
class DimeNetConfig:
    """Hyperparameters, under their published names."""

    name: ClassVar[str] = "dimenetplusplus"
    gathers_at_source: ClassVar[bool] = True

    num_blocks: int
    hidden_channels: int
    out_emb_channels: int
    int_emb_size: int = 64
    basis_emb_size: int = 8
    num_spherical: int = 7
    num_radial: int = 6
    num_before_skip: int = 1
    num_after_skip: int = 2
    num_output_layers: int = 3
    num_elements: int = 94  #: atomic numbers 1..num_elements can be embedded
    cutoff: float = 6.0  #: A
    max_neighbors: int | None = 50
    symmetrize: str = "none"
    envelope_exponent: int = 5
    forces: Forces = "conservative"
    #: detached: forces take angles as constants, as the public OC20 code does; they are not the energy's gradient then.
    angles: Angles = "exact"
    segment_sum: str = "native"  #: or "torch_scatter", for models without forces

    def __post_init__(self) -> None:
        if self.forces not in ("conservative", "none"):
            raise ValueError(f"forces is {self.forces!r}; DimeNet++ is an energy model: choose conservative or none")
        if self.angles not in ("exact", "detached"):
            raise ValueError(f"angles is {self.angles!r}; choose exact or detached")
        if self.symmetrize not in ("none", "union", "oc20"):
            raise ValueError(f"symmetrize is {self.symmetrize!r}; choose none, union or oc20")


class Geometry(NamedTuple):
    """What follows from positions alone."""

    distance: Tensor  #: (E,) A
    radial: Tensor  #: (E, S, R) radial part of the triplets' basis
    angular: PathHarmonics


class State(NamedTuple):
    """What changes from layer to layer."""

    x: Tensor  #: (E, H) messages
    energy: Tensor  #: (V, 1) energy of each atom so far, normalised
    rbf: Tensor  #: (E, R) radial features of edges, whose frequencies are learnt; shared by all blocks
    geometry: Geometry


class OutputBlock(nn.Module):
    """Adds one contribution to the energies of atoms: messages, weighted by distance, summed and transformed."""

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        hidden, out = config.hidden_channels, config.out_emb_channels
        self.segment_sum = segment_sum_backend(config.segment_sum, conservative=config.forces == "conservative")
        self.lin_rbf = Linear(config.num_radial, hidden, bias=False)
        self.lin_up = Linear(hidden, out)
        assert self.lin_up.bias is not None
        nn.init.uniform_(self.lin_up.bias, -(hidden**-0.5), hidden**-0.5)
        self.lins = nn.ModuleList(Linear(out, out, activation=True) for _ in range(config.num_output_layers))
        self.lin = Linear(out, 1, bias=False)
        nn.init.zeros_(self.lin.weight)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        h = graph.partition.aggregate(self.lin_rbf(state.rbf) * state.x, self.segment_sum)  # EdgeAggr
        h = self.lin_up(h)  # NodeUpdate
        for lin in self.lins:
            h = lin(h)
        return state._replace(energy=state.energy + self.lin(h).to(state.energy.dtype))


class InteractionBlock(nn.Module):
    """One round of message passing: edges from the edges that lead to them."""

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        hidden, inner, basis = config.hidden_channels, config.int_emb_size, config.basis_emb_size
        self.lin_rbf1 = Linear(config.num_radial, basis, bias=False)
        self.lin_rbf2 = Linear(basis, hidden, bias=False)
        self.lin_sbf1 = Linear(config.num_spherical * config.num_radial, basis, bias=False)
        self.lin_sbf2 = Linear(basis, inner, bias=False)
        self.lin_kj = Linear(hidden, hidden, activation=True)
        self.lin_ji = Linear(hidden, hidden, activation=True)
        self.lin_down = Linear(hidden, inner, bias=False, activation=True)
        self.lin_up = Linear(inner, hidden, bias=False, activation=True)
        self.layers_before_skip = nn.Sequential(*(BiasedResidual(hidden) for _ in range(config.num_before_skip)))
        self.lin = Linear(hidden, hidden, activation=True)
        self.layers_after_skip = nn.Sequential(*(BiasedResidual(hidden) for _ in range(config.num_after_skip)))

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        x = state.x
        triplets = self.send(x, state.rbf, state.geometry, graph)
        x_ji = self.lin_ji(x)
        h = x_ji + self.lin_up(triplets.wait())  # EdgeUpdate
        h = self.lin(self.layers_before_skip(h)) + x
        return state._replace(x=self.layers_after_skip(h))

    def send(self, x: Tensor, rbf: Tensor, geometry: Geometry, graph: ExtendedGraph) -> Pending:
        """TripletUpdate and TripletAggr: (E, H) -> (E, I), which may be under way."""
        x_kj = cheap(torch.mul, self.lin_kj(x), self.lin_rbf2(self.lin_rbf1(rbf)))
        x_kj = self.lin_down(x_kj)
        # Published: x_kj times lin_sbf2(lin_sbf1(radial * angular)) of each triplet. Both being linear, what multiplies
        # the angular part of degree l is known for each edge.
        sbf1 = self.lin_sbf1.weight.view(-1, *geometry.radial.shape[1:])  # (C, S, R)
        radial = geometry.radial.to(sbf1.dtype).transpose(0, 1) @ sbf1.permute(1, 2, 0)  # (S, E, C)
        weighted = cheap(torch.matmul, radial, self.lin_sbf2.weight.t()) * x_kj  # (S, E, I)
        return graph.partition.to_targets(path_sum(weighted, geometry.angular, graph).to(x.dtype))


class Embedding(nn.Module):
    """Layer 0: from structure to messages, and the first output."""

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        hidden = config.hidden_channels
        self.angles, self.num_spherical = config.angles, config.num_spherical
        self.radial_basis = SineBasis(config.num_radial, config.cutoff, config.envelope_exponent)
        self.bessel_basis = BesselBasis(
            config.num_spherical, config.num_radial, config.cutoff, config.envelope_exponent
        )
        # Row Z is element Z; there is no element 0.
        self.atom_embedding = nn.Parameter(torch.empty(config.num_elements + 1, hidden))
        nn.init.uniform_(self.atom_embedding, -(3**0.5), 3**0.5)
        self.lin_rbf = Linear(config.num_radial, hidden, activation=True, glorot=False)
        self.lin = Linear(3 * hidden, hidden, activation=True, glorot=False)
        self.output = OutputBlock(config)

    def forward(self, graph: ExtendedGraph) -> State:
        geometry = self.geometry(graph)
        rbf = self.radial_basis(geometry.distance)
        x = self.embed_edges(self.lin_rbf(rbf), graph)
        return self.output(State(x, rbf.new_zeros(graph.num_atoms, 1), rbf, geometry), graph)

    def embed_edges(self, rbf: Tensor, graph: ExtendedGraph) -> Tensor:
        """act([h_target, h_source, rbf] W^T + b), with the products of atoms made for atoms. (E, H)."""
        of_target, of_source, of_edge = self.lin.weight.chunk(3, dim=1)
        h = self.atom_embedding.index_select(0, graph.atomic_numbers)
        sources = graph.partition.gather_sources(h, of_source)
        targets = (h @ of_target.t()).index_select(0, graph.target)
        assert self.lin.bias is not None
        edges = torch.addmm(self.lin.bias, rbf, of_edge.t())
        return silu(sources.wait() + targets + edges)

    def geometry(self, graph: ExtendedGraph) -> Geometry:
        """Distances, radial and angular factors, in the precision of the positions."""
        vector = graph.positions.index_select(0, graph.target) - graph.partition.gather_sources(graph.positions).wait()
        vector = vector - graph.shift
        distance = torch.linalg.vector_norm(vector, dim=-1)
        direction = vector / distance[:, None]
        if self.angles == "detached":
            direction = direction.detach()
        angular = path_harmonics(direction, graph, self.num_spherical)
        return Geometry(distance, self.bessel_basis(distance), angular)


class Block(nn.Module):
    """Layers 1..num_blocks: an interaction and an output."""

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        self.interaction = InteractionBlock(config)
        self.output = OutputBlock(config)

    def forward(self, state: State, graph: ExtendedGraph) -> State:
        return self.output(self.interaction(state, graph), graph)


class Readout(nn.Module):
    """Last layer: energies of systems."""

    def forward(self, state: State, graph: ExtendedGraph) -> Prediction:
        return Prediction(graph.partition.total(state.energy).squeeze(-1), None)  # NodeAggr, GlobalUpdate

    def atom_energies(self, state: State, graph: ExtendedGraph) -> Tensor:
        """(V, 1) what each atom adds to the energy of its system."""
        return state.energy


class DimeNetPlusPlus(EnergyModel):
    """DimeNet++: `model(graph) -> Prediction`, for graphs that list their leaving edges."""

    State = State

    def __init__(self, config: DimeNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = Blocks(Block(config) for _ in range(config.num_blocks))
        self.readout = Readout()
