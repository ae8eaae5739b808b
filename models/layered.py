"""A model as a list of layers, and the one place through which it runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from egnscale.models.remake import remaking

#: Calls a layer: (layer, *its arguments) -> what it returns.
Run = Callable[..., Any]


def call(layer: nn.Module, *args: Any) -> Any:
    return layer(*args)


class LayeredModel(nn.Module):
    """`[Embedding, Block, ..., Block, Readout]`: the first takes the graph, the others (State, graph).

    A State is a NamedTuple of tensors and of further tuples.
    """

    #: Context in which what is cheap to make again (`cheap`) is not kept for the backward pass.
    remaking = staticmethod(remaking)

    def __init__(self) -> None:
        super().__init__()
        #: Runs every layer but the last. Whoever wants to keep less for the backward pass puts something else in its
        #: place, which takes and returns the same.
        self.run: Run = call

    @property
    def layers(self) -> list[nn.Module]:
        raise NotImplementedError
