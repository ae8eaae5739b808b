"""Harmonics against scipy, and the identities that the triplet sums rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre, lpmv
from torch import Tensor

from egnscale.models.harmonics import circular_harmonics, spherical_harmonics

S = 7


def directions(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("num_spherical", [1, 2, S, 12])
def test_circular_harmonics_are_normalised_legendre_polynomials(num_spherical: int) -> None:
    cosine = torch.linspace(-1, 1, 41, dtype=torch.float64)
    norms = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l in range(num_spherical)]
    expected = np.stack([norm * eval_legendre(l, cosine.numpy()) for l, norm in enumerate(norms)], axis=1)
    torch.testing.assert_close(circular_harmonics(cosine, num_spherical), torch.from_numpy(expected))


def test_spherical_harmonics_are_those_of_scipy() -> None:
    u = directions(20)
    x, y, z = u.numpy().T
    phi = np.arctan2(y, x)
    columns = []
    for l in range(S):
        for m in range(-l, l + 1):
            k = abs(m)
            norm = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - k) / math.factorial(l + k))
            wave = 1 if m == 0 else math.sqrt(2) * (np.cos(k * phi) if m > 0 else np.sin(k * phi))
            columns.append(norm * (-1) ** k * lpmv(k, l, z) * wave)  # scipy's includes the Condon-Shortley phase
    torch.testing.assert_close(spherical_harmonics(u, S), torch.from_numpy(np.stack(columns, axis=1)))


def test_spherical_harmonics_are_orthonormal() -> None:
    """By quadrature that is exact to degree 2 (S - 1): Gauss-Legendre in z, equal steps around it."""
    z, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(S))
    phi = torch.arange(2 * S, dtype=torch.float64) * (math.pi / S)
    z, phi, weight = z[:, None].expand(S, 2 * S), phi.expand(S, 2 * S), weight[:, None].expand(S, 2 * S)
    radius = (1 - z * z).sqrt()
    u = torch.stack([radius * phi.cos(), radius * phi.sin(), z], dim=-1).view(-1, 3)
    harmonics = spherical_harmonics(u, S)
    overlap = harmonics.t() @ (harmonics * (weight.reshape(-1, 1) * math.pi / S))
    torch.testing.assert_close(overlap, torch.eye(S * S, dtype=torch.float64), atol=1e-12, rtol=0)


def test_addition_theorem() -> None:
    u, v = directions(30), directions(30)
    products = spherical_harmonics(u, S) * spherical_harmonics(v, S)
    legendre = circular_harmonics((u * v).sum(1), S)
    for l in range(S):
        summed = products[:, l * l : (l + 1) ** 2].sum(1) * math.sqrt(4 * math.pi / (2 * l + 1))
        torch.testing.assert_close(summed, legendre[:, l])


@pytest.mark.parametrize("pole", [1.0, -1.0])
def test_derivatives_exist_where_angles_have_none(pole: float) -> None:
    u = torch.tensor([[0, 0, pole]], dtype=torch.float64, requires_grad=True)
    cosine = torch.tensor([pole], dtype=torch.float64, requires_grad=True)
    for function, x in ((spherical_harmonics, u), (circular_harmonics, cosine)):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, 4), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, 4), x)
