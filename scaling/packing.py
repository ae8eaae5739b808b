"""Tensors of any shapes and precisions as one flat tensor, bit for bit, and back: what stages of a pipeline exchange.

DeepSpeed goes backward through a stage once for every floating-point tensor that it sent, and wants a gradient of each.
So there is one, of fp32 numbers that are never computed with: they carry the bits of whatever was packed. Gradients
come back the same way, each in its tensor's own precision. What the flat tensor holds is told by a tensor of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
_NOTHING = -1
#: Every tensor begins at a multiple of so many bytes.
_ALIGNED = 8


class Entry(NamedTuple):
    """What one packed tensor was."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """fp32 numbers that its bits take."""
        size = prod(self.shape) * self.dtype.itemsize
        return -(-size // _ALIGNED) * (_ALIGNED // 4)


Entries = tuple[Entry | None, ...]


def pack(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Entries]:
    """One flat fp32 tensor of the bits of all, through which gradients flow, and what is in it.

    It is never empty: a part of a graph without edges sends something, too.
    """
    entries = tuple(None if x is None else Entry(tuple(x.shape), x.dtype) for x in tensors)
    return _Pack.apply(*(x for x in tensors if x is not None)), entries


def unpack(flat: Tensor, entries: Entries) -> list[Tensor | None]:
    """What was packed: floating-point tensors have gradients where `flat` has."""
    there = tuple(entry for entry in entries if entry is not None)
    tensors = iter(_Unpack.apply(flat, there))
    return [None if entry is None else next(tensors) for entry in entries]


def write_entries(entries: Entries) -> list[int]:
    """As integers: (dtype, dimensions, sizes...) of each, -1 for nothing."""
    numbers = []
    for entry in entries:
        numbers += [_NOTHING] if entry is None else [_DTYPES.index(entry.dtype), len(entry.shape), *entry.shape]
    return numbers


def read_entries(numbers: Sequence[int]) -> Entries:
    """The inverse of `write_entries`."""
    rest = iter(numbers)
    entries: list[Entry | None] = []
    for kind in rest:
        if kind == _NOTHING:
            entries.append(None)
        else:
            dimensions = next(rest)
            entries.append(Entry(tuple(next(rest) for _ in range(dimensions)), _DTYPES[kind]))
    return tuple(entries)


def _joined(tensors: Sequence[Tensor | None], entries: Sequence[Entry], device: torch.device) -> Tensor:
    flat = torch.zeros(max(1, sum(entry.words for entry in entries)), dtype=torch.float32, device=device)
    for into, x, entry in zip(_parts(flat, entries), tensors, entries, strict=True):
        if x is not None:
            into.copy_(x.detach().reshape(entry.shape))
    return flat


def _parts(flat: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Views of the bits of each tensor."""
    found, at = [], 0
    for entry in entries:
        bits = flat[at : at + entry.words].view(torch.uint8)[: prod(entry.shape) * entry.dtype.itemsize]
        found.append(bits.view(entry.dtype).view(entry.shape))
        at += entry.words
    return found


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.entries = [Entry(tuple(x.shape), x.dtype) for x in tensors]
        return _joined(tensors, ctx.entries, tensors[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Copies: the buffer that gradients arrive in is used again.
        return tuple(
            part.clone() if needed and part.is_floating_point() else None
            for needed, part in zip(ctx.needs_input_grad, _parts(grad.contiguous(), ctx.entries), strict=True)
        )


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, entries: tuple[Entry, ...]) -> tuple[Tensor, ...]:
        ctx.entries, ctx.size, ctx.device = entries, flat.shape, flat.device
        ctx.set_materialize_grads(False)
        tensors = tuple(part.clone() for part in _parts(flat, entries))
        ctx.mark_non_differentiable(*(x for x in tensors if not x.is_floating_point()))
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        return _joined(grads, ctx.entries, ctx.device), None
