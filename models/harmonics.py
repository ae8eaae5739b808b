"""Legendre polynomials and real spherical harmonics, as polynomials of unit vectors.

Polynomials are smooth at every direction, so nothing here is singular at angles of 0 or 180 degrees, and every
derivative exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def circular_norm(degree: int) -> float:
    """sqrt((2l+1) / 4 pi), so that y_l(z) = circular_norm(l) P_l(z) is the spherical harmonic Y_l0."""
    return math.sqrt((2 * degree + 1) / (4 * math.pi))


def circular_harmonics(cosine: Tensor, num_spherical: int) -> Tensor:
    """Y_l0 of an angle, l = 0..num_spherical-1, from its cosine. (...) -> (..., num_spherical)."""
    legendre = [torch.ones_like(cosine), cosine]
    for degree in range(2, num_spherical):
        k = 1 / degree
        legendre.append((2 - k) * cosine * legendre[-1] - (1 - k) * legendre[-2])
    return torch.stack([circular_norm(l) * p for l, p in enumerate(legendre[:num_spherical])], dim=-1)


def spherical_harmonics(direction: Tensor, num_spherical: int) -> Tensor:
    """Real orthonormal Y_lm for l = 0..num_spherical-1, column l*l + l + m.

    Args:
        direction: (E, 3) unit vectors.

    Returns:
        (E, num_spherical^2). The addition theorem holds: sum_m Y_lm(u) Y_lm(v) = (2l+1)/(4 pi) P_l(u.v).
    """
    x, y, z = direction.unbind(-1)
    columns: dict[tuple[int, int], Tensor] = {}
    cosine, sine = torch.ones_like(x), torch.zeros_like(x)  # Re and Im of (x + iy)^m
    double_factorial = 1.0  # (2m-1)!!
    for m in range(num_spherical):
        if m:
            cosine, sine = x * cosine - y * sine, x * sine + y * cosine
            double_factorial *= 2 * m - 1
        before, legendre = torch.zeros_like(z), torch.full_like(z, double_factorial)
        for l in range(m, num_spherical):
            if l > m:
                before, legendre = legendre, ((2 * l - 1) * z * legendre - (l + m - 1) * before) / (l - m)
            norm = circular_norm(l) * math.sqrt(math.factorial(l - m) / math.factorial(l + m))
            if m == 0:
                columns[l, 0] = norm * legendre
            else:
                columns[l, m] = (math.sqrt(2) * norm) * legendre * cosine
                columns[l, -m] = (math.sqrt(2) * norm) * legendre * sine
    return torch.stack([columns[l, m] for l in range(num_spherical) for m in range(-l, l + 1)], dim=-1)
