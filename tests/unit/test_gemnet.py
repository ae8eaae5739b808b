"""GemNet-T: the model is the published one, and has the symmetries of physics."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import structures
import torch
from small_models import BATCHES, assert_same, close, gemnet

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec, radius_graph
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, Prediction, build_model, count_parameters
from egnscale.models.layers import he_orthogonal_


def graph_of(*samples: Sample, spec: GraphSpec | None = None) -> ExtendedGraph:
    return build_graph(samples, spec or GraphSpec(), torch.float64)


# --- against the oracle ---


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_agrees_with_the_oracle(form: str, batch: str, padded: bool) -> None:
    model, graph = gemnet(triplet_form=form), graph_of(*BATCHES[batch]())
    assert_same(model(graph), oracle.gemnet(model, graph, padded_triplets=padded), model)


@pytest.mark.parametrize(
    "variant",
    [
        {"fitted": False},
        {"output_init": "zeros"},
        {"extensive": False},
        {"rbf": "spherical_bessel"},
        {"num_spherical": 1},
        {"num_spherical": 2, "num_before_skip": 2, "num_after_skip": 0, "num_concat": 2, "num_atom": 1},
        {"cutoff": 4.0, "envelope_exponent": 4},
    ],
    ids=str,
)
def test_agrees_with_the_oracle_in_every_variant(variant: dict) -> None:
    model = gemnet(**variant)
    graph = graph_of(*BATCHES["slabs"](), spec=GraphSpec(cutoff=model.config.cutoff))
    assert_same(model(graph), oracle.gemnet(model, graph), model)


def test_the_comparison_notices_a_wrong_reverse_edge() -> None:
    model, graph = gemnet(), graph_of(structures.slab())
    wrong = graph_of(structures.slab())
    wrong.reverse[[0, 1]] = wrong.reverse[[1, 0]]
    with pytest.raises(AssertionError):
        assert_same(model(wrong), oracle.gemnet(model, graph), model)


def test_zeros_as_initial_outputs() -> None:
    prediction = gemnet(output_init="zeros")(graph_of(structures.slab()))
    assert not any(x.any() for x in prediction)


# --- symmetries ---

SLABS = {
    "perfect": lambda: structures.slab(rattle=0),
    "perfect fcc211": lambda: structures.slab("fcc211", rattle=0),
    "rattled": lambda: structures.slab(rattle=0.2),
}


@torch.no_grad()
def predict(sample: Sample, spec: GraphSpec | None = None) -> Prediction:
    return gemnet()(graph_of(sample, spec=spec))


@pytest.fixture(params=SLABS)
def slab(request: pytest.FixtureRequest) -> Sample:
    sample = SLABS[request.param]()
    uncapped = len(radius_graph([sample], GraphSpec(max_neighbors=None)).source)
    assert len(radius_graph([sample], GraphSpec()).source) < uncapped, "the cap should cut something"
    return sample


def test_rotation_turns_forces_and_leaves_energies(slab: Sample) -> None:
    rotation = structures.random_rotation()
    before, after = predict(slab), predict(structures.rotated(slab, rotation))
    assert close(after.energy, before.energy)
    assert close(after.forces, before.forces @ torch.from_numpy(rotation.T))
    assert not close(after.forces, before.forces)


def test_translation_changes_nothing(slab: Sample) -> None:
    before = predict(slab)
    images = np.random.default_rng(0).integers(-2, 3, (slab.num_atoms, 3)) * slab.pbc
    for by in (np.array([1.7, -33.3, 4.1]), images @ slab.cell):
        after = predict(structures.translated(slab, by))
        assert close(after.energy, before.energy)
        assert close(after.forces, before.forces)


def test_permutation_of_atoms_permutes_forces(slab: Sample) -> None:
    order = np.random.default_rng(0).permutation(slab.num_atoms)
    before, after = predict(slab), predict(structures.permuted(slab, order))
    assert close(after.energy, before.energy)
    assert close(after.forces, before.forces[order])


def test_the_public_symmetrisation_depends_on_the_order_of_atoms() -> None:
    slab, spec = structures.slab(rattle=0.2), GraphSpec(symmetrize="oc20")
    order = np.arange(slab.num_atoms)[::-1]
    before, after = predict(slab, spec), predict(structures.permuted(slab, order), spec)
    assert not close(after.energy, before.energy)


@torch.no_grad()
def test_a_batch_is_its_structures() -> None:
    samples = [make() for make in SLABS.values()] + [structures.far_apart("O"), structures.water(periodic=True)]
    alone = [predict(sample) for sample in samples]
    for order in (range(len(samples)), [3, 1, 4, 0, 2]):
        together = gemnet()(graph_of(*(samples[i] for i in order)))
        assert close(together.energy, torch.cat([alone[i].energy for i in order]))
        assert close(together.forces, torch.cat([alone[i].forces for i in order]))


@pytest.mark.parametrize("axis", [0, 1])
def test_two_cells_have_twice_the_energy(axis: int) -> None:
    slab, spec = structures.slab(), GraphSpec(max_neighbors=None)
    once, twice = predict(slab, spec), predict(structures.repeated(slab, axis), spec)
    assert close(twice.energy, 2 * once.energy)
    assert close(twice.forces, once.forces.repeat(2, 1))


def test_energy_is_smooth_where_an_edge_appears() -> None:
    """The envelope takes an edge in and out with two continuous derivatives."""

    def energy(distance: float) -> float:
        sample = structures.translated(
            structures.far_apart("Cu", "O"), np.array([[0.0], [1.0]]) * [distance - 100, 0, 0]
        )
        return float(predict(sample).energy)

    assert abs(energy(6 - 1e-5) - energy(6 + 1e-5)) < 1e-10
    assert abs(energy(5.5) - energy(6 + 1e-5)) > 1e-6


# --- sizes, initialisation, precision ---


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("gemnet-dt", 31_671_808),
        ("gemnet-xl", 292_939_520),
        ("gemnet-125m", 120_925_952),
        ("gemnet-245m", 243_463_168),
        ("gemnet-480m", 478_555_744),
        ("gemnet-960m", 942_030_562),
        ("gemnet-1b", 1_058_944_256),
        ("gemnet-2.5b", 2_544_772_352),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_model(preset)) == parameters


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (256, 128), (1, 64), (16, 8, 32)])
def test_initial_weights_have_zero_mean_and_variance_one_over_fan_in(shape: tuple[int, ...]) -> None:
    weight = he_orthogonal_(torch.empty(shape, dtype=torch.float64))
    rows = weight.flatten(0, 1).t() if len(shape) == 3 else weight
    fan_in = rows.shape[1]
    assert fan_in == math.prod(shape[:2] if len(shape) == 3 else shape[1:])
    torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-12, rtol=0)
    # 1e-6 beside the variance of an orthogonal matrix's row, about 1 / fan_in.
    torch.testing.assert_close(rows.var(1) * fan_in, torch.ones(len(rows), dtype=torch.float64), rtol=1e-3, atol=0)


def test_initial_square_weights_are_nearly_orthogonal() -> None:
    weight = he_orthogonal_(torch.empty(256, 256, dtype=torch.float64))
    off_diagonal = weight @ weight.t() - torch.eye(256, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.05
    assert (torch.randn(256, 256, dtype=torch.float64) / 16).square().sum(1).sub(1).abs().max() > 0.05


@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_bf16_keeps_scale_factors_and_geometry_in_fp32(form: str) -> None:
    model = gemnet(triplet_form=form, emb_size_atom=64, emb_size_edge=64).float()
    graph = graph_of(*BATCHES["slabs"]()).to("cpu", torch.float32)
    factors = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("scale_factor")}
    model.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert factors
    assert all(torch.equal(model.state_dict()[name], value) for name, value in factors.items())

    in_bf16 = model(graph)
    (in_bf16.energy.sum() + in_bf16.forces.square().sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        in_fp32 = model.float()(graph)  # with the weights as rounded
    for ours, theirs in zip(in_bf16, in_fp32, strict=True):
        assert ours.dtype == torch.float32
        error = (ours.detach() - theirs).norm() / theirs.norm()
        assert 1e-5 < error < 5e-2
