"""Sums over triplets that list no triplet, against sums over listed triplets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from egnscale.models.graph import EdgeBuckets
from egnscale.models.harmonics import circular_harmonics
from egnscale.models.triplets import HARMONIC_ABOVE, TripletForm, angular_basis, bilinear, triplet_sum

S, F = 7, 3
FORMS = ("block", "harmonic", "auto")
DEGREES = [3, 0, 1, 8, 2, 9, 0, HARMONIC_ABOVE, HARMONIC_ABOVE + 1, 70]


def random_edges(degrees: list[int]) -> tuple[Tensor, Tensor, EdgeBuckets]:
    """Unit vectors (E, 3), features (E, F) and buckets of edges sorted by target."""
    edges = sum(degrees)
    direction = torch.nn.functional.normalize(torch.randn(edges, 3, dtype=torch.float64), dim=1)
    return (
        direction,
        torch.randn(edges, F, dtype=torch.float64),
        EdgeBuckets.build(torch.tensor(degrees, dtype=torch.int64)),
    )


def sums(direction: Tensor, x: Tensor, buckets: EdgeBuckets, form: TripletForm, num_spherical: int = S) -> Tensor:
    return triplet_sum(x, angular_basis(direction, buckets, num_spherical, form), buckets)


def listed_sums(direction: Tensor, x: Tensor, degrees: list[int], *, itself: bool = False) -> Tensor:
    """The definition. `itself` includes b = c, which is not a triplet."""
    out = torch.zeros(len(x), S, F, dtype=torch.float64)
    for edges in torch.arange(len(x)).split(degrees):
        for c in edges.tolist():
            others = edges if itself else edges[edges != c]
            out[c] = circular_harmonics(direction[others] @ direction[c], S).t() @ x[others]
    return out


@pytest.mark.parametrize("form", FORMS)
def test_sum_is_that_of_listed_triplets(form: TripletForm) -> None:
    direction, x, buckets = random_edges(DEGREES)
    ours = sums(direction, x, buckets, form)
    torch.testing.assert_close(ours, listed_sums(direction, x, DEGREES), rtol=0, atol=1e-13)
    assert not torch.allclose(ours, listed_sums(direction, x, DEGREES, itself=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degrees", [[], [0, 0], [1, 0, 1]], ids=str)
def test_no_pair_of_edges_gives_zeros_with_a_gradient(form: TripletForm, degrees: list[int]) -> None:
    direction, x, buckets = random_edges(degrees)
    ours = sums(direction, x.requires_grad_(), buckets, form)
    assert ours.shape == (sum(degrees), S, F)
    assert not ours.detach().abs().gt(1e-14).any()
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    assert gradient.shape == x.shape


def test_auto_takes_the_harmonic_form_at_high_degree_only() -> None:
    direction, _, buckets = random_edges([HARMONIC_ABOVE, HARMONIC_ABOVE + 1])
    low, high = angular_basis(direction, buckets, S)
    assert low.shape == (1, HARMONIC_ABOVE, S, HARMONIC_ABOVE)
    assert high.shape == (1, S * S, HARMONIC_ABOVE + 8)


@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_first_and_second_derivatives(form: TripletForm) -> None:
    direction, x, buckets = random_edges([1, 3, 9, 2])

    def function(vector: Tensor, x: Tensor) -> Tensor:
        return sums(torch.nn.functional.normalize(vector, dim=1), x, buckets, form, num_spherical=4)

    inputs = (direction.mul(1.5).requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_dual_numbers_carry_the_directional_derivative(form: TripletForm) -> None:
    direction, x, buckets = random_edges([4, 9])
    tangents = (torch.randn_like(direction), torch.randn_like(x))

    def function(direction: Tensor, x: Tensor) -> Tensor:
        return sums(direction, x, buckets, form)

    _, dual = torch.func.jvp(function, (direction, x), tangents)
    step = 1e-6
    ahead, behind = (function(direction + sign * step * tangents[0], x + sign * step * tangents[1]) for sign in (1, -1))
    torch.testing.assert_close(dual, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_bf16_features_give_bf16_sums(form: TripletForm) -> None:
    direction, x, buckets = random_edges(DEGREES)
    x = x.bfloat16()
    ours = sums(direction.float(), x, buckets, form)
    assert ours.dtype == torch.bfloat16
    error = ours.double() - listed_sums(direction, x.double(), DEGREES)
    assert error.norm() < 1e-2 * ours.double().norm()


def test_bilinear_is_the_contraction_it_stands_for() -> None:
    sums, radial = torch.randn(11, S, F, dtype=torch.float64), torch.randn(11, 5, S, dtype=torch.float64)
    weight = torch.randn(F, 5, 4, dtype=torch.float64)
    expected = torch.einsum("fio,eil,elf->eo", weight, radial, sums)
    torch.testing.assert_close(bilinear(sums, radial, weight), expected)


def test_a_graph_on_the_meta_device_costs_nothing() -> None:
    direction, x, buckets = random_edges(DEGREES)
    on_meta = buckets.map(lambda index: index.to("meta"))
    for form in FORMS:
        assert sums(direction.to("meta"), x.to("meta"), on_meta, form).shape == (len(x), S, F)
