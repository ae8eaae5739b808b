"""The graph that a model sees, and the verbs with which it moves data along that graph.

`ExtendedGraph` is the paper's (u, V, E, T): systems, atoms, directed edges, and the triplets of edges that share a
target atom. Triplets are never listed: edges are sorted by target, so all triplets around an atom are the pairs of one
run of edges, and `EdgeBuckets` arranges those runs into a few dense batches.

`GraphPartition` is the protocol of the verbs; `WholeGraph` is its one-process null object. A model calls verbs and
never learns how many ranks there are. Where several share a graph, each holds the atoms that it owns and the edges into
them, and V, E, T count those.

Shapes in this file: V atoms, E edges, T triplets, B systems, R rows of the bucketed layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

SegmentSum = Callable[[Tensor, Tensor, int], Tensor]
Change = Callable[[Tensor], Tensor]


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


def take_rows(x: Tensor, index: Tensor, transpose: Tensor) -> Tensor:
    """x[index], for an index whose transpose is known: gradients are gathered too, never scattered."""
    return _TakeRows.apply(x, index, transpose)


class EdgeBuckets(NamedTuple):
    """The edges of each atom as rows of a few dense (atoms, degree) batches, by degree.

    A bucket holds n atoms whose degree is at most d, a multiple of 8 and less than d + 8 from it, so little is padded
    and d suits matrix hardware. A padding row repeats an edge of its atom; whoever multiplies with padded rows gives
    them zero weight (`mask`), which makes `pad` and `unpad` exact transposes of each other.
    """

    slots: Tensor  #: (R,) int64, the edge in each row
    rows: Tensor  #: (E,) int64, the row of each edge
    mask: Tensor  #: (R,) bool, False in padding rows
    atoms: Tensor  #: (sum of n,) int64, the atom of each batch item; atoms without edges are in no bucket
    shapes: tuple[tuple[int, int], ...]  #: (n, d) of each bucket; sum of n * d is R

    @classmethod
    def build(cls, degree: Tensor, multiple: int = 8) -> EdgeBuckets:
        """Arrange edges that are sorted by their atom (the target; or the source, of leaving edges).

        Args:
            degree: (V,) int64, number of edges of each atom.
            multiple: granularity of bucket widths.
        """
        start = torch.cumsum(degree, 0) - degree
        width = (degree + multiple - 1) // multiple * multiple
        slots, masks, members, shapes = [], [], [], []
        # Without any edge: one bucket of no atoms, so that every layer still runs.
        for d in torch.unique(width[width > 0]).tolist() or [multiple]:
            atoms = torch.nonzero(width == d).flatten()
            column = torch.arange(d).expand(len(atoms), d)
            real = column < degree[atoms, None]
            slots.append((start[atoms, None] + torch.where(real, column, 0)).flatten())
            masks.append(real.flatten())
            members.append(atoms)
            shapes.append((len(atoms), d))
        slot, mask = torch.cat(slots), torch.cat(masks)
        rows = torch.empty(int(degree.sum()), dtype=torch.int64)
        rows[slot[mask]] = torch.nonzero(mask).flatten()
        return cls(slot, rows, mask, torch.cat(members), tuple(shapes))

    def pad(self, x: Tensor) -> Tensor:
        """(E, F) -> (R, F)."""
        return take_rows(x, self.slots, self.rows)

    def unpad(self, x: Tensor) -> Tensor:
        """(R, F) -> (E, F)."""
        return take_rows(x, self.rows, self.slots)

    def split(self, x: Tensor) -> list[Tensor]:
        """(R, ...) -> one (n, d, ...) view for each bucket."""
        sizes = [n * d for n, d in self.shapes]
        return [part.view(n, d, *x.shape[1:]) for part, (n, d) in zip(x.split(sizes), self.shapes, strict=True)]

    def map(self, change: Change) -> EdgeBuckets:
        return EdgeBuckets(change(self.slots), change(self.rows), change(self.mask), change(self.atoms), self.shapes)


class Triplets(NamedTuple):
    """Ordered pairs of different edges into one atom, listed: for models that want a feature for each triplet."""

    sender: Tensor  #: (T,) int64, the edge whose message is taken
    receiver: Tensor  #: (T,) int64, the edge that gathers it, ascending

    @classmethod
    def build(cls, target: Tensor, num_atoms: int) -> Triplets:
        """All triplets of edges that are sorted by `target` (E,)."""
        degree = torch.bincount(target, minlength=num_atoms)
        first = torch.cumsum(degree, 0) - degree
        peers = degree[target]  # edges into the atom that the edge goes to, itself included
        receiver = torch.repeat_interleave(torch.arange(len(target)), peers)
        number = torch.arange(len(receiver)) - torch.repeat_interleave(torch.cumsum(peers, 0) - peers, peers)
        sender = first[target[receiver]] + number
        different = sender != receiver
        return cls(sender[different], receiver[different])

    def map(self, change: Change) -> Triplets:
        return Triplets(change(self.sender), change(self.receiver))


class LeavingEdges(NamedTuple):
    """Edges once more, by the atom that they leave: for models that gather at the source (DimeNet++).

    L edges leave the atoms that are held here, E enter them; of a whole graph these are the same edges.
    """

    source: Tensor  #: (L,) int64, ascending
    order: Tensor  #: (L,) int64, for each leaving edge its row among the entering ones, or E and up: another process's
    rows: Tensor  #: (E,) int64, for each entering edge its row among the leaving ones, or L and up
    back: Tensor  #: (L,) int64, for each leaving edge the row of its reverse among the entering ones; -1: there is none
    forth: Tensor  #: (E,) int64, for each entering edge the row of its reverse among the leaving ones; likewise
    buckets: EdgeBuckets  #: of leaving edges

    @classmethod
    def build(cls, source: Tensor, reverse: Tensor, num_atoms: int) -> LeavingEdges:
        """Those of a whole graph: of `source` (E,) and `reverse` (E,) as `ExtendedGraph` has them."""
        order = torch.argsort(source, stable=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order))
        back = reverse[order]
        forth = torch.where(reverse < 0, -1, rows[reverse]) if len(rows) else rows
        degree = torch.bincount(source, minlength=num_atoms)
        return cls(source[order], order, rows, back, forth, EdgeBuckets.build(degree))

    def turned(self, x: Tensor) -> Tensor:
        """(E, F) rows of entering edges -> (L, F), of each leaving edge's reverse; zero where there is none."""
        if not len(self.back) or not len(self.forth):
            return x.new_zeros(len(self.back), x.shape[1])
        # `take_rows` knows no missing rows: they stand as row 0, and weigh nothing at either end.
        missing_there, missing_here = (rows[:, None] < 0 for rows in (self.forth, self.back))
        taken = take_rows(x.masked_fill(missing_there, 0), self.back.clamp(min=0), self.forth.clamp(min=0))
        return taken.masked_fill(missing_here, 0)

    def map(self, change: Change) -> LeavingEdges:
        source, order, rows, back, forth = map(change, (self.source, self.order, self.rows, self.back, self.forth))
        return LeavingEdges(source, order, rows, back, forth, self.buckets.map(change))


