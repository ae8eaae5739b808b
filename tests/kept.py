"""What a forward pass keeps for backward, measured: bytes of tensors that are alive once it is over.

On the meta device that takes no memory, so models can be measured at their full sizes.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egnscale.models import ExtendedGraph


class Made(TorchDispatchMode):
    """The storages of all tensors that operations give back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known[0].expired():
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        """{storage: bytes}"""
        gc.collect()
        return {key: size for key, (storage, size) in self.storages.items() if not storage.expired()}


def there_before(model: nn.Module, graph: ExtendedGraph) -> set[int]:
    """Storages of parameters, buffers and the graph."""
    found = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    graph.map(lambda x: found.add(x.untyped_storage()._cdata) or x)  # type: ignore[func-returns-value]
    return found


def kept_bytes(model: nn.Module, graph: ExtendedGraph) -> int:
    """Bytes kept between forward and backward, over what was there before."""
    with Made() as made:
        prediction = model(graph)
    alive, before = made.alive(), there_before(model, graph)
    assert prediction is not None  # holds what is kept
    return sum(size for key, size in alive.items() if key not in before)


def saved_bytes(model: nn.Module, graph: ExtendedGraph) -> int:
    """The same as autograd's hooks see it: bytes that operations ask to be kept. Blind inside other hooks."""
    saved: dict[int, int] = {}
    held = []  # else an address could be that of another tensor later

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held.append(storage)
        saved[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        prediction = model(graph)
    assert prediction is not None
    before = there_before(model, graph)
    return sum(size for key, size in saved.items() if key not in before)
