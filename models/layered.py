"""A model as a list of layers, and the one place through which it runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

from egnscale.models.graph import ExtendedGraph
from egnscale.models.remake import remaking

#: Calls `function(*args)`, which uses a layer's parameters: (layer, function, *args). Others may recompute it in
#: backward, or bring the parameters from where they are.
Run = Callable[..., Any]


def call(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """The plain `Run`; through the module that holds the layer's parameters, where it is another one."""
    return function(*args) if inside(layer) is layer else layer(function, *args)


def inside(layer: nn.Module) -> nn.Module:
    """What a layer computes, where it is another module that holds its parameters (`egnscale.scaling.flat`)."""
    return getattr(layer, "body", layer)


def modules_by_name(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a model, those of layers that others hold parameters for among them."""
    for name, module in model.named_modules():
        yield name, module
        if inside(module) is not module:
            yield from inside(module).named_modules(prefix=name)


class Blocks(nn.ModuleList):
    """The layers between the first and the last."""


class LayeredModel(nn.Module):
    """`[Embedding, Block, ..., Block, Readout]`: the first takes the graph, the others (State, graph).

    A State is a NamedTuple of tensors and of further tuples. What follows from positions alone is in its field
    `geometry`, which `embedding.geometry(graph)` makes without parameters: it need not travel from one process to
    another.
    """

    #: The class of its states.
    State: ClassVar[type[Any]]

    embedding: nn.Module
    blocks: Blocks
    readout: Any

    #: Context in which what is cheap to make again (`cheap`) is not kept for the backward pass.
    remaking = staticmethod(remaking)

    def __init__(self) -> None:
        super().__init__()
        #: Runs every layer but the last. Whoever wants to keep less for the backward pass puts something else in its
        #: place, which takes and returns the same.
        self.run: Run = call

    @property
    def layers(self) -> list[Any]:
        """The model as a list: the first takes the graph, the others (State, graph)."""
        return [self.embedding, *self.blocks, self.readout]

    def geometry(self, graph: ExtendedGraph) -> Any:
        """What layers know from positions alone."""
        embedding: Any = inside(self.embedding)
        return embedding.geometry(graph)

    def state(self, graph: ExtendedGraph) -> Any:
        """What the readout sees."""
        state = self.run(self.embedding, inside(self.embedding), graph)
        for block in self.blocks:
            state = self.run(block, inside(block), state, graph)
        return state

    def forward(self, graph: ExtendedGraph) -> Any:
        return self.readout(self.state(graph), graph)
