"""The sum over triplets, without triplets.

For every edge c -> a and each other edge b -> a into the same atom,

    S[c, l, f] = sum over b != c of  y_l(angle between c and b)  x[b, f],        y_l = Y_l0.

Written out, that gathers a (triplets, F) tensor: 48 times the edge features at OC20's density. Two exact forms
need none:

* `block`: around an atom of degree d, y is a dense (d, d) matrix with zero diagonal, and S its product with rows of x.
* `harmonic`: by the addition theorem y_l(u.v) = sqrt(4 pi / (2l+1)) sum_m Y_lm(u) Y_lm(v), the rows of x are first
  summed into the atom, A[a, lm, f] = sum_b Y_lm(b) x[b, f], and S[c, l, f] is read back with the same harmonics; the
  term b = c is taken off again. Cost is linear in the number of edges at any density.

Which one is faster depends on d alone; see `HARMONIC_ABOVE`.

DimeNet++ sums over paths k -> j -> i instead: over the edges b into the atom that an edge c *leaves*, except c's own
reverse. There only the harmonic form is needed (`path_sum`).

E edges, S num_spherical, F features; n atoms of degree <= d in a bucket (`EdgeBuckets`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from egnscale.models.graph import EdgeBuckets, ExtendedGraph
from egnscale.models.harmonics import circular_harmonics, circular_norm, spherical_harmonics
from egnscale.models.remake import cheap

TripletForm = Literal["auto", "harmonic", "block"]

#: Bucket width above which `auto` takes the harmonic form: where the two cost the same on a CPU in fp32, between
#: narrow and wide models (`benchmarks/triplets.py`).
HARMONIC_ABOVE = 56


#: What triplet sums need of directions, computed once for all blocks of a model: a tensor for each bucket.
#: Block form: (n, d, S, d), y_l of each pair. Harmonic form: (n, S * S, d), Y_lm of each edge.
AngularBasis = tuple[Tensor, ...]


def angular_basis(
    direction: Tensor, buckets: EdgeBuckets, num_spherical: int, form: TripletForm = "auto"
) -> AngularBasis:
    """Angular factors of a graph. `direction` is (E, 3), the unit vector of each edge."""
    angular = []
    for unit, mask in zip(buckets.split(buckets.pad(direction)), buckets.split(buckets.mask), strict=True):
        n, d, _ = unit.shape
        # Zero weight for padding, in rows and in columns (EdgeBuckets says why both).
        real = mask[..., None].to(unit.dtype)
        if form == "harmonic" or (form == "auto" and d > HARMONIC_ABOVE):
            harmonics = spherical_harmonics(unit.reshape(n * d, 3), num_spherical).view(n, d, num_spherical**2)
            angular.append((harmonics * real).transpose(1, 2))
        else:
            other = real * real.transpose(1, 2) * (1 - torch.eye(d, dtype=unit.dtype, device=unit.device))
            y = circular_harmonics(unit @ unit.transpose(1, 2), num_spherical) * other[..., None]
            angular.append(y.transpose(2, 3).contiguous())
    return tuple(angular)


def triplet_sum(x: Tensor, angular: AngularBasis, buckets: EdgeBuckets) -> Tensor:
    """S[c, l, f] as defined at the top. (E, F) -> (E, S, F)."""
    return cheap(partial(_triplet_sum, buckets), x, *angular)


def _triplet_sum(buckets: EdgeBuckets, x: Tensor, *angular: Tensor) -> Tensor:
    sums = []
    for rows, factor in zip(buckets.split(buckets.pad(x)), angular, strict=True):
        n, d, features = rows.shape
        if factor.dim() == 4:
            y = (factor.to(x.dtype).flatten(1, 2) @ rows).view(n, d, factor.shape[2], features)
        else:
            y = _harmonic_sum(rows.to(factor.dtype), factor).to(x.dtype)
        sums.append(y.flatten(0, 1))
    return buckets.unpad(torch.cat(sums))


def _harmonic_sum(rows: Tensor, harmonics: Tensor) -> Tensor:
    """(n, d, F), (n, S*S, d) -> (n, d, S, F): into the atom, back out degree by degree, less the edge's own part."""
    at_atom = harmonics @ rows
    parts = []
    for l in range(math.isqrt(harmonics.shape[1])):
        of_degree, own = slice(l * l, (l + 1) ** 2), circular_norm(l)
        read_back = harmonics[:, of_degree].transpose(1, 2)
        parts.append(torch.baddbmm(rows, read_back, at_atom[:, of_degree], beta=-own, alpha=1 / own))
    return torch.stack(parts, dim=2)