class Pending(Protocol):
    """Rows that may still be under way. Work that does not need them goes between the verb and `wait`."""

    def wait(self) -> Tensor: ...


class Arrived(NamedTuple):
    """Rows that were here all along."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


class GraphPartition(Protocol):
    """Who owns which rows, and the exchanges between owners. On one rank: `WholeGraph`.

    Every verb is linear, and its derivative is its exact transpose, which is differentiable in turn; all have a jvp.
    Verbs are collective: all who share a graph call them in the same order, whether or not they own anything.
    """

    def gather_sources(self, h: Tensor, weight: Tensor | None = None) -> Pending:
        """(V, F) atom rows -> (E, F), the row of each edge's source atom; with `weight` (G, F): of h W^T, (E, G)."""
        ...

    def swap(self, x: Tensor) -> Pending:
        """(E, F) edge rows -> (E, F), the row of each edge's reverse edge."""
        ...

    def to_targets(self, x: Tensor) -> Pending:
        """(L, F) rows of edges that leave the atoms here -> (E, F), rows of those that enter them."""
        ...

    def to_sources(self, x: Tensor) -> Pending:
        """(E, F) rows of edges that enter the atoms here -> (L, F), rows of those that leave them."""
        ...

    def aggregate_triplets(self, x: Tensor) -> Tensor:
        """(T, F) rows of `ExtendedGraph.triplets` -> (E, F), summed over the triplets that an edge receives."""
        ...

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        """(E, F) edge rows -> (V, F), summed over the edges into each atom."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """(V, F) atom rows -> (B, F), summed over the atoms of each system; the same for all who share the graph."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """Sum over the whole graph, for all who share it, from each one's sum over the atoms or edges that it holds."""
        ...


