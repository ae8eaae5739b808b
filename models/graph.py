"""The graph that a model sees, and the verbs with which it moves data along that graph.

`ExtendedGraph` is the paper's (u, V, E, T): systems, atoms, directed edges, and the triplets of edges that share a
target atom. Triplets are never listed: edges are sorted by target, so all triplets around an atom are the pairs of one
run of edges, and `EdgeBuckets` arranges those runs into a few dense batches.

`GraphPartition` is the protocol of the verbs; `WholeGraph` is its one-process null object. A model calls verbs and
never learns how many ranks there are.

Shapes in this file: V atoms, E edges, B systems, R rows of the bucketed layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

SegmentSum = Callable[[Tensor, Tensor, int], Tensor]


def segment_sum(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum the rows of `x` (N, ...) that share an `index` (N,) into (size, ...).

    Out-of-place `index_add`: twice differentiable, and native for every dtype. Sums of half-precision rows are
    accumulated in fp32 and returned in fp32: CUDA's atomics would otherwise round after every addition.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return x.new_zeros((size, *x.shape[1:])).index_add(0, index, x)


class _TakeRows(torch.autograd.Function):
    """x[index], given the index of the transpose, so that backward is a gather too (no atomics, deterministic)."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, transpose: Tensor) -> Tensor:
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, index, transpose = inputs
        ctx.save_for_backward(index, transpose)
        ctx.save_for_forward(index, transpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, transpose = ctx.saved_tensors
        return _TakeRows.apply(grad, transpose, index), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        index, transpose = ctx.saved_tensors
        return _TakeRows.apply(tangent, index, transpose)


class EdgeBuckets(NamedTuple):
    """The edges of each atom as rows of a few dense (atoms, degree) batches, by degree.

    A bucket holds n atoms whose degree is at most d, a multiple of 8 and less than d + 8 from it, so little is padded
    and d suits matrix hardware. A padding row repeats an edge of its atom; whoever multiplies with padded rows gives
    them zero weight (`mask`), which makes `pad` and `unpad` exact transposes of each other.
    """

    slots: Tensor  #: (R,) int64, the edge in each row
    rows: Tensor  #: (E,) int64, the row of each edge
    mask: Tensor  #: (R,) bool, False in padding rows
    shapes: tuple[tuple[int, int], ...]  #: (n, d) of each bucket; sum of n * d is R

    @classmethod
    def build(cls, degree: Tensor, multiple: int = 8) -> EdgeBuckets:
        """Arrange edges that are sorted by target.

        Args:
            degree: (V,) int64, number of edges of each atom.
            multiple: granularity of bucket widths.
        """
        start = torch.cumsum(degree, 0) - degree
        width = (degree + multiple - 1) // multiple * multiple
        slots, masks, shapes = [], [], []
        # Without any edge: one bucket of no atoms, so that every layer still runs.
        for d in torch.unique(width[width > 0]).tolist() or [multiple]:
            atoms = torch.nonzero(width == d).flatten()
            column = torch.arange(d).expand(len(atoms), d)
            real = column < degree[atoms, None]
            slots.append((start[atoms, None] + torch.where(real, column, 0)).flatten())
            masks.append(real.flatten())
            shapes.append((len(atoms), d))
        slot, mask = torch.cat(slots), torch.cat(masks)
        rows = torch.empty(int(degree.sum()), dtype=torch.int64)
        rows[slot[mask]] = torch.nonzero(mask).flatten()
        return cls(slot, rows, mask, tuple(shapes))

    def pad(self, x: Tensor) -> Tensor:
        """(E, F) -> (R, F)."""
        return _TakeRows.apply(x, self.slots, self.rows)

    def unpad(self, x: Tensor) -> Tensor:
        """(R, F) -> (E, F)."""
        return _TakeRows.apply(x, self.rows, self.slots)

    def split(self, x: Tensor) -> list[Tensor]:
        """(R, ...) -> one (n, d, ...) view for each bucket."""
        sizes = [n * d for n, d in self.shapes]
        return [part.view(n, d, *x.shape[1:]) for part, (n, d) in zip(x.split(sizes), self.shapes, strict=True)]


class GraphPartition(Protocol):
    """Who owns which rows, and the exchanges between owners. On one rank: `WholeGraph`."""

    def gather_sources(self, h: Tensor) -> Tensor:
        """(V, F) atom rows -> (E, F), the row of each edge's source atom."""
        ...

    def swap(self, x: Tensor) -> Tensor:
        """(E, F) edge rows -> (E, F), the row of each edge's reverse edge."""
        ...

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        """(E, F) edge rows -> (V, F), summed over the edges into each atom."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """(V, F) atom rows -> (B, F), summed over the atoms of each system."""
        ...


@dataclass(frozen=True, eq=False)
class WholeGraph:
    """The verbs where one process holds the whole graph."""

    source: Tensor
    target: Tensor
    reverse: Tensor
    system: Tensor
    num_systems: int

    def gather_sources(self, h: Tensor) -> Tensor:
        return h.index_select(0, self.source)

    def swap(self, x: Tensor) -> Tensor:
        return _TakeRows.apply(x, self.reverse, self.reverse)

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        return segment_sum(x, self.target, len(self.system))

    def total(self, x: Tensor) -> Tensor:
        return segment_sum(x, self.system, self.num_systems)


@dataclass(frozen=True, eq=False)
class ExtendedGraph:
    """A batch of systems as one graph. Immutable; edges are sorted by target and closed under reversal."""

    positions: Tensor  #: (V, 3) float, A
    atomic_numbers: Tensor  #: (V,) int64
    system: Tensor  #: (V,) int64, the system of each atom, ascending
    num_systems: int  #: B
    source: Tensor  #: (E,) int64, the neighbour, where a message comes from
    target: Tensor  #: (E,) int64, the atom that a message goes to, ascending
    shift: Tensor  #: (E, 3) float, A, added to the source's position to reach the periodic image meant
    reverse: Tensor  #: (E,) int64, index of the edge target -> source through the opposite image
    buckets: EdgeBuckets

    @property
    def num_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def num_edges(self) -> int:
        return len(self.source)

    @property
    def num_triplets(self) -> int:
        """Ordered pairs of different edges into the same atom."""
        degree = torch.bincount(self.target, minlength=self.num_atoms)
        return int((degree * (degree - 1)).sum())

    @cached_property
    def partition(self) -> GraphPartition:
        return WholeGraph(self.source, self.target, self.reverse, self.system, self.num_systems)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ExtendedGraph:
        """Copy to a device; `dtype` also converts the floating-point fields."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                floating = dtype is not None and value.is_floating_point()
                return value.to(device, dtype=dtype if floating else None, non_blocking=True)
            if isinstance(value, EdgeBuckets):
                return EdgeBuckets(*(move(item) for item in value))
            return value

        return replace(self, **{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> ExtendedGraph:
        """Copy to page-locked memory (called by `torch.utils.data.DataLoader`)."""

        def pin(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.pin_memory()
            if isinstance(value, EdgeBuckets):
                return EdgeBuckets(*(pin(item) for item in value))
            return value

        return replace(self, **{field.name: pin(getattr(self, field.name)) for field in fields(self)})
