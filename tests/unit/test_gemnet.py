"""GemNet-T: the model is the published one, and has the symmetries of physics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import oracle
import pytest
import structures
import torch
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec, radius_graph
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, GemNetT, Prediction, build_model, count_parameters
from egnscale.models.layers import ScaleFactor, he_orthogonal_

SMALL = {
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 16,
    "emb_size_trip": 8,
    "emb_size_bil_trip": 6,
    "emb_size_rbf": 5,
    "emb_size_cbf": 4,
    "num_radial": 16,
}


def small_model(*, fitted: bool = True, **hyperparameters: object) -> GemNetT:
    """fp64, with weights and (if fitted) scale factors that depend on nothing but `hyperparameters`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(**(SMALL | hyperparameters)).double()
        for module in model.modules():
            if fitted and isinstance(module, ScaleFactor):
                module.scale_factor.uniform_(0.5, 2)
    return model


def graph_of(*samples: Sample, spec: GraphSpec | None = None) -> ExtendedGraph:
    return build_graph(samples, spec or GraphSpec(), torch.float64)


# --- against the oracle ---

BATCHES: dict[str, Callable[[], Sequence[Sample]]] = {
    "slabs": lambda: [structures.slab(), structures.slab("fcc211", size=(3, 1, 3), seed=1)],
    "perfect slab": lambda: [structures.slab(rattle=0)],
    "molecules": lambda: [structures.water(periodic=True), structures.water(periodic=False)],
    "one atom, many images": lambda: [structures.crystal()],
    "one atom, images in a row": lambda: [structures.crystal(pbc=(True, False, False))],
    "isolated atoms beside others": lambda: [
        structures.far_apart("O", "H"),
        structures.water(periodic=False),
        structures.far_apart("N"),
    ],
    "no edge": lambda: [structures.far_apart("O", "H"), structures.far_apart("Cu")],
    "no structure": list,
}


def assert_same(ours: Prediction, theirs: Prediction, model: GemNetT, tolerance: float = 1e-12) -> None:
    """Energies, forces and the gradient of every parameter, each relative to its own norm."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(x.shape, dtype=x.dtype, generator=generator) + 0.5 for x in ours]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def everything(prediction: Prediction) -> dict[str, Tensor]:
        loss = sum((w * x).sum() for w, x in zip(weights, prediction, strict=True))
        # Raises if a parameter has no gradient at all: an optimizer that shards gradients would wait for it.
        gradients = torch.autograd.grad(loss, parameters)
        return dict(zip((*prediction._fields, *names), (*prediction, *gradients), strict=True))

    expected = everything(theirs)
    wrong = {}
    for name, value in everything(ours).items():
        error, size = float((value - expected[name]).detach().norm()), float(expected[name].detach().norm())
        if not error <= tolerance * size + 1e-14:  # forces in a crystal of one atom vanish but for rounding
            wrong[name] = (error, size)
    assert wrong == {}


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", ["block", "harmonic"])
def test_agrees_with_the_oracle(form: str, batch: str, padded: bool) -> None:
    model, graph = small_model(triplet_form=form), graph_of(*BATCHES[batch]())
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
    model = small_model(**variant)
    graph = graph_of(*BATCHES["slabs"](), spec=GraphSpec(cutoff=model.config.cutoff))
    assert_same(model(graph), oracle.gemnet(model, graph), model)


def test_the_comparison_notices_a_wrong_reverse_edge() -> None:
    model, graph = small_model(), graph_of(structures.slab())
    wrong = graph_of(structures.slab())
    wrong.reverse[[0, 1]] = wrong.reverse[[1, 0]]
    with pytest.raises(AssertionError):
        assert_same(model(wrong), oracle.gemnet(model, graph), model)


def test_zeros_as_initial_outputs() -> None:
    prediction = small_model(output_init="zeros")(graph_of(structures.slab()))
    assert not any(x.any() for x in prediction)


# --- symmetries ---

SLABS = {
    "perfect": lambda: structures.slab(rattle=0),
    "perfect fcc211": lambda: structures.slab("fcc211", rattle=0),
    "rattled": lambda: structures.slab(rattle=0.2),
}


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) < 1e-10 * float(b.norm())


@torch.no_grad()
def predict(sample: Sample, spec: GraphSpec | None = None) -> Prediction:
    return small_model()(graph_of(sample, spec=spec))


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
        together = small_model()(graph_of(*(samples[i] for i in order)))
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
    model = small_model(triplet_form=form, emb_size_atom=64, emb_size_edge=64).float()
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
