"""Some consecutive layers of a model, as one process of a pipeline runs them.

Between stages travels what a State holds but its geometry: that follows from positions alone, which every stage has
with its graph, and is made anew where the state arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from egnscale.models.dual import DualState, dual_embedding, dual_geometry, dual_layer, dual_readout
from egnscale.models.forces import EnergyModel, Prediction
from egnscale.models.graph import ExtendedGraph
from egnscale.models.layered import Blocks, LayeredModel, inside

#: The tensors of a State that travel, in order; None where it has none.
Leaves = Sequence[Tensor | None]


class Stage:
    """Layers begin..end - 1 of a model; the last stage has its readout.

    Args:
        model: the whole of it. Only the parameters of these layers are used.
        begin, end: numbers of layers, in the order of `model.layers`.

    Raises:
        ValueError: for a stage without parameters.
    """

    def __init__(self, model: LayeredModel, begin: int, end: int) -> None:
        self.model, self.begin, self.end = model, begin, end
        if not 0 <= begin < min(end, len(model.layers) - 1) or end > len(model.layers):
            raise ValueError(f"layers {begin}..{end - 1} of {len(model.layers)} are no stage: they have no parameters")
        self.last = end == len(model.layers)
        #: Those that run before a state is handed on.
        self.layers: list[nn.Module] = model.layers[begin : end - 1 if self.last else end]
        self.structure = _structure(model.State)

    # Plain numbers

    def state(self, graph: ExtendedGraph, arrived: Leaves | None = None) -> Any:
        """The state behind these layers, from what the stage before sent (None: this is the first)."""
        model, layers = self.model, list(self.layers)
        if arrived is None:
            first = layers.pop(0)
            state = model.run(first, inside(first), graph)
        else:
            state = self.arrival(arrived, graph)
        for layer in layers:
            state = model.run(layer, inside(layer), state, graph)
        return state

    def arrival(self, arrived: Leaves, graph: ExtendedGraph) -> Any:
        """The state that the stage before sent."""
        return tree_unflatten(list(arrived), self.structure)._replace(geometry=self.model.geometry(graph))

    def leaves(self, state: Any) -> Leaves:
        """What of a state travels."""
        return tree_flatten(state._replace(geometry=None))[0]

    def prediction(self, state: Any, graph: ExtendedGraph) -> Prediction:
        """Of the last stage: energies, and forces where the model has a head for them."""
        return self.model.readout(state, graph)

    def atom_energies(self, state: Any, graph: ExtendedGraph) -> Tensor:
        """(V, 1) of the last stage: what each atom adds to the energy of its system."""
        return self.model.readout.atom_energies(state, graph)

    # Dual numbers

    def dual_state(self, graph: ExtendedGraph, displacement: Tensor, arrived: Leaves | None = None) -> DualState:
        """`state`, and its derivative along a displacement (V, 3) of the atoms."""
        model, layers = self._energy_model, list(self.layers)
        if arrived is None:
            state = dual_embedding(model, layers.pop(0), graph, displacement)
        else:
            half = len(arrived) // 2
            geometry = dual_geometry(model, graph, displacement)
            value, tangent = (
                tree_unflatten(list(part), self.structure)._replace(geometry=of_positions)
                for part, of_positions in zip((arrived[:half], arrived[half:]), geometry, strict=True)
            )
            state = value, tangent
        for layer in layers:
            state = dual_layer(model, layer, state, graph)
        return state

    def dual_leaves(self, state: DualState) -> Leaves:
        value, tangent = state
        return [*self.leaves(value), *self.leaves(tangent)]

    def dual_energies(self, state: DualState, graph: ExtendedGraph) -> tuple[Tensor, Tensor]:
        """(B,) energies and (B,) their derivatives, of the last stage."""
        return dual_readout(self._energy_model, state, graph)

    @property
    def _energy_model(self) -> EnergyModel:
        assert isinstance(self.model, EnergyModel)
        return self.model


def at_positions(graph: ExtendedGraph) -> tuple[ExtendedGraph, Tensor]:
    """The graph with positions of its own (V, 3), to differentiate in."""
    positions = graph.positions.detach().requires_grad_()
    return replace(graph, positions=positions), positions


def _structure(state: type[Any]) -> TreeSpec:
    """The nesting of a State without geometry, from the types of its fields."""

    def example(kind: Any) -> Any:
        if not hasattr(kind, "_fields"):
            return None
        hints = get_type_hints(kind)
        return kind(*(None if name == "geometry" else example(hints[name]) for name in kind._fields))

    return tree_flatten(example(state))[1]


@contextmanager
def only_layers(begin: int, end: int, layers: int) -> Iterator[None]:
    """Within, a model is built that has only some of its parameters; the others are on the meta device.

    Each layer is made, so that random numbers are those of the whole model, and forgotten at once. Buffers stay.

    Args:
        begin, end: layers to keep.
        layers: how many there are.
    """

    def forget_others(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
        if layer is None:
            return
        if isinstance(parent, Blocks):
            number = 1 + int(name)
        elif isinstance(parent, LayeredModel) and name in ("embedding", "readout"):
            number = 0 if name == "embedding" else layers - 1
        else:
            return
        if not begin <= number < end:
            _forget_parameters(layer)

    hook = register_module_module_registration_hook(forget_others)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _forget_parameters(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
