"""DimeNet's radial bases, against scipy."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.special import spherical_jn

from egnscale.models import basis
from egnscale.models.basis import BesselBasis, SineBasis, bessel_series, bessel_zeros, dimenet_envelope

DISTANCES = torch.cat([torch.tensor([0.01, 0.3]), torch.linspace(0.6, 5.99, 50)]).double()


def wanted(num_spherical: int, num_radial: int, x: np.ndarray) -> np.ndarray:
    """sqrt(2) j_l(z_ln x) / |j_(l+1)(z_ln)|, (len(x), num_spherical, num_radial)."""
    zeros = bessel_zeros(num_spherical, num_radial).numpy()
    values = np.empty((len(x), num_spherical, num_radial))
    for l in range(num_spherical):
        for n in range(num_radial):
            z = zeros[l, n]
            values[:, l, n] = math.sqrt(2) * spherical_jn(l, z * x) / abs(spherical_jn(l + 1, z))
    return values


@pytest.mark.parametrize("num_spherical, num_radial", [(7, 6), (1, 1), (2, 12), (12, 3)])
def test_zeros_are_the_first_zeros(num_spherical: int, num_radial: int) -> None:
    zeros = bessel_zeros(num_spherical, num_radial).numpy()
    for l, row in enumerate(zeros):
        assert np.abs(spherical_jn(l, row)).max() < 1e-14
        grid = np.linspace(0.5, row[-1] + 0.1, 20_000)
        assert np.count_nonzero(np.diff(np.sign(spherical_jn(l, grid)))) == num_radial, "none is left out"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_spherical, num_radial", [(7, 6), (1, 1), (2, 12), (12, 3)])
def test_bessel_basis(num_spherical: int, num_radial: int, dtype: torch.dtype, tolerance: float) -> None:
    basis = BesselBasis(num_spherical, num_radial, cutoff=6.0)
    x = DISTANCES / 6.0
    envelope = dimenet_envelope(x)[:, None, None].numpy()
    expected = wanted(num_spherical, num_radial, x.numpy()) * envelope
    found = basis(DISTANCES.to(dtype)).double().numpy()
    # Relative to the largest value that each function can have there; towards the cutoff the envelope cancels.
    scale = np.abs(wanted(num_spherical, num_radial, np.linspace(1e-3, 1, 500))).max(0)
    assert (np.abs(found - expected) / (scale * envelope.clip(min=1))).max() < tolerance


def test_threads_share_no_half_done_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    zeros = bessel_zeros(2, 3)
    alone = bessel_series(zeros).values(x, 3)
    derivative = basis._derivative

    def slowly(coefficients: torch.Tensor) -> torch.Tensor:
        found = derivative(coefficients)
        time.sleep(0.01)
        return found

    monkeypatch.setattr(basis, "_derivative", slowly)
    shared = bessel_series(zeros)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.values(x, 3), range(4)))
    assert all(torch.equal(values, alone) for values in found)
    assert torch.equal(shared.values(x, 3), alone)


def test_derivatives_of_every_order() -> None:
    series = BesselBasis(7, 6, cutoff=6.0).series
    x = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(series, (x,))
    assert torch.autograd.gradgradcheck(series, (x,))
    value = series(x).sum()
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    step = 1e-3
    second = [series.values((x + k * step).detach(), 2).sum(1) for k in (1, -1)]
    torch.testing.assert_close(value.detach(), (second[0] - second[1]) / (2 * step), rtol=1e-3, atol=1e-2)


def test_tangents_are_those_of_the_gradient() -> None:
    import torch.autograd.forward_ad as forward_ad

    series = BesselBasis(3, 2, cutoff=6.0).series
    x, direction = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(series(forward_ad.make_dual(x, direction))).tangent
    torch.testing.assert_close(tangent, direction[:, None] * series.values(x, 1))


def test_sines_and_the_envelope_end_smoothly_at_the_cutoff() -> None:
    basis = SineBasis(6, cutoff=6.0).double()
    distance = torch.tensor([6.0 - 1e-3, 6.0, 6.5], dtype=torch.float64, requires_grad=True)
    values = basis(distance)
    (slope,) = torch.autograd.grad(values.sum(), distance)
    assert values[0].abs().max() < 1e-8
    assert not values[1:].any()
    assert slope.abs().max() < 1e-4
    torch.testing.assert_close(basis(torch.tensor([3.0]).double())[0, 0], dimenet_envelope(torch.tensor(0.5).double()))


def test_a_constant_of_the_meta_device_is_on_the_cpu() -> None:
    with torch.device("meta"):
        basis = BesselBasis(7, 6, cutoff=6.0)
    assert basis(torch.tensor([3.0])).shape == (1, 7, 6)
