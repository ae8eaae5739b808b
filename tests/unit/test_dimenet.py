"""DimeNet++: the model is the published one, and has the symmetries of physics."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import oracle_dimenet
import pytest
import structures
import torch
from small_models import BATCHES, DIMENET, assert_same, close, dimenet, graph_for
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, Prediction, build_model, count_parameters


def graph_of(*samples: Sample, spec: GraphSpec | None = None) -> ExtendedGraph:
    return build_graph(samples, spec or GraphSpec(symmetrize="none", leaving=True), torch.float64)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("angles", ["exact", "detached"])
def test_agrees_with_the_oracle(angles: str, batch: str) -> None:
    model, graph = dimenet(angles=angles), graph_of(*BATCHES[batch]())
    assert_same(model(graph), oracle_dimenet.dimenet(model, graph), model, tolerance=1e-10)


@pytest.mark.parametrize(
    "variant",
    [
        {"num_spherical": 1},
        {"num_spherical": 3, "num_radial": 8, "num_before_skip": 2, "num_after_skip": 0, "num_output_layers": 1},
        {"cutoff": 4.0, "envelope_exponent": 4, "max_neighbors": 12},
        {"symmetrize": "union"},
    ],
    ids=str,
)
def test_agrees_with_the_oracle_in_every_variant(variant: dict) -> None:
    model = dimenet(**variant)
    graph = graph_for(model, *BATCHES["slabs"]())
    assert_same(model(graph), oracle_dimenet.dimenet(model, graph), model, tolerance=1e-10)


def test_some_edges_have_no_reverse_and_the_comparison_notices_a_wrong_one() -> None:
    model, graph = dimenet(), graph_of(structures.slab())
    assert 0 < int((graph.reverse < 0).sum()) < graph.num_edges / 2
    wrong = graph_of(structures.slab())
    assert wrong.leaving is not None
    lost = int(torch.nonzero(wrong.leaving.back >= 0)[0])
    wrong.leaving.forth[wrong.leaving.back[lost]] = -1
    wrong.leaving.back[lost] = -1
    with pytest.raises(AssertionError):
        assert_same(model(wrong), oracle_dimenet.dimenet(model, graph), model, tolerance=1e-8)


def test_detached_angles_change_forces_alone() -> None:
    graph = graph_of(structures.slab())
    exact, detached = dimenet()(graph), dimenet(angles="detached")(graph)
    assert torch.equal(exact.energy, detached.energy)
    assert float((exact.forces - detached.forces).detach().norm()) > 1e-3 * float(exact.forces.detach().norm())


# --- where angles have no derivative ---


def row_of_atoms() -> Sample:
    """A chain of atoms along x: every angle is 0 or 180 degrees."""
    return structures.crystal(cell=np.diag([2.5, 20.0, 20.0]), pbc=(True, False, False))


@pytest.mark.parametrize("sample", [row_of_atoms, lambda: structures.slab(rattle=0)], ids=["row", "crystal"])
def test_collinear_atoms_have_finite_forces_and_gradients(sample: Callable[[], Sample]) -> None:
    model, graph = dimenet(), graph_of(sample())

    def gradients(prediction: Prediction) -> list[Tensor]:
        loss = prediction.energy.sum() + (prediction.forces + 0.1).square().sum()
        return [prediction.forces.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    assert all(x.isfinite().all() for x in gradients(model(graph)))
    assert_same(model(graph), oracle_dimenet.dimenet(model, graph), model, tolerance=1e-10)
    with_angles = oracle_dimenet.dimenet(model, graph, angle="arccosine")
    assert not all(x.isfinite().all() for x in gradients(with_angles))


# --- symmetries ---


@torch.no_grad()
def predict(sample: Sample, spec: GraphSpec | None = None) -> Prediction:
    return dimenet()(graph_of(sample, spec=spec))


@pytest.mark.parametrize("rattle", [0, 0.2])
def test_symmetries(rattle: float) -> None:
    slab = structures.slab(rattle=rattle)
    before = predict(slab)
    rotation = structures.random_rotation()
    turned = predict(structures.rotated(slab, rotation))
    assert close(turned.energy, before.energy)
    assert close(turned.forces, before.forces @ torch.from_numpy(rotation.T))
    moved = predict(structures.translated(slab, np.array([1.7, -33.3, 4.1])))
    assert close(moved.energy, before.energy)
    assert close(moved.forces, before.forces)
    order = np.random.default_rng(0).permutation(slab.num_atoms)
    mixed = predict(structures.permuted(slab, order))
    assert close(mixed.energy, before.energy)
    assert close(mixed.forces, before.forces[order])
    assert float(before.forces.sum(0).norm()) < 1e-10 * float(before.forces.norm()), "no net force"


@torch.no_grad()
def test_a_batch_is_its_structures() -> None:
    samples = [structures.slab(), structures.far_apart("O"), structures.water(periodic=True), structures.slab("fcc211")]
    alone = [predict(sample) for sample in samples]
    together = dimenet()(graph_of(*samples))
    assert close(together.energy, torch.cat([prediction.energy for prediction in alone]))
    assert close(together.forces, torch.cat([prediction.forces for prediction in alone]))


def test_two_cells_have_twice_the_energy() -> None:
    slab, spec = structures.slab(), GraphSpec(max_neighbors=None, symmetrize="none", leaving=True)
    once, twice = predict(slab, spec), predict(structures.repeated(slab, 0), spec)
    assert close(twice.energy, 2 * once.energy)
    assert close(twice.forces, once.forces.repeat(2, 1))


# --- sizes, initialisation, precision ---


@pytest.mark.parametrize(
    "preset, parameters",
    [("dimenet++", 1_810_182), ("dimenet++-large", 10_718_342), ("dimenet++-xl", 219_350_022)],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_model(preset)) == parameters


def test_initial_energies_are_zero() -> None:
    assert not build_model(**DIMENET)(graph_of(structures.slab()).to("cpu", torch.float32)).energy.any()


@torch.no_grad()
def test_initial_activations_neither_vanish_nor_explode() -> None:
    torch.manual_seed(0)
    model = build_model("dimenet++")
    state = model.state(graph_of(structures.slab()).to("cpu", torch.float32))
    assert 0.05 < float(state.x.std()) < 20


def test_bf16_is_close_to_fp32() -> None:
    model, graph = dimenet(hidden_channels=64).float(), graph_of(*BATCHES["slabs"]()).to("cpu", torch.float32)
    in_bf16 = model.bfloat16()(graph)
    (in_bf16.energy.sum() + in_bf16.forces.square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        in_fp32 = model.float()(graph)  # with the weights as rounded
    for ours, theirs in zip(in_bf16, in_fp32, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-5 < (ours.detach() - theirs).norm() / theirs.norm() < 5e-2


def test_a_graph_without_leaving_edges_says_so() -> None:
    with pytest.raises(AssertionError, match="without leaving edges"):
        dimenet()(graph_of(structures.slab(), spec=GraphSpec(symmetrize="none")))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"forces": "direct"}, "DimeNet\\+\\+ is an energy model: choose conservative or none"),
        ({"angles": "none"}, "choose exact or detached"),
        ({"symmetrize": "both"}, "choose none, union or oc20"),
        ({"emb_size_edge": 3}, "unknown hyperparameter 'emb_size_edge' of dimenetplusplus"),
        ({"segment_sum": "torch_scatter"}, "cannot train conservative forces"),
    ],
    ids=str,
)
def test_mistakes(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(**(DIMENET | wrong))
