"""DimeNet++ as published, triplet by triplet: the oracle of `egnscale.models.DimeNetPlusPlus`.

Written straight from the formulas of the DimeNet papers and their OC20 variant, sharing parameters with a model and no
code: paths k -> j -> i are listed, each has an angle and an embedded basis, messages are gathered for each and summed,
spherical Bessel functions come from their recursion. Slow and large on purpose.

Shapes: V atoms, E edges, Q paths, B systems; H hidden_channels, I int_emb_size, C basis_emb_size, S num_spherical, R
num_radial.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numpy.polynomial import Legendre, Polynomial
from scipy.special import spherical_jn
from torch import Tensor
from torch.nn.functional import silu

from egnscale.models import DimeNetPlusPlus, ExtendedGraph, Prediction
from egnscale.models.basis import bessel_zeros


class Paths(NamedTuple):
    """All pairs of edges k -> j and j -> i, but an edge and its own reverse."""

    kj: Tensor  #: (Q,) int64
    ji: Tensor  #: (Q,) int64


def list_paths(graph: ExtendedGraph) -> Paths:
    degree = torch.bincount(graph.target, minlength=graph.num_atoms)
    first = torch.cumsum(degree, 0) - degree
    count = degree[graph.source]  # edges into the source of each edge
    ji = torch.repeat_interleave(torch.arange(graph.num_edges), count)
    number = torch.arange(len(ji)) - torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
    kj = first[graph.source[ji]] + number
    different = graph.reverse[ji] != kj
    return Paths(kj[different], ji[different])


def dimenet(
    model: DimeNetPlusPlus,
    graph: ExtendedGraph,
    *,
    angle: str = "",
    paths: Paths | None = None,
    act: Callable[[Tensor], Tensor] = silu,
) -> Prediction:
    """Energies (B,) and conservative forces (V, 3), differentiable, with the parameters of `model`.

    Args:
        angle: compute it, as "arctangent" (the public implementation) or "arccosine" (infinite slope at 0 and 180
            degrees); or only its cosine.
        paths: those of `graph`, to keep their listing out of a measurement.
        act: the SiLU, or another of its kernels.
    """
    kj, ji = paths or list_paths(graph)
    positions = graph.positions.detach().requires_grad_()
    config, embedding = model.config, model.embedding
    source, target = graph.source, graph.target

    vector = positions[target] - positions[source] - graph.shift
    distance = vector.norm(dim=1)
    of_angle = vector.detach() if config.angles == "detached" else vector
    dot = (of_angle[kj] * of_angle[ji]).sum(1)
    if angle == "arctangent":
        cosine = torch.cos(torch.atan2(torch.linalg.cross(of_angle[kj], of_angle[ji]).norm(dim=1), dot))
    else:
        lengths = of_angle.norm(dim=1)
        cosine = dot / (lengths[kj] * lengths[ji])
        if angle == "arccosine":
            cosine = torch.cos(torch.acos(cosine.clamp(-1, 1)))

    x = distance[:, None] / config.cutoff
    p = config.envelope_exponent + 1
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    envelope = (1 / x + a * x ** (p - 1) + b * x**p + c * x ** (p + 1)) * (x < 1)
    rbf = envelope * torch.sin(embedding.radial_basis.frequencies * x)
    columns = []
    for l, zeros in enumerate(bessel_zeros(config.num_spherical, config.num_radial)):
        norms = torch.as_tensor(math.sqrt(2) / abs(spherical_jn(l + 1, zeros.numpy()))).to(x)
        radial = envelope * norms * _spherical_bessel(l, zeros.to(x) * x)
        columns.append(radial[kj] * _circular_harmonic(l, cosine)[:, None])
    sbf = torch.cat(columns, dim=1)  # (Q, S * R)

    def output(layer: Any, m: Tensor) -> Tensor:
        h = torch.zeros(graph.num_atoms, m.shape[1], dtype=m.dtype, device=m.device)
        h = _linear(layer.lin_up, h.index_add(0, target, _linear(layer.lin_rbf, rbf) * m))
        for lin in layer.lins:
            h = act(_linear(lin, h))
        return _linear(layer.lin, h)

    def interaction(layer: Any, m: Tensor) -> Tensor:
        m_ji, m_kj = act(_linear(layer.lin_ji, m)), act(_linear(layer.lin_kj, m))
        m_kj = act(_linear(layer.lin_down, m_kj * _linear(layer.lin_rbf2, _linear(layer.lin_rbf1, rbf))))
        of_paths = m_kj[kj] * _linear(layer.lin_sbf2, _linear(layer.lin_sbf1, sbf))  # (Q, I)
        summed = torch.zeros_like(m_kj).index_add(0, ji, of_paths)
        h = _residuals(layer.layers_before_skip, act, m_ji + act(_linear(layer.lin_up, summed)))
        return _residuals(layer.layers_after_skip, act, act(_linear(layer.lin, h)) + m)

    h = embedding.atom_embedding[graph.atomic_numbers]
    m = act(_linear(embedding.lin, torch.cat([h[target], h[source], act(_linear(embedding.lin_rbf, rbf))], dim=1)))
    energy = output(embedding.output, m)
    for block in model.blocks:
        m = interaction(block.interaction, m)
        energy = energy + output(block.output, m)
    energies = energy.new_zeros(graph.num_systems).index_add(0, graph.system, energy[:, 0])
    (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=True, materialize_grads=True)
    return Prediction(energies, -gradient)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.t() + (0 if layer.bias is None else layer.bias)


def _residuals(layers: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for layer in layers:
        x = x + act(_linear(layer.lin2, act(_linear(layer.lin1, x))))
    return x


def _circular_harmonic(degree: int, cosine: Tensor) -> Tensor:
    """Y_l0 = sqrt((2l+1) / 4 pi) P_l, from the coefficients of P_l."""
    coefficients = Legendre.basis(degree).convert(kind=Polynomial).coef.tolist()
    legendre = sum((c * cosine**k for k, c in enumerate(coefficients) if c), torch.zeros_like(cosine))
    return math.sqrt((2 * degree + 1) / (4 * math.pi)) * legendre


def _spherical_bessel(degree: int, t: Tensor) -> Tensor:
    before, here = torch.sin(t) / t, torch.sin(t) / t**2 - torch.cos(t) / t
    if degree == 0:
        return before
    for l in range(1, degree):
        before, here = here, (2 * l + 1) / t * here - before
    return here
