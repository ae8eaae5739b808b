"""Radial basis of edges: envelope times gaussians or spherical Bessel functions.

Parameter-free parts compute in the precision of the distances.
Source: GemNet, appendix; DimeNet (Gasteiger et al., ICLR 2020), equation 8, for the envelope.
"""

from __future__ import annotations

import math

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


class SphericalBesselBasis(nn.Module):
    """u(x) sqrt(2 / cutoff^3) sin(w_k x) / x with trainable w_k, initially k pi. (E,) -> (E, num_radial)."""

    def __init__(self, num_radial: int, cutoff: float, envelope_exponent: int = 5) -> None:
        super().__init__()
        self.cutoff, self.envelope_exponent = cutoff, envelope_exponent
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, num_radial + 1, dtype=torch.get_default_dtype()))

    def forward(self, distance: Tensor) -> Tensor:
        x = (distance / self.cutoff)[:, None]
        waves = math.sqrt(2 / self.cutoff**3) * torch.sin(self.frequencies.to(x.dtype) * x) / x
        return polynomial_envelope(x, self.envelope_exponent) * waves


RADIAL_BASES = {"gaussian": GaussianBasis, "spherical_bessel": SphericalBesselBasis}