def bilinear(sums: Tensor, radial: Tensor, weight: Tensor) -> Tensor:
    """out[e, o] = sum over i, l, f of weight[f, i, o] radial[e, i, l] sums[e, l, f], as one large product.

    Args:
        sums: (E, S, F).
        radial: (E, I, S), the edge's own radial features.
        weight: (F, I, O).

    Returns:
        (E, O)
    """
    features, inner, out = weight.shape
    mixed = cheap(torch.matmul, radial.to(sums.dtype), sums)  # (E, I, F)
    return mixed.reshape(-1, inner * features) @ weight.transpose(0, 1).reshape(inner * features, out)


class PathHarmonics(NamedTuple):
    """Y_lm of edges by both of their atoms, a tensor for each bucket; zero in padding rows."""

    entering: tuple[Tensor, ...]  #: (n, S * S, d)
    leaving: tuple[Tensor, ...]  #: (n, d, S * S)


def path_harmonics(direction: Tensor, graph: ExtendedGraph, num_spherical: int) -> PathHarmonics:
    """Angular factors of paths. `direction` is (E, 3), the unit vector of each edge from source to target."""
    assert graph.leaving is not None, "the graph was built without leaving edges"
    both = torch.cat([direction, graph.partition.to_sources(direction).wait()])
    entering, leaving = spherical_harmonics(both, num_spherical).split([graph.num_edges, len(graph.leaving.order)])

    def split(harmonics: Tensor, buckets: EdgeBuckets) -> list[Tensor]:
        return buckets.split(buckets.pad(harmonics) * buckets.mask[:, None])

    return PathHarmonics(
        tuple(y.transpose(1, 2) for y in split(entering, graph.buckets)),
        tuple(split(leaving, graph.leaving.buckets)),
    )


def path_sum(x: Tensor, angular: PathHarmonics, graph: ExtendedGraph) -> Tensor:
    """S[c, f] = sum over l, and over edges b into the source of c but its reverse, of y_l(angle) x[l, b, f].

    The angle is that between the directions of b and c: zero where the path goes straight on.

    Args:
        x: (S, E, F) features of entering edges, for each degree.

    Returns:
        (L, F), for leaving edges.
    """
    assert graph.leaving is not None, "the graph was built without leaving edges"
    norms = [circular_norm(l) for l in range(len(x))]
    at_atoms = []
    widths = [2 * l + 1 for l in range(len(x))]
    padded = [graph.buckets.split(graph.buckets.pad(of_degree)) for of_degree in x.unbind(0)]
    for bucket, harmonics in enumerate(angular.entering):
        rows = zip(harmonics.split(widths, dim=1), padded, norms, strict=True)
        at_atoms.append(torch.cat([(y @ of_degree[bucket].to(y.dtype)) / norm for y, of_degree, norm in rows], dim=1))
    summed = torch.cat(at_atoms)
    whole = summed.new_zeros(graph.num_atoms, *summed.shape[1:]).index_copy(0, graph.buckets.atoms, summed)
    leaving = graph.leaving.buckets
    sizes = [n for n, _ in leaving.shapes]
    atoms = whole.index_select(0, leaving.atoms).split(sizes)
    sums = torch.cat([(y @ atom).flatten(0, 1) for y, atom in zip(angular.leaving, atoms, strict=True)])
    # The reverse edge lies at 180 degrees, where P_l is (-1)^l.
    at_reverse = x.new_tensor([norm * (-1) ** l for l, norm in enumerate(norms)])
    own = torch.tensordot(at_reverse, x, dims=1)
    return leaving.unpad(sums) - graph.leaving.turned(own)


__all__ = [
    "AngularBasis",
    "PathHarmonics",
    "TripletForm",
    "angular_basis",
    "bilinear",
    "path_harmonics",
    "path_sum",
    "triplet_sum",
]
