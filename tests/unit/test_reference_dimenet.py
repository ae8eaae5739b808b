"""DimeNet++ against numbers of the public OC20 implementation (FAIR-Chem 1.9), in fp64.

The reference holds two periodic slabs and random weights of small widths; its forces leave angles out (`detached`).
Zeros and norms of its Bessel functions were rounded to fp32, which is reproduced here.
"""

from __future__ import annotations

import numpy as np
import oracle_dimenet
import pytest
import torch
from public_reference import PublicReference
from scipy.special import jv
from torch import Tensor

from egnscale.data.neighbors import GraphSpec
from egnscale.models import DimeNetPlusPlus, ExtendedGraph, build_model
from egnscale.models.basis import bessel_series, bessel_zeros

TOLERANCE = 1e-10
NOT_OURS = ("otf_graph", "regress_forces", "use_pbc")


class Reference(PublicReference):
    def __init__(self) -> None:
        super().__init__("dimenetplusplus", GraphSpec(symmetrize="none", leaving=True))

    def model(self, **hyperparameters: str) -> DimeNetPlusPlus:
        sizes = {name: value for name, value in self.config.items() if name not in NOT_OURS}
        model = build_model(**sizes, **({"angles": "detached"} | hyperparameters)).double()
        model.load_state_dict(self.under("sd/"))
        model.embedding.bessel_basis.series = bessel_series(*rounded_zeros_and_norms(7, 6))
        return model


def rounded_zeros_and_norms(num_spherical: int, num_radial: int) -> tuple[Tensor, Tensor]:
    """As float32 arithmetic has them."""
    zeros = bessel_zeros(num_spherical, num_radial).numpy().astype(np.float32)
    norms = np.empty_like(zeros)
    for l, z in enumerate(zeros):
        norms[l] = 1 / np.array([0.5 * (np.sqrt(np.pi / (2 * t)) * jv(l + 1.5, t)) ** 2 for t in z]) ** 0.5
    return torch.as_tensor(zeros).double(), torch.as_tensor(norms).double()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def test_energies_forces_and_gradients_are_those_of_the_public_implementation(reference: Reference) -> None:
    model = reference.model()
    errors = reference.relative_errors(model, model(reference.graph))
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_exact_angles_are_not_its(reference: Reference) -> None:
    errors = reference.relative_errors(model := reference.model(angles="exact"), model(reference.graph))
    assert errors["energy"] < TOLERANCE
    assert errors["forces"] > 1e-3


@pytest.mark.parametrize("angle", ["", "arctangent"])
def test_the_oracle_is_the_public_implementation_but_for_rounding(reference: Reference, angle: str) -> None:
    model = reference.model()
    errors = reference.relative_errors(model, oracle_dimenet.dimenet(model, reference.graph, angle=angle))
    assert max(errors.values()) < 1e-5


def test_one_weight_off_by_a_little_is_noticed(reference: Reference) -> None:
    model = reference.model()
    with torch.no_grad():
        model.blocks[1].interaction.lin_sbf1.weight[3, 17] += 1e-6
    errors = reference.relative_errors(model, model(reference.graph))
    assert errors["energy"] > TOLERANCE
    assert errors["forces"] > TOLERANCE


def test_graph_is_the_same_set_of_edges(reference: Reference) -> None:
    arrays, graph = reference.arrays, reference.graph

    def listing(source: Tensor, target: Tensor, distance: Tensor) -> list[tuple]:
        return sorted(zip(source.tolist(), target.tolist(), (distance * 1e6).round().tolist(), strict=True))

    def of_ours(graph: ExtendedGraph) -> Tensor:
        return (graph.positions[graph.target] - graph.positions[graph.source] - graph.shift).norm(dim=1)

    source, target = arrays["graph/edge_index"]
    theirs = listing(source, target, arrays["graph/edge_distance"])
    assert listing(graph.source, graph.target, of_ours(graph)) == theirs
    kj, _ = oracle_dimenet.list_paths(graph)
    assert len(kj) == len(arrays["graph/idx_kj"])
