"""Radial bases of edges.

GemNet's: an envelope times gaussians or spherical Bessel functions. DimeNet's: another envelope, which goes as 1 / x,
times sines, and times the spherical Bessel functions of every degree.

Parameter-free parts compute in the precision of the distances.
Source: GemNet (Gasteiger et al., NeurIPS 2021), appendix; DimeNet (Gasteiger et al., ICLR 2020), equations 6 to 8.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def polynomial_envelope(x: Tensor, exponent: int = 5) -> Tensor:
    """u(x) = 1 + a x^p + b x^(p+1) + c x^(p+2) for x < 1, else 0; u, u' and u'' vanish at x = 1.

    Args:
        x: distance / cutoff, any shape.
        exponent: p.
    """
    p = float(exponent)
    a, b, c = -(p + 1) * (p + 2) / 2, p * (p + 2), -p * (p + 1) / 2
    return torch.where(x < 1, 1 + x**exponent * (a + x * (b + x * c)), torch.zeros_like(x))


class GaussianBasis(nn.Module):
    """(E,) -> (E, num_radial): u(x) exp(-(x - k delta)^2 / (2 delta^2)), delta = 1 / (num_radial - 1)."""

    def __init__(self, num_radial: int, cutoff: float, envelope_exponent: int = 5) -> None:
        super().__init__()
        self.cutoff, self.envelope_exponent = cutoff, envelope_exponent
        #: The public implementation rounds these two to float32; set them to reproduce that to the last digit.
        #: `centers` is no buffer: a buffer would be rounded when the model is converted to bf16.
        self.coefficient = -0.5 * (num_radial - 1) ** 2
        self.centers = torch.linspace(0, 1, num_radial, dtype=torch.float64, device="cpu")

    def forward(self, distance: Tensor) -> Tensor:
        x = distance / self.cutoff
        if self.centers.device != x.device:
            self.centers = self.centers.to(x.device)
        gaussians = torch.exp(self.coefficient * (x[:, None] - self.centers.to(x.dtype)) ** 2)
        return polynomial_envelope(x, self.envelope_exponent)[:, None] * gaussians


def initial_frequencies(num_radial: int) -> nn.Parameter:
    """(num_radial,) k pi, k = 1, 2, ...: trainable frequencies of waves that vanish at x = 1."""
    return nn.Parameter(math.pi * torch.arange(1, num_radial + 1, dtype=torch.get_default_dtype()))


class SphericalBesselBasis(nn.Module):
    """u(x) sqrt(2 / cutoff^3) sin(w_k x) / x with trainable w_k, initially k pi. (E,) -> (E, num_radial)."""

    def __init__(self, num_radial: int, cutoff: float, envelope_exponent: int = 5) -> None:
        super().__init__()
        self.cutoff, self.envelope_exponent = cutoff, envelope_exponent
        self.frequencies = initial_frequencies(num_radial)

    def forward(self, distance: Tensor) -> Tensor:
        x = (distance / self.cutoff)[:, None]
        waves = math.sqrt(2 / self.cutoff**3) * torch.sin(self.frequencies.to(x.dtype) * x) / x
        return polynomial_envelope(x, self.envelope_exponent) * waves


RADIAL_BASES = {"gaussian": GaussianBasis, "spherical_bessel": SphericalBesselBasis}


# DimeNet's


def dimenet_envelope(x: Tensor, exponent: int = 5) -> Tensor:
    """u(x) = 1/x + a x^(p-1) + b x^p + c x^(p+1) for x < 1, else 0; u, u' and u'' vanish at x = 1.

    Args:
        x: distance / cutoff, positive, any shape.
        exponent: p - 1, as DimeNet counts.
    """
    return polynomial_envelope(x, exponent + 1) / x


class SineBasis(nn.Module):
    """u(x) sin(f_n x) with trainable f_n, initially n pi. (E,) -> (E, num_radial)."""

    def __init__(self, num_radial: int, cutoff: float, envelope_exponent: int = 5) -> None:
        super().__init__()
        self.cutoff, self.envelope_exponent = cutoff, envelope_exponent
        self.frequencies = initial_frequencies(num_radial)

    def forward(self, distance: Tensor) -> Tensor:
        x = (distance / self.cutoff)[:, None]
        return dimenet_envelope(x, self.envelope_exponent) * torch.sin(self.frequencies.to(x.dtype) * x)


class BesselBasis(nn.Module):
    """u(x) sqrt(2) j_l(z_ln x) / |j_(l+1)(z_ln)|, z_ln the n-th zero of j_l. (E,) -> (E, num_spherical, num_radial).

    The functions are entire and there are few of them, so they are evaluated as Chebyshev series: accurate for all x,
    where the closed forms in sin and cos lose every digit of fp32 at small x and large l.
    """

    def __init__(self, num_spherical: int, num_radial: int, cutoff: float, envelope_exponent: int = 5) -> None:
        super().__init__()
        self.cutoff, self.envelope_exponent = cutoff, envelope_exponent
        self.shape = (num_spherical, num_radial)
        #: The public implementation rounds zeros and norms to float32; a series made of such reproduces it.
        self.series = bessel_series(bessel_zeros(num_spherical, num_radial))

    def forward(self, distance: Tensor) -> Tensor:
        x = distance / self.cutoff
        envelope = dimenet_envelope(x, self.envelope_exponent)
        return (envelope[:, None] * self.series(x)).view(-1, *self.shape)


class ChebyshevSeries:
    """F functions on [0, 1] as Chebyshev series, with derivatives of every order. (E,) -> (E, F)."""

    def __init__(self, coefficients: Tensor) -> None:
        """Of `coefficients` (K, F), float64 on the CPU: K terms of F functions."""
        self._coefficients = coefficients
        self._cached: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return _SumSeries.apply(x, self, 0)

    def values(self, x: Tensor, order: int) -> Tensor:
        """The derivative of some order at x."""
        if (key := (order, x.dtype, x.device)) not in self._cached:
            # From the beginning, so that threads share nothing that is half done: two may find the same.
            coefficients = self._coefficients
            for _ in range(order):
                coefficients = 2 * _derivative(coefficients)  # 2: from [0, 1] to [-1, 1]
            self._cached[key] = coefficients.to(x.device, x.dtype)
        coefficients = self._cached[key]
        angle = torch.arccos((2 * x - 1).clamp(-1, 1))
        return (
            torch.cos(angle[:, None] * torch.arange(len(coefficients), dtype=x.dtype, device=x.device)) @ coefficients
        )


class _SumSeries(torch.autograd.Function):
    """A derivative of a series; its own derivative is the next one, so nothing but x is ever kept."""

    @staticmethod
    def forward(x: Tensor, series: ChebyshevSeries, order: int) -> Tensor:
        return series.values(x, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.series, ctx.order = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (grad * _SumSeries.apply(x, ctx.series, ctx.order + 1)).sum(1), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent[:, None] * _SumSeries.apply(x, ctx.series, ctx.order + 1)


def _derivative(coefficients: Tensor) -> Tensor:
    """Of a Chebyshev series on [-1, 1]: c'_(k-1) = c'_(k+1) + 2 k c_k, and c'_0 halved."""
    found = torch.zeros_like(coefficients)
    for k in range(len(coefficients) - 1, 0, -1):
        found[k - 1] = 2 * k * coefficients[k] + (found[k + 1] if k + 1 < len(coefficients) else 0)
    found[0] /= 2
    return found


