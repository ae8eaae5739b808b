"""Results that are cheaper to make again than to keep.

A model marks them, `y = cheap(make, *inputs)`, which is `y = make(*inputs)`. Inside `remaking()`, autograd does not
keep such a y for the backward pass: where an operation would save it, the recipe is saved, and y is made again when it
is asked for. What goes into a recipe is kept, or has a recipe in turn.

Exact: the same operation on the same inputs gives the same bits, for derivatives of every order. What models mark is
element-wise, a narrow product or a sum over triplets: nothing is exchanged and no wide product made a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class Recipe(NamedTuple):
    """How to make a tensor again."""

    make: Callable[..., Tensor]
    inputs: tuple[Kept, ...]


class View(NamedTuple):
    """What is kept in place of a tensor: how to make it again, or a parameter; and which view of that it is."""

    of: Recipe | nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  #: from where the whole begins, which is elsewhere each time that a parameter is put back


Kept = Tensor | View


def unpack(kept: Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        whole = kept.of if isinstance(kept.of, nn.Parameter) else kept.of.make(*map(unpack, kept.of.inputs))
        return whole.detach().as_strided(kept.size, kept.stride, int(whole.storage_offset()) + kept.offset)


class _Book:
    """The recipes of one `remaking()`, found by the storage of what they made: views of it are found as well."""

    def __init__(self) -> None:
        # A weak reference keeps the storage's address from being used again, not its memory.
        self.recipes: dict[int, tuple[StorageWeakRef, Recipe]] = {}

    def note(self, made: Tensor, make: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        storage = made.untyped_storage()
        if any(x.untyped_storage()._cdata == storage._cdata for x in inputs):
            return  # nothing new was made
        self.recipes[storage._cdata] = (StorageWeakRef(storage), Recipe(make, tuple(map(self.kept, inputs))))

    def kept(self, x: Tensor) -> Kept:
        _, recipe = self.recipes.get(x.untyped_storage()._cdata, (None, None))
        return x.detach() if recipe is None else View(recipe, x.size(), x.stride(), int(x.storage_offset()))

    def pack(self, x: Tensor) -> Kept:
        # What shards parameters (ZeRO-3) takes them away after forward and puts them back for the operation's backward.
        # The parameter is kept, therefore, and not the rows that it had: those of all layers would be the whole model.
        if x.is_leaf and x.requires_grad:
            return x
        if isinstance(x._base, nn.Parameter):
            return View(x._base, x.size(), x.stride(), int(x.storage_offset() - x._base.storage_offset()))
        return self.kept(x)


_book: ContextVar[_Book | None] = ContextVar("_book", default=None)


@contextmanager
def remaking() -> Iterator[None]:
    """Within, what `cheap` makes is not kept for the backward pass but made again."""
    book = _Book()
    token = _book.set(book)
    try:
        with torch.autograd.graph.saved_tensors_hooks(book.pack, unpack):
            yield
    finally:
        _book.reset(token)


def cheap(make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`make(*inputs)`, which costs little to make again. `make` is a pure function."""
    made = make(*inputs)
    book = _book.get()
    if book is not None:
        book.note(made, make, inputs)
    return made
