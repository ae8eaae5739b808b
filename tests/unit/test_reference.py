"""GemNet-T against numbers of the public OC20 implementation (FAIR-Chem 1.9), in fp64.

The reference holds two periodic slabs, random weights of small widths and unfitted scale factors; the graph has the
public symmetrisation. Its gaussians were made with coefficient and centers rounded to fp32, which is reproduced here.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from public_reference import PublicReference
from torch import Tensor

from egnscale.data.neighbors import GraphSpec
from egnscale.models import GemNetT, build_model

TOLERANCE = 1e-10
SIZES = (
    *("num_blocks", "emb_size_atom", "emb_size_edge", "emb_size_trip", "emb_size_bil_trip"),
    *("emb_size_rbf", "emb_size_cbf", "num_radial", "num_spherical"),
)


class Reference(PublicReference):
    def __init__(self) -> None:
        super().__init__("gemnet_t", GraphSpec(symmetrize="oc20"))

    def model(self, **hyperparameters: str) -> GemNetT:
        model = build_model(**{name: self.config[name] for name in SIZES}, **hyperparameters).double()
        model.load_state_dict(self.under("sd/"))
        bases = (model.embedding.radial_basis, model.embedding.radial_basis_cbf)
        names = ("radial_basis.rbf.offset", "cbf_basis3.radial_basis.rbf.offset")
        for basis, coefficient, name in zip(bases, self.arrays["coeff_gaussian"], names, strict=True):
            basis.coefficient, basis.centers = float(coefficient), self.arrays[f"sd/{name}"]
        return model


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.parametrize("form", ["auto", "block", "harmonic"])
def test_energies_forces_and_gradients_are_those_of_the_public_implementation(reference: Reference, form: str) -> None:
    model = reference.model(triplet_form=form)
    errors = reference.relative_errors(model, model(reference.graph))
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_the_oracle_agrees_too(reference: Reference) -> None:
    model = reference.model()
    errors = reference.relative_errors(model, oracle.gemnet(model, reference.graph))
    assert max(errors.values()) < TOLERANCE


@torch.no_grad()
def test_one_weight_off_by_a_little_is_noticed(reference: Reference) -> None:
    model = reference.model()
    model.blocks[1].interaction.trip_interaction.mlp_cbf[3, 1, 2] += 1e-6
    with torch.enable_grad():
        errors = reference.relative_errors(model, model(reference.graph))
    assert errors["energy"] > TOLERANCE
    assert errors["forces"] > TOLERANCE
    # Gradients of the outputs before that weight do not change: the loss is linear.
    assert sum(error > TOLERANCE for error in errors.values()) > len(errors) / 2


def test_graph_is_the_same_set_of_edges(reference: Reference) -> None:
    arrays, graph = reference.arrays, reference.graph
    source, target = arrays["graph/edge_index"]
    length, direction = arrays["graph/D_st"], arrays["graph/V_st"]
    vector = graph.positions[graph.target] - graph.positions[graph.source] - graph.shift

    def listing(source: Tensor, target: Tensor, vector: Tensor, reverse: Tensor) -> set[tuple]:
        """Edges with their reverses, vectors to 1e-6 A."""
        edges = [
            (*ends, *xyz)
            for *ends, xyz in zip(source.tolist(), target.tolist(), (vector * 1e6).round().tolist(), strict=True)
        ]
        assert len(set(edges)) == len(edges)
        return {(edge, edges[back]) for edge, back in zip(edges, reverse.tolist(), strict=True)}

    theirs = listing(source, target, direction * length[:, None], arrays["graph/id_swap"])
    assert listing(graph.source, graph.target, vector, graph.reverse) == theirs
    wrong = graph.reverse.roll(1)
    assert listing(graph.source, graph.target, vector, wrong) != theirs