@dataclass(frozen=True, eq=False)
class WholeGraph:
    """The verbs where one process holds the whole graph."""

    source: Tensor
    target: Tensor
    reverse: Tensor
    system: Tensor
    num_systems: int
    triplets: Triplets | None = None
    leaving: LeavingEdges | None = None

    def gather_sources(self, h: Tensor, weight: Tensor | None = None) -> Pending:
        # Atoms are projected before they are gathered: edges outnumber them by one to two orders of magnitude.
        h = h if weight is None else h @ weight.t()
        return Arrived(h.index_select(0, self.source))

    def swap(self, x: Tensor) -> Pending:
        return Arrived(take_rows(x, self.reverse, self.reverse))

    def to_targets(self, x: Tensor) -> Pending:
        assert self.leaving is not None, "the graph was built without leaving edges"
        return Arrived(take_rows(x, self.leaving.rows, self.leaving.order))

    def to_sources(self, x: Tensor) -> Pending:
        assert self.leaving is not None, "the graph was built without leaving edges"
        return Arrived(take_rows(x, self.leaving.order, self.leaving.rows))

    def aggregate_triplets(self, x: Tensor) -> Tensor:
        assert self.triplets is not None, "the graph was built without triplets"
        return segment_sum(x, self.triplets.receiver, len(self.target))

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        return segment_sum(x, self.target, len(self.system))

    def total(self, x: Tensor) -> Tensor:
        return segment_sum(x, self.system, self.num_systems)

    def reduce(self, x: Tensor) -> Tensor:
        return x


class GraphExchange(Protocol):
    """How several processes that share a graph reach each other's rows: index lists, built along with the graph."""

    def partition(self, graph: ExtendedGraph) -> GraphPartition: ...

    def map(self, change: Change) -> Self: ...


def _mapped(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return value.map(change) if hasattr(value, "map") else value


@dataclass(frozen=True, eq=False)
class ExtendedGraph:
    """A batch of systems as one graph, or the part of it that one process holds.

    Immutable; edges are sorted by target. GemNet's graphs are closed under reversal.
    """

    positions: Tensor  #: (V, 3) float, A
    atomic_numbers: Tensor  #: (V,) int64
    system: Tensor  #: (V,) int64, the system of each atom, ascending
    num_systems: int  #: B
    source: Tensor  #: (E,) int64, the neighbour, where a message comes from; V and up: another process's atom
    target: Tensor  #: (E,) int64, the atom that a message goes to, ascending
    shift: Tensor  #: (E, 3) float, A, added to the source's position to reach the periodic image meant
    reverse: Tensor  #: (E,) int64, index of the edge target -> source through the opposite image; -1: there is none
    buckets: EdgeBuckets
    triplets: Triplets | None = None  #: listed only for models that ask for it
    leaving: LeavingEdges | None = None  #: likewise
    exchange: GraphExchange | None = None  #: None: this is the whole graph

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
        """The verbs."""
        if self.exchange is not None:
            return self.exchange.partition(self)
        return self.held

    @property
    def held(self) -> WholeGraph:
        """The verbs on what is held here, exchanging nothing."""
        indices = (self.source, self.target, self.reverse, self.system)
        return WholeGraph(*indices, self.num_systems, self.triplets, self.leaving)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ExtendedGraph:
        """Copy to a device; `dtype` also converts the floating-point fields."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype=dtype if x.is_floating_point() else None, non_blocking=True)

        return self.map(move)

    def pin_memory(self) -> ExtendedGraph:
        """Copy to page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Change) -> ExtendedGraph:
        """The same graph with every tensor changed."""
        return replace(self, **{field.name: _mapped(getattr(self, field.name), change) for field in fields(self)})
