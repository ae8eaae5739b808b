"""Reverse over forward gives the gradient of double backward, layer by layer and for whole models, in fp64.

Some torch operations lose the second-order term without an error when differentiated this way: the comparison of each
layer is what notices one that enters a model.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import Any, get_args

import pytest
import structures
import torch
from small_models import BATCHES, conservative, graph_for
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from egnscale.models import AtomModel, ExtendedGraph, layers
from egnscale.models.basis import RADIAL_BASES
from egnscale.models.dimenet import Angles
from egnscale.models.dual import dual_energies, with_tangents
from egnscale.models.layers import linear
from egnscale.models.triplets import TripletForm
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.recompute import set_recompute

MODELS = {
    "gemnet_t, block": {"name": "gemnet_t", "triplet_form": "block"},
    "gemnet_t, harmonic": {"name": "gemnet_t", "triplet_form": "harmonic"},
    "gemnet_t, Bessel": {"name": "gemnet_t", "rbf": "spherical_bessel"},
    "gemnet_t, mean energy": {"name": "gemnet_t", "extensive": False},
    "dimenetplusplus": {"name": "dimenetplusplus"},
    "dimenetplusplus, detached angles": {"name": "dimenetplusplus", "angles": "detached"},
}


def test_the_models_here_have_every_form() -> None:
    configs = [conservative(**hyperparameters).config for hyperparameters in MODELS.values()]

    def chosen(name: str) -> set[Any]:
        return {getattr(config, name) for config in configs if hasattr(config, name)}

    assert chosen("rbf") == set(RADIAL_BASES)
    assert chosen("triplet_form") == set(get_args(TripletForm))
    assert chosen("angles") == set(get_args(Angles))
    assert chosen("extensive") == {False, True}


def loss(energy: Tensor, forces: Tensor) -> Tensor:
    return (energy.square() + energy).sum() + (forces - 0.1).square().sum()


def double_backward(model: AtomModel, graph: ExtendedGraph) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*model(graph)), list(model.parameters())))


def reverse_over_forward(model: AtomModel, graph: ExtendedGraph) -> list[Tensor]:
    with torch.no_grad():
        prediction = model(graph)
    energy, forces = prediction.energy.requires_grad_(), prediction.forces.requires_grad_()
    of_energy, of_forces = torch.autograd.grad(loss(energy, forces), (energy, forces))
    energies, slopes = dual_energies(model, graph, -of_forces)
    objective = (of_energy * energies).sum() + slopes.sum()
    return list(torch.autograd.grad(objective, list(model.parameters())))


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    scale = max(1e-3, *(float(x.norm()) for x in wanted))
    return max(float((a - b).norm()) / max(float(b.norm()), 1e-6 * scale) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_double_backward(name: str, batch: str) -> None:
    model = conservative(**MODELS[name])
    graph = graph_for(model, *BATCHES[batch]())
    assert largest_error(reverse_over_forward(model, graph), double_backward(model, graph)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_flat_layers_change_neither_names_nor_gradients(name: str) -> None:
    model = conservative(**MODELS[name])
    graph = graph_for(model, structures.slab())
    wanted, names = double_backward(model, graph), [name for name, _ in model.named_parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flatten_layers(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    assert largest_error(reverse_over_forward(model, graph), wanted) < 1e-10
    assert largest_error(double_backward(model, graph), wanted) < 1e-10
    # What DeepSpeed does to a module reaches the layers inside.
    model.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(graph.to("cpu", torch.float32)).energy.dtype == torch.float32
    for parameter in model.parameters():
        parameter.data.zero_()
    assert not model(graph.to("cpu", torch.float32)).energy.detach().any()


@pytest.mark.parametrize("flat_first", [True, False])
@pytest.mark.parametrize("how, calls", [("none", 2), ("block", 4)])
def test_flat_layers_are_recomputed_in_whichever_order_it_was_said(how: Any, calls: int, flat_first: bool) -> None:
    """A pass for forces and one on dual numbers, each of them twice where it is recomputed."""
    model = conservative("dimenetplusplus")
    graph = graph_for(model, structures.slab())
    wanted = double_backward(model, graph)
    if flat_first:
        flatten_layers(model)
    set_recompute(model, how)
    if not flat_first:
        flatten_layers(model)
    called: list[int] = []
    for holder in model.blocks:
        holder.register_forward_pre_hook(lambda *_: called.append(1))
    assert largest_error(reverse_over_forward(model, graph), wanted) < 1e-10
    assert len(called) == calls * len(model.blocks)


def test_whatever_a_flat_layer_gives_others_see_one_tensor() -> None:
    """ZeRO-3 gathers parameters once for each, and ranks whose graphs have more buckets would run ahead."""
    model = conservative("gemnet_t")
    graph = graph_for(model, structures.slab(), structures.water(periodic=False))
    assert len(graph.buckets.shapes) > 1
    flatten_layers(model)
    seen: list[int] = []
    for holder in (model.embedding, *model.blocks):
        holder.register_forward_hook(lambda *a: seen.append(sum(isinstance(x, Tensor) for x in tree_flatten(a[2])[0])))
    reverse_over_forward(model, graph)
    assert seen == [1] * 2 * (1 + len(model.blocks))


def states(model: AtomModel, graph: ExtendedGraph) -> list[Any]:
    """What each layer is given."""
    found: list[Any] = [graph.positions]
    for layer in model.layers[:-1]:
        found.append(layer(graph) if len(found) == 1 else layer(found[-1], graph))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_by_itself(name: str) -> None:
    """The gradient, of parameters and inputs, of the slope of a random sum of outputs along a random direction."""
    model = conservative(**MODELS[name])
    graph = graph_for(model, structures.slab(), structures.water(periodic=False))
    generator = torch.Generator().manual_seed(0)

    def random_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    for number, state in enumerate(states(model, graph)):
        layer = model.layers[number]

        def function(value: Any, layer: Any = layer, number: int = number) -> Any:
            if number == 0:
                return layer(replace(graph, positions=value))
            if layer is model.layers[-1]:
                return graph.partition.total(layer.atom_energies(value, graph))
            return layer(value, graph)

        leaves, structure = tree_flatten(state)
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
        directions = [None if x is None else random_like(x) for x in leaves]
        value, direction = tree_unflatten(leaves, structure), tree_unflatten(directions, structure)
        tangents, _ = tree_flatten(with_tangents(function, value, direction)[1])
        outputs, _ = tree_flatten(function(value))
        weights = [None if t is None else random_like(t) for t in tangents]
        variables = [*layer.parameters(), *(x for x in leaves if x is not None)]

        def gradient(scalar: Tensor, variables: list[Tensor] = variables) -> list[Tensor]:
            if not scalar.requires_grad:  # of a layer that is linear and has no parameters
                return list(map(torch.zeros_like, variables))
            return list(torch.autograd.grad(scalar, variables, allow_unused=True, materialize_grads=True))

        moving = [(w, t, x) for w, t, x in zip(weights, tangents, outputs, strict=True) if t is not None]
        found = gradient(sum((w * t).sum() for w, t, _ in moving))
        given = [(x, d) for x, d in zip(leaves, directions, strict=True) if x is not None]
        inner = torch.autograd.grad(
            sum((w * x).sum() for w, _, x in moving),
            [x for x, _ in given],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        wanted = gradient(sum((g * d).sum() for g, (_, d) in zip(inner, given, strict=True)))
        assert largest_error(found, wanted) < 1e-10, f"layer {number}"


def test_the_comparison_notices_an_operation_that_loses_the_second_order() -> None:
    """layer_norm is one: its tangent is right and the gradient of the tangent is not."""

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x @ weight.t(), (6,)).sin().sum()

    torch.manual_seed(0)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x, direction = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    _, slope = with_tangents(layer, x, direction)
    found = torch.autograd.grad(slope, weight)
    x.requires_grad_()
    (inner,) = torch.autograd.grad(layer(x), x, create_graph=True)
    assert torch.allclose((inner * direction).sum(), slope)
    wanted = torch.autograd.grad((inner * direction).sum(), weight)
    assert largest_error(list(found), list(wanted)) > 1e-4


@pytest.mark.parametrize("dual", [False, True])
def test_linear_has_derivatives_of_every_kind(dual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if dual:
        monkeypatch.setattr(layers, "_on_dual_numbers", ContextVar("always", default=True))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    arguments = (random(5, 3), random(4, 3), random(4))
    assert torch.autograd.gradcheck(linear, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, arguments, check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(linear, arguments[:2], check_forward_ad=True)