def bessel_series(zeros: Tensor, norms: Tensor | None = None) -> ChebyshevSeries:
    """sqrt(2) j_l(z_ln x) / |j_(l+1)(z_ln)| of all (l, n), l major.

    Args:
        zeros: (num_spherical, num_radial) float64, z_ln.
        norms: likewise, sqrt(2) / |j_(l+1)(z_ln)|; None: those of the zeros.
    """
    if norms is None:
        norms = torch.stack([math.sqrt(2) / spherical_bessel(l + 1, row).abs() for l, row in enumerate(zeros)])
    # A function of frequency z needs z / 2 terms, and some 26 more until nothing of float64 is left.
    terms = int(zeros.max() / 2) + 26
    angles = math.pi * (torch.arange(terms, dtype=torch.float64, device="cpu") + 0.5) / terms
    x = (1 + torch.cos(angles)) / 2
    values = [norms[l] * spherical_bessel(l, x[:, None] * zeros[l]) for l in range(len(zeros))]
    waves = torch.cos(torch.arange(terms, dtype=torch.float64, device="cpu")[:, None] * angles)
    coefficients = (2 / terms) * waves @ torch.cat(values, dim=1)
    coefficients[0] /= 2
    return ChebyshevSeries(coefficients)


@cache
def bessel_zeros(num_spherical: int, num_radial: int) -> Tensor:
    """The first positive zeros of j_l, l = 0..num_spherical-1. (num_spherical, num_radial) float64, on the CPU."""
    # Those of j_0 are multiples of pi; between two neighbouring zeros of j_l lies one of j_(l+1).
    zeros = math.pi * torch.arange(1, num_spherical + num_radial, dtype=torch.float64, device="cpu")
    rows = [zeros[:num_radial]]
    for l in range(1, num_spherical):
        low, high = zeros[:-1], zeros[1:]
        rising = spherical_bessel(l, low) < 0
        for _ in range(60):
            middle = (low + high) / 2
            right = (spherical_bessel(l, middle) < 0) == rising
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        zeros = (low + high) / 2
        rows.append(zeros[:num_radial])
    return torch.stack(rows)


def spherical_bessel(degree: int, t: Tensor) -> Tensor:
    """j_l(t), t > 0, in float64: the recursion upwards where it is stable (t > l), the power series elsewhere."""
    before, here = torch.sin(t) / t, torch.sin(t) / t**2 - torch.cos(t) / t
    if degree == 0:
        return before
    for l in range(1, degree):
        before, here = here, (2 * l + 1) / t * here - before
    # t^l / (2l+1)!! * sum over k of (-t^2/2)^k / (k! (2l+3) (2l+5) ... (2l+2k+1))
    term = torch.ones_like(t)
    for l in range(1, degree + 1):
        term = term * t / (2 * l + 1)
    series = term
    for k in range(1, 60):
        term = term * (-t * t / 2) / (k * (2 * degree + 2 * k + 1))
        series = series + term
    return torch.where(t > degree, here, series)
