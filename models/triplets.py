"""The sum over triplets, without triplets.

For every edge c -> a and each other edge b -> a into the same atom,

    S[c, l, f] = sum over b != c of  y_l(angle between c and b)  x[b, f],        y_l = Y_l0.

Written out, that gathers a (triplets, F) tensor: 48 times the edge features at OC20's density. Two exact forms
need none:

* `block`: around an atom of degree d, y is a dense (d, d) matrix with zero diagonal, and S its product with rows of x.
* `harmonic`: by the addition theorem y_l(u.v) = sqrt(4 pi / (2l+1)) sum_m Y_lm(u) Y_lm(v), the rows of x are first
  summed into the atom, A[a, lm, f] = sum_b Y_lm(b) x[b, f], and S[c, l, f] is read back with the same harmonics; the
  term b = c is taken off again. Cost is linear in the number of edges at any density.

Both are a product of two per-atom matrices, so they share their code: `block` multiplies (d l, d) by x, `harmonic`
multiplies (d l, lm) by A. Which one is faster depends on d alone; see `HARMONIC_ABOVE`.

E edges, S num_spherical, F features; n atoms of degree <= d in a bucket (`EdgeBuckets`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from egnscale.models.graph import EdgeBuckets
from egnscale.models.harmonics import circular_harmonics, circular_norm, spherical_harmonics

TripletForm = Literal["auto", "harmonic", "block"]

#: Bucket width above which `auto` takes the harmonic form.
HARMONIC_ABOVE = 64


class AngularBasis(NamedTuple):
    """Per bucket, the factors that depend on directions only. Computed once for all blocks of a model."""

    expand: tuple[Tensor, ...]  #: block: (n, d * S, d) y of each pair; harmonic: (n, d * S, S * S) read-back
    collect: tuple[Tensor, ...]  #: block: (0,); harmonic: (n, S * S, d) Y_lm of each edge
    own: Tensor  #: (S,) y_l(0), the weight of an edge in its own harmonic sum


def angular_basis(
    direction: Tensor, buckets: EdgeBuckets, num_spherical: int, form: TripletForm = "auto"
) -> AngularBasis:
    """Angular factors of a graph. `direction` is (E, 3), the unit vector of each edge."""
    expand, collect = [], []
    padded = buckets.split(buckets.pad(direction))
    for unit, mask in zip(padded, buckets.split(buckets.mask), strict=True):
        n, d, _ = unit.shape
        # Zero weight for padding, in rows and in columns (EdgeBuckets says why both).
        real = mask.to(unit.dtype)
        if form == "harmonic" or (form == "auto" and d > HARMONIC_ABOVE):
            harmonics = spherical_harmonics(unit.reshape(n * d, 3), num_spherical).view(n, d, -1) * real
            expand.append(_read_back(harmonics, num_spherical))
            collect.append(harmonics.transpose(1, 2))
        else:
            other = real * real.transpose(1, 2) * (1 - torch.eye(d, dtype=unit.dtype, device=unit.device))
            y = circular_harmonics(unit @ unit.transpose(1, 2), num_spherical) * other[..., None]
            expand.append(y.transpose(2, 3).reshape(n, d * num_spherical, d))
            collect.append(unit.new_zeros(0))
    own = torch.tensor([circular_norm(l) for l in range(num_spherical)], dtype=torch.float64).to(direction)
    return AngularBasis(tuple(expand), tuple(collect), own)


def _read_back(harmonics: Tensor, num_spherical: int) -> Tensor:
    """(n, d, S*S) -> (n, d*S, S*S): row (c, l) holds sqrt(4 pi / (2l+1)) Y_lm(c) in the columns of l, else zeros."""
    n, d, columns = harmonics.shape
    degree = torch.arange(num_spherical, device=harmonics.device)
    column_degree = torch.repeat_interleave(degree, 2 * degree + 1)
    norm = torch.tensor([1 / circular_norm(l) for l in range(num_spherical)], dtype=torch.float64).to(harmonics)
    weight = (column_degree == degree[:, None]) * norm[:, None]
    return (harmonics[:, :, None, :] * weight).reshape(n, d * num_spherical, columns)


def triplet_sum(x: Tensor, angular: AngularBasis, buckets: EdgeBuckets) -> Tensor:
    """S[c, l, f] as defined at the top. (E, F) -> (E, S, F)."""
    num_spherical = len(angular.own)
    if not buckets.shapes:
        return x.new_zeros((x.shape[0], num_spherical, x.shape[1])) + x[:, None]
    sums = []
    for rows, expand, collect in zip(buckets.split(buckets.pad(x)), angular.expand, angular.collect, strict=True):
        if collect.numel():
            y = expand @ (collect @ rows.to(collect.dtype))
            y = y.view(-1, num_spherical, x.shape[1])
            y = y - angular.own[:, None] * rows.reshape(-1, 1, x.shape[1])
        else:
            y = expand.to(rows.dtype) @ rows
        sums.append(y.reshape(-1, num_spherical * x.shape[1]).to(x.dtype))
    return buckets.unpad(torch.cat(sums)).view(-1, num_spherical, x.shape[1])


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
    mixed = radial.to(sums.dtype) @ sums  # (E, I, F)
    return mixed.reshape(-1, inner * features) @ weight.transpose(0, 1).reshape(inner * features, out)


__all__ = ["AngularBasis", "TripletForm", "angular_basis", "bilinear", "triplet_sum"]
