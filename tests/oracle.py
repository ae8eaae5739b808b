"""GemNet-T as published, triplet by triplet: the oracle of `egnscale.models.GemNetT`.

Written straight from the formulas of the GemNet paper and its OC20 variant, sharing parameters with a model and no
code: triplets are listed, angles belong to triplets, messages are exchanged after the up-projection, layers of
concatenated features are one product. Slow and large on purpose.

Shapes: V atoms, E edges, Q triplets, B systems, S num_spherical; A, D, T, O the sizes emb_size_{atom, edge, trip,
bil_trip}; I emb_size_{rbf, cbf}; K the most triplets of one edge.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from numpy.polynomial import Legendre, Polynomial
from torch import Tensor
from torch.nn.functional import silu

from egnscale.models import ExtendedGraph, GemNetConfig, GemNetT, Prediction


class Triplets(NamedTuple):
    """All pairs of different edges b -> a and c -> a."""

    ba: Tensor  #: (Q,) int64, the edge that sends
    ca: Tensor  #: (Q,) int64, the edge that receives, ascending
    rank: Tensor  #: (Q,) int64, 0, 1, ... among the triplets of one receiving edge
    most: int  #: K


def list_triplets(graph: ExtendedGraph) -> Triplets:
    degree = torch.bincount(graph.target, minlength=graph.num_atoms)
    edges_of_atoms = torch.arange(graph.num_edges, device=degree.device).split(degree.tolist())
    none = [torch.zeros(0, 2, dtype=torch.int64, device=degree.device)]
    pairs = torch.cat([torch.cartesian_prod(edges, edges) for edges in edges_of_atoms if len(edges)] + none)
    ca, ba = pairs[pairs[:, 0] != pairs[:, 1]].unbind(1)
    count = torch.bincount(ca, minlength=graph.num_edges)
    rank = torch.arange(len(ca), device=ca.device) - (count.cumsum(0) - count)[ca]
    return Triplets(ba, ca, rank, most=int(count.max()) if len(count) else 0)


def gemnet(
    model: GemNetT, graph: ExtendedGraph, *, padded_triplets: bool = False, triplets: Triplets | None = None
) -> Prediction:
    """Energies (B,) and forces (V, 3) with the parameters of `model`.

    Args:
        padded_triplets: gather messages into a zero-padded (E, K, T) tensor and make the bilinear layer's (T, E, O)
            product, as the public implementation does; otherwise sum triplet by triplet.
        triplets: those of `graph`, to keep their listing out of a measurement.
    """
    ba, ca, rank, most = triplets or list_triplets(graph)
    config, embedding = model.config, model.embedding
    source, target, edges = graph.source, graph.target, graph.num_edges

    positions = graph.positions.detach().requires_grad_(config.forces == "conservative")
    vector = positions[target] - (positions[source] + graph.shift)
    distance = vector.norm(dim=1)
    direction = vector / distance[:, None]
    cosine = (direction[ca] * direction[ba]).sum(1).clamp(-1, 1)
    y = torch.stack([_circular_harmonic(l, cosine) for l in range(config.num_spherical)], dim=1)  # (Q, S)
    if padded_triplets:
        y = y.new_zeros(edges, most, config.num_spherical).index_put((ca, rank), y)

    def sum_of_triplets(x: Tensor) -> Tensor:
        """(E, T) -> (E, S, T)."""
        if padded_triplets:
            return y.transpose(1, 2) @ x.new_zeros(edges, y.shape[1], x.shape[1]).index_put((ca, rank), x[ba])
        each = [torch.zeros_like(x).index_add(0, ca, y[:, l, None] * x[ba]) for l in range(config.num_spherical)]
        return torch.stack(each, dim=1)

    def bilinear(x: Tensor, weight: Tensor) -> Tensor:
        """(E, T), (T, I, O) -> (E, O)."""
        mixed = cbf @ sum_of_triplets(x)  # (E, I, T)
        if padded_triplets:
            return (mixed.permute(2, 0, 1) @ weight).sum(0)
        return torch.einsum("eit,tio->eo", mixed, weight)

    def triplet_interaction(layer: Any, m: Tensor) -> Tensor:
        x = _act(_linear(layer.dense_ba, m))
        x = _scale(layer.scale_rbf, x * _linear(layer.mlp_rbf, rbf_triplet))
        x = _act(_linear(layer.down_projection, x))
        x = _scale(layer.scale_cbf_sum, bilinear(x, layer.mlp_cbf))
        return (
            _act(_linear(layer.up_projection_ca, x)) + _act(_linear(layer.up_projection_ac, x))[graph.reverse]
        ) / _R2

    def atom_sum(layer: Any, m: Tensor, rbf: Tensor) -> Tensor:
        x = m * _linear(layer.dense_rbf, rbf)
        x = _scale(layer.scale_sum, x.new_zeros(graph.num_atoms, x.shape[1]).index_add(0, target, x))
        return _residuals(layer.layers[1:], _act(_linear(layer.layers[0], x)))

    def edge_embedding(layer: Any, h: Tensor, m: Tensor) -> Tensor:
        return _act(_linear(layer.dense, torch.cat([h[source], h[target], m], dim=1)))

    def output(layer: Any, m: Tensor) -> tuple[Tensor, Tensor]:
        energy = _linear(layer.out_energy, atom_sum(layer.atom_sum, m, rbf_out))
        if layer.force is None:
            return energy, m.new_zeros(edges, 1)
        x = _residuals(layer.force.layers[1:], _act(_linear(layer.force.layers[0], m)))
        x = _scale(layer.force.scale_had, x * _linear(layer.force.dense_rbf, rbf_out))
        return energy, _linear(layer.force.out, x)

    def interaction(layer: Any, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        x = (_act(_linear(layer.dense_ca, m)) + triplet_interaction(layer.trip_interaction, m)) / _R2
        m = (m + _residuals(layer.layers_before_skip, x)) / _R2
        m = _residuals(layer.layers_after_skip, m)
        h = (h + atom_sum(layer.atom_update, m, rbf_atom)) / _R2
        x = _residuals(layer.residual_m, edge_embedding(layer.concat_layer, h, m))
        return h, (m + x) / _R2

    rbf = _radial_basis(embedding.radial_basis, config, distance)
    rbf_triplet, rbf_atom = _linear(embedding.mlp_rbf, rbf), _linear(embedding.mlp_rbf_atom, rbf)
    rbf_out = _linear(embedding.mlp_rbf_out, rbf)
    rbf_cbf = _radial_basis(embedding.radial_basis_cbf, config, distance)
    cbf = torch.einsum("er,sri->eis", rbf_cbf, embedding.mlp_cbf)

    h = embedding.atom_embedding[graph.atomic_numbers - 1]
    m = edge_embedding(embedding.edge_embedding, h, rbf)
    energy, force = output(embedding.output, m)
    for block in model.blocks:
        h, m = interaction(block.interaction, h, m)
        more_energy, more_force = output(block.output, m)
        energy, force = energy + more_energy, force + more_force

    energies = energy.new_zeros(graph.num_systems).index_add(0, graph.system, energy[:, 0])
    if not config.extensive:
        energies = energies / torch.bincount(graph.system, minlength=graph.num_systems)
    if config.forces == "conservative":
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True, materialize_grads=True)
        return Prediction(energies, -gradient)
    return Prediction(energies, torch.zeros_like(graph.positions).index_add(0, target, force * direction))


_R2 = math.sqrt(2)


def _act(x: Tensor) -> Tensor:
    return silu(x) / 0.6


def _linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.t()


def _residuals(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        first, second = layer.layers
        x = (x + _act(_linear(second, _act(_linear(first, x))))) / _R2
    return x


def _scale(layer: Any, x: Tensor) -> Tensor:
    return torch.where(layer.scale_factor == 0, x, x * layer.scale_factor)


def _circular_harmonic(degree: int, cosine: Tensor) -> Tensor:
    """Y_l0 = sqrt((2l+1) / 4 pi) P_l, from the coefficients of P_l."""
    coefficients = Legendre.basis(degree).convert(kind=Polynomial).coef.tolist()
    legendre = sum((c * cosine**k for k, c in enumerate(coefficients) if c), torch.zeros_like(cosine))
    return math.sqrt((2 * degree + 1) / (4 * math.pi)) * legendre


def _radial_basis(layer: Any, config: GemNetConfig, distance: Tensor) -> Tensor:
    x = distance[:, None] / config.cutoff
    p = config.envelope_exponent
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    envelope = (1 + a * x**p + b * x ** (p + 1) + c * x ** (p + 2)) * (x < 1)
    if config.rbf == "gaussian":
        return envelope * torch.exp(layer.coefficient * (x - layer.centers.to(x)) ** 2)
    return envelope * math.sqrt(2 / config.cutoff**3) / x * torch.sin(layer.frequencies * x)
