"""GemNet-T against numbers of the public OC20 implementation (FAIR-Chem 1.9), in fp64.

The reference holds two periodic slabs, random weights of small widths and unfitted scale factors; the graph has the
public symmetrisation. Its gaussians were made with coefficient and centers rounded to fp32, which is reproduced here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, GemNetT, Prediction, build_model
from egnscale.models.oc20_names import to_our_names

TOLERANCE = 1e-10
SIZES = (
    *("num_blocks", "emb_size_atom", "emb_size_edge", "emb_size_trip", "emb_size_bil_trip"),
    *("emb_size_rbf", "emb_size_cbf", "num_radial", "num_spherical"),
)


@dataclass
class Reference:
    """The file's arrays, and the graph built from its structures."""

    arrays: dict[str, Tensor]
    config: dict
    graph: ExtendedGraph

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Parameters or their gradients, under our names."""
        return to_our_names({k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)})

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
    path = Path(__file__).parents[1] / "reference" / "gemnet_tiny_unfitted.npz"
    with np.load(path, allow_pickle=False) as file:
        config = json.loads(str(file["cfg"]))
        arrays = {name: torch.as_tensor(file[name]) for name in file.files if file[name].dtype.kind in "fi"}
    samples = []
    for system, cell in enumerate(arrays["cell"].numpy()):
        atoms = (arrays["batch"] == system).numpy()
        numbers, positions = arrays["atomic_numbers"].numpy()[atoms], arrays["positions"].numpy()[atoms]
        none = np.zeros(len(numbers), dtype=np.int64)
        samples.append(Sample(numbers, positions, cell, np.ones(3, dtype=bool), none, none.astype(bool)))
    return Reference(arrays, config, build_graph(samples, GraphSpec(symmetrize="oc20"), torch.float64))


def relative_errors(reference: Reference, model: GemNetT, prediction: Prediction) -> dict[str, float]:
    """|ours - theirs| / |theirs| of energies, forces and the gradient of every parameter."""
    arrays = reference.arrays
    loss = (arrays["we"] * prediction.energy).sum() + (arrays["wf"] * prediction.forces).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    theirs = reference.under("grad64/")
    assert set(ours) == set(theirs)
    ours |= {"energy": prediction.energy.detach(), "forces": prediction.forces.detach()}
    theirs |= {"energy": arrays["energy64"], "forces": arrays["forces64"]}
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}


@pytest.mark.parametrize("form", ["auto", "block", "harmonic"])
def test_energies_forces_and_gradients_are_those_of_the_public_implementation(reference: Reference, form: str) -> None:
    model = reference.model(triplet_form=form)
    errors = relative_errors(reference, model, model(reference.graph))
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_the_oracle_agrees_too(reference: Reference) -> None:
    model = reference.model()
    errors = relative_errors(reference, model, oracle.gemnet(model, reference.graph))
    assert max(errors.values()) < TOLERANCE


@torch.no_grad()
def test_one_weight_off_by_a_little_is_noticed(reference: Reference) -> None:
    model = reference.model()
    model.blocks[1].interaction.trip_interaction.mlp_cbf[3, 1, 2] += 1e-6
    with torch.enable_grad():
        errors = relative_errors(reference, model, model(reference.graph))
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
