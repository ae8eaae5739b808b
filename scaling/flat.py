"""Layers whose parameters DeepSpeed sees on one module each, under their ordinary names.

ZeRO-3 hooks every module that it finds, and what its hooks put around tensors knows no tangents. So where a layer runs
on dual numbers inside (`egnscale.models.dual`), its modules are hidden, and one module holds all its parameters: they
are gathered before the layer and released behind it. Gradients are then collected by a hook of each parameter, which
the differentiation of energies to positions does not set off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class FlatLayer(nn.Module):
    """Holds the parameters and buffers of another module, which is hidden in `body`; runs functions that use them."""

    body: nn.Module

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "body", body)  # unseen by nn.Module
        # Dotted names, which `register_parameter` refuses: a checkpoint then has the names that it always has.
        self._parameters.update(body.named_parameters())
        self._buffers.update(body.named_buffers())

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def train(self, mode: bool = True) -> FlatLayer:
        self.body.train(mode)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Parameters are changed in place and stay those of the body; buffers are replaced.
        self.body._apply(fn)
        self._parameters.update(self.body.named_parameters())
        self._buffers.update(self.body.named_buffers())
        return self


def flatten_layers(model: Any) -> None:
    """Let DeepSpeed see one module for each layer of a model; forward and the names of parameters stay the same."""
    layers = {id(layer): FlatLayer(layer) for layer in model.layers if any(True for _ in layer.parameters())}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                setattr(parent, name, layers[id(child)])
