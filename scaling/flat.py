"""Layers whose parameters DeepSpeed sees on one module each, under their ordinary names.

ZeRO-3 hooks every module that it finds, and what its hooks put around tensors knows no tangents. So where a layer runs
on dual numbers inside (`egnscale.models.dual`), its modules are hidden, and one module holds all its parameters: they
are gathered before the layer and released behind it. Gradients are then collected by a hook of each parameter, which
the differentiation of energies to positions does not set off.

ZeRO-3 gathers a module's parameters for backward once for every tensor that the module has given, and expects to do so
equally often on all ranks and in every step: else ranks gather ahead of each other and wait for ever. Layers give as
many tensors as their graph has buckets. So what ZeRO-3 is shown of a result is one number, the `_Join` of it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class _Join(torch.autograd.Function):
    """Tensors as they are, and a token: backward goes on once the token's and theirs are all through."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return (tensors[0].new_zeros(()), *(x.view_as(x) for x in tensors))

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


class _Part(torch.autograd.Function):
    """Tensors as they are, given a token of `_Join`, which has a gradient wherever one of them has."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (torch.zeros_like(*ctx.saved_tensors), *grads)


class FlatLayer(nn.Module):
    """Holds the parameters and buffers of another module, which is hidden in `body`; runs functions that use them."""

    body: nn.Module

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "body", body)  # unseen by nn.Module
        # Dotted names, which `register_parameter` refuses: a checkpoint then has the names that it always has.
        self._parameters.update(body.named_parameters())
        self._buffers.update(body.named_buffers())

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        token, result = super().__call__(function, *args)
        leaves, structure = result()
        if token is not None:
            moving = [i for i, x in enumerate(leaves) if _moves(x)]
            for i, x in zip(moving, _Part.apply(token, *(leaves[i] for i in moving)), strict=True):
                leaves[i] = x
        return tree_unflatten(leaves, structure)

    def forward(self, function: Callable[..., Any], *args: Any) -> tuple[Tensor | None, Callable[[], Any]]:
        """A token for the result, None where it has no gradient, and the result, in which nobody finds tensors."""
        leaves, structure = tree_flatten(function(*args))
        moving = [i for i, x in enumerate(leaves) if _moves(x)]
        if not moving:
            return None, lambda: (leaves, structure)
        token, *joined = _Join.apply(*(leaves[i] for i in moving))
        for i, x in zip(moving, joined, strict=True):
            leaves[i] = x
        return token, lambda: (leaves, structure)

    def train(self, mode: bool = True) -> FlatLayer:
        self.body.train(mode)
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Parameters are changed in place and stay those of the body; buffers are replaced.
        self.body._apply(fn)
        self._parameters.update(self.body.named_parameters())
        self._buffers.update(self.body.named_buffers())
        return self


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def flatten_layers(model: Any) -> None:
    """Let DeepSpeed see one module for each layer of a model; forward and the names of parameters stay the same."""
    layers = {id(layer): FlatLayer(layer) for layer in model.layers if any(True for _ in layer.parameters())}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in layers:
                setattr(parent, name, layers[id(child)])
