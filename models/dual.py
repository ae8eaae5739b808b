"""The directional derivative of a model's energy along displacements of its atoms, layer by layer.

Training on conservative forces needs the gradient of a gradient. With F = -dE/dx, a loss L(E, F), and its derivatives
g = dL/dE and v = dL/dF at the current prediction,

    dL/dtheta = d/dtheta [ g . E(x) + Edot ],        Edot = the derivative of E along xdot = -v,

g and v held fixed. So the parameter gradient follows from one forward pass on dual numbers (x, xdot) and one ordinary
backward: reverse over forward. Unlike double backward, it has no second-order graph, so activations may be recomputed,
and every layer runs forward and backward once, as DeepSpeed's ZeRO-3 expects.

A layer takes and gives plain tensors, each with its tangent or without; the dual level lives inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from egnscale.models.forces import EnergyModel
from egnscale.models.graph import ExtendedGraph
from egnscale.models.layered import inside
from egnscale.models.layers import dual_numbers


def _directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def with_tangents(
    function: Callable[[Any], Any], value: Any, tangent: Any, run: Callable[..., Any] = _directly
) -> tuple[Any, Any]:
    """`function(value)` and its derivative along `tangent`, both differentiable in reverse.

    Args:
        function: of one argument, a tensor or nested tuples of tensors.
        value, tangent: its argument, and a direction of the same structure; None where a tensor has none.
        run: calls the function of plain tensors that this comes down to.
    """
    primals, structure = tree_flatten(value)
    tangents, _ = tree_flatten(tangent)
    assert len(primals) == len(tangents), "a tangent for each tensor, or None"
    made: list[Any] = []

    def plain(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        with dual_numbers():
            pairs = zip(tensors[: len(primals)], tensors[len(primals) :], strict=True)
            args = [x if t is None else forward_ad.make_dual(x, t) for x, t in pairs]
            outputs, of_result = tree_flatten(function(tree_unflatten(args, structure)))
            made.append(of_result)
            unpacked = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in outputs]
        return (*(x for x, _ in unpacked), *(t for _, t in unpacked))

    outputs = run(plain, *primals, *tangents)
    half = len(outputs) // 2
    return tree_unflatten(outputs[:half], made[0]), tree_unflatten(outputs[half:], made[0])


def dual_energies(model: EnergyModel, graph: ExtendedGraph, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) energies and (B,) their derivatives along `displacement` (V, 3), both differentiable in the parameters."""
    first, *others, _ = model.layers
    state = dual_embedding(model, first, graph, displacement)
    for layer in others:
        state = dual_layer(model, layer, state, graph)
    return dual_readout(model, state, graph)


#: A State, and the derivative of each of its tensors; None where it has none.
DualState = tuple[Any, Any]


def dual_embedding(model: EnergyModel, first: nn.Module, graph: ExtendedGraph, displacement: Tensor) -> DualState:
    """What a model's first layer makes of a graph whose atoms move along `displacement`."""

    def embed(positions: Tensor) -> Any:
        return inside(first)(replace(graph, positions=positions))

    return with_tangents(embed, graph.positions.detach(), displacement, partial(model.run, first))


def dual_layer(model: EnergyModel, layer: nn.Module, state: DualState, graph: ExtendedGraph) -> DualState:
    """What one of its blocks makes of a state."""
    return with_tangents(partial(_update, inside(layer), graph), *state, partial(model.run, layer))


def dual_readout(model: EnergyModel, state: DualState, graph: ExtendedGraph) -> tuple[Tensor, Tensor]:
    """(B,) energies and (B,) their derivatives."""

    def energies(state: Any) -> Tensor:
        return graph.partition.total(model.readout.atom_energies(state, graph)).squeeze(-1)

    return with_tangents(energies, *state)


def dual_geometry(model: EnergyModel, graph: ExtendedGraph, displacement: Tensor) -> DualState:
    """What layers know from positions alone, along `displacement`; no parameter has a part in it."""

    def geometry(positions: Tensor) -> Any:
        return model.geometry(replace(graph, positions=positions))

    with torch.no_grad():
        return with_tangents(geometry, graph.positions.detach(), displacement)


def _update(layer: nn.Module, graph: ExtendedGraph, state: Any) -> Any:
    return layer(state, graph)
