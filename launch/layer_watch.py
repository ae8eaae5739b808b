"""Looking at what each layer of a model gives while it runs, for norms (`norms.py`) and for errors (`trace.py`).

A layer is seen once for each time that the forward pass comes to it: what backward runs again (`recompute`) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from egnscale.models.layered import LayeredModel, inside

#: Called with a layer's number and what it made, by name; `dual` where these are values and tangents (`models.dual`).
See = Callable[[int, dict[str, Tensor], bool], None]


def layer_names(model: LayeredModel) -> list[str]:
    """ "0 Embedding", "1 Block", ..., as `exchanges.csv` has them."""
    return [f"{number} {type(inside(layer)).__name__}" for number, layer in enumerate(model.layers)]


def layers_of_parameters(module: nn.Module, model: LayeredModel) -> Callable[[str], int]:
    """Which layer of a model a parameter or buffer belongs to, by its name in a module that has the model in it."""
    numbers = {id(layer): number for number, layer in enumerate(model.layers)}
    prefixes = {f"{name}.": numbers[id(part)] for name, part in module.named_modules() if id(part) in numbers}
    return lambda name: next(number for prefix, number in prefixes.items() if name.startswith(prefix))


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """The leaves of a State, or of any nested tuple, in order: "h", "basis.rbf", ...; None where there is none."""
    if value is None or isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        fields = getattr(value, "_fields", range(len(value)))
        for field, item in zip(fields, value, strict=True):
            yield from named_tensors(item, f"{name}.{field}" if name else str(field))


@contextmanager
def watched_layers(model: LayeredModel, see: See) -> Iterator[None]:
    """Show what every layer but the last makes, each time it runs; what it only hands on is left out.

    Tensors are shown as they go to the next layer, with their gradient's history.
    """
    run, numbers = model.run, {id(layer): number for number, layer in enumerate(model.layers)}
    names: dict[int, list[str]] = {}

    def watched(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
        given = {_place(x) for _, x in named_tensors(args) if x is not None}
        result = run(layer, function, *args)
        number, leaves = numbers[id(layer)], list(named_tensors(result))
        dual = not hasattr(result, "_fields")  # `with_tangents` makes plain tuples, of the leaves of a State
        if dual:
            fields = names[number]
            leaves = list(zip([*fields, *(f"the tangent of {f}" for f in fields)], result, strict=True))
        else:
            names[number] = [name for name, _ in leaves]
        see(number, {name: x for name, x in leaves if x is not None and _place(x) not in given}, dual)
        return result

    model.run = watched
    try:
        yield
    finally:
        model.run = run


def _place(x: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor lies: DeepSpeed hands on tensors as other objects on the same memory."""
    return x.data_ptr(), x.shape
