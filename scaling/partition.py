"""One graph over several ranks, edges owned by their target atom.

Every rank builds the whole graph's index lists (cheap, in its loader's workers), keeps the part that it owns, and knows
from the lists alone what to exchange with whom: nothing about the graph is ever communicated.

* Atoms, sorted by system and by position along an axis, are cut into contiguous parts of equal edge counts
  (`cut_by_edges`): products over edges are 89 to 97 % of a model's operations. An edge belongs to its target's owner.
* Sums over triplets that share a target, and sums of edges into atoms, then need no exchange at all.
* Rows of source atoms that others own (the halo) and rows of reverse edges that others own are exchanged.

V atoms, E edges, N = V of the whole graph; P parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from egnscale.models.graph import (
    Change,
    EdgeBuckets,
    ExtendedGraph,
    LeavingEdges,
    Pending,
    SegmentSum,
    Triplets,
    WholeGraph,
    segment_sum,
    take_rows,
)
from egnscale.scaling.collectives import Counts, Exchange, GraphGroup, sum_over_parts


class Route(NamedTuple):
    """Which rows go to which part, and how many come from there."""

    rows: Tensor  #: (S,) int64, rows that are sent, those for part 0 first
    sent: Counts  #: P numbers, their sum is S
    received: Counts  #: P numbers

    def post(self, x: Tensor, group: GraphGroup, verb: str) -> Exchange:
        return Exchange(x.index_select(0, self.rows), group, verb, self.sent, self.received)


@dataclass(frozen=True, eq=False)
class OwnerExchange:
    """What a rank that owns some atoms, and the edges into them, knows about the others."""

    order: Tensor  #: (N,) int64, the batch's atoms part by part
    sizes: Counts  #: atoms of each part
    edges: Counts  #: edges of each part
    halo: Route  #: rows of atoms; what is received stands behind one's own rows
    cut: Route  #: rows of edges whose reverse edge is another's; received in the order in which they are sent
    out: Route  #: rows of leaving edges that enter others' atoms; what is received stands behind one's own rows
    back: Route  #: rows of entering edges that left others' atoms; likewise
    fingerprint: int  #: of the whole graph, to notice ranks that hold different batches
    group: GraphGroup | None = None

    def join(self, group: GraphGroup) -> OwnerExchange:
        """The same, able to reach the other parts."""
        return replace(self, group=group)

    def map(self, change: Change) -> OwnerExchange:
        def route(way: Route) -> Route:
            return way._replace(rows=change(way.rows))

        halo, cut, out, back = map(route, (self.halo, self.cut, self.out, self.back))
        return replace(self, order=change(self.order), halo=halo, cut=cut, out=out, back=back)

    def collect(self, rows: Tensor) -> Tensor:
        """(V, F) rows of this part's atoms -> (N, F), of all atoms as the batch numbers them. Without gradient."""
        assert self.group is not None
        padded = rows.new_zeros(max(self.sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(found, padded.contiguous(), group=self.group.process_group)
        whole = rows.new_empty(len(self.order), *rows.shape[1:])
        whole[self.order] = torch.cat([part[:size] for part, size in zip(found, self.sizes, strict=True)])
        return whole

    def partition(self, graph: ExtendedGraph) -> OwnerPartition:
        if self.group is None:
            raise ValueError("this is one part of a graph; `Mesh.place` joins it to the ranks that hold the others")
        return OwnerPartition(graph.held, self.halo, self.cut, self.out, self.back, self.group)


@dataclass(frozen=True, eq=False)
class OwnerPartition:
    """The verbs on a part of a graph."""

    own: WholeGraph  #: sources that others own are numbered V and up; a cut edge is its own reverse
    halo: Route
    cut: Route
    out: Route
    back: Route
    group: GraphGroup

    def gather_sources(self, h: Tensor, weight: Tensor | None = None) -> Pending:
        # The product acts row by row: it is made on whichever side of the exchange rows are narrower.
        if weight is not None and weight.shape[0] < weight.shape[1]:
            h, weight = h @ weight.t(), None
        way = self.halo.post(h, self.group, "gather_sources")
        own = h if weight is None else h @ weight.t()

        def finish() -> Tensor:
            others = way.wait()
            others = others if weight is None else others @ weight.t()
            return torch.cat([own, others]).index_select(0, self.own.source)

        return _Pending(finish)

    def swap(self, x: Tensor) -> Pending:
        way = self.cut.post(x, self.group, "swap")

        def finish() -> Tensor:
            mixed = x.index_copy(0, self.cut.rows, way.wait())
            return take_rows(mixed, self.own.reverse, self.own.reverse)

        return _Pending(finish)

    def to_targets(self, x: Tensor) -> Pending:
        assert self.own.leaving is not None, "the graph was built without leaving edges"
        return self._with_others(x, self.out, self.own.leaving.rows, "to_targets")

    def to_sources(self, x: Tensor) -> Pending:
        assert self.own.leaving is not None, "the graph was built without leaving edges"
        return self._with_others(x, self.back, self.own.leaving.order, "to_sources")

    def _with_others(self, x: Tensor, route: Route, index: Tensor, verb: str) -> Pending:
        way = route.post(x, self.group, verb)
        return _Pending(lambda: torch.cat([x, way.wait()]).index_select(0, index))

    def aggregate_triplets(self, x: Tensor) -> Tensor:
        return self.own.aggregate_triplets(x)

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        return self.own.aggregate(x, segment_sum)

    def total(self, x: Tensor) -> Tensor:
        return sum_over_parts(self.own.total(x), self.group, "total")

    def reduce(self, x: Tensor) -> Tensor:
        return sum_over_parts(x, self.group, "reduce")


class _Pending(NamedTuple):
    wait: Callable[[], Tensor]


def partition_by_owner(
    graph: ExtendedGraph, coordinates: Tensor, parts: int, part: int
) -> tuple[ExtendedGraph, Tensor]:
    """One part of a whole graph, and (V,) the atoms that it owns, as the whole graph numbers them.

    Args:
        graph: whole, on the CPU.
        coordinates: (N, 3) float, positions of atoms along the axes to cut along: fractional ones, wrapped into the
            cell, where there is a cell.
        parts: P.
        part: which one, 0 .. P - 1.
    """
    order, sizes = cut_by_edges(graph, coordinates, parts)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))  # in `order`, of each atom
    owner = torch.repeat_interleave(torch.arange(parts), torch.tensor(sizes))[position]
    first = sum(sizes[:part])
    atoms = order[first : first + sizes[part]]

    source, target = graph.source, graph.target
    mine = torch.nonzero(owner[target] == part).flatten()
    mine = mine[torch.argsort(position[target[mine]], stable=True)]  # by target, then as in the whole graph
    local_target = position[target[mine]] - first

    # Sources: own atoms by their row, others behind them, in the order of parts.
    remote = owner[source[mine]] != part
    halo = torch.unique(position[source[mine][remote]])
    at = position[source[mine]]
    local_source = torch.where(remote, len(atoms) + torch.searchsorted(halo, at), at - first)

    # Own atoms that are sources of others' edges, once for each part that needs them.
    needed = (owner[source] == part) & (owner[target] != part)
    wanted = torch.unique(owner[target[needed]] * len(order) + position[source[needed]])
    to, row = wanted // max(len(order), 1), wanted % max(len(order), 1) - first

    # Cut edges: both ends of a pair sort their edge by the same key, so what is sent and received lines up.
    row_of = torch.empty_like(source)
    row_of[mine] = torch.arange(len(mine))
    reverse = graph.reverse[mine]
    cut = torch.nonzero(remote & (reverse >= 0)).flatten()
    pair = torch.minimum(mine[cut], reverse[cut])
    cut = cut[torch.argsort(owner[source[mine[cut]]] * len(source) + pair)]
    across = _counts(owner[source[mine[cut]]], parts)

    # The same edges from their other end, and both ends list those between two parts in the whole graph's order.
    leaving, out, back = None, _no_route(parts), _no_route(parts)
    if graph.leaving is not None:
        left = torch.nonzero(owner[source] == part).flatten()
        left = left[torch.argsort(position[source[left]], stable=True)]
        leaving, out, back = _leaving(mine, left, owner, position[source[left]] - first, graph, len(atoms), part, parts)

    exchange = OwnerExchange(
        order=order,
        sizes=sizes,
        edges=_counts(owner[target], parts),
        halo=Route(row, _counts(to, parts), _counts(owner[order[halo]], parts)),
        cut=Route(cut, across, across),
        out=out,
        back=back,
        fingerprint=fingerprint(graph, order, torch.tensor(sizes)),
    )
    owned = ExtendedGraph(
        positions=graph.positions[atoms],
        atomic_numbers=graph.atomic_numbers[atoms],
        system=graph.system[atoms],
        num_systems=graph.num_systems,
        source=local_source,
        target=local_target,
        shift=graph.shift[mine],
        reverse=torch.where(reverse < 0, -1, torch.where(remote, torch.arange(len(mine)), row_of[reverse])),
        buckets=EdgeBuckets.build(torch.bincount(local_target, minlength=len(atoms))),
        triplets=None if graph.triplets is None else Triplets.build(local_target, len(atoms)),
        leaving=leaving,
        exchange=exchange,
    )
    return owned, atoms


def _leaving(
    mine: Tensor,
    left: Tensor,
    owner: Tensor,
    source: Tensor,
    graph: ExtendedGraph,
    num_atoms: int,
    part: int,
    parts: int,
) -> tuple[LeavingEdges, Route, Route]:
    """Leaving edges of a part, and the routes between leaving and entering rows.

    Args:
        mine, left: (E,), (L,) int64, the edges that enter and leave this part's atoms, as the whole graph numbers them.
        owner: (N,) int64, the part of each atom.
        source: (L,) int64, the row of each leaving edge's source.
        num_atoms: of this part.
    """

    def rows(edges: Tensor, others: Tensor, end: Tensor) -> tuple[Tensor, Route]:
        """For each of `edges` its row in `others` or behind them; and what the part at their `end` is sent of them."""
        at = torch.full((graph.num_edges,), -1)
        at[others] = torch.arange(len(others))
        found, there = at[edges], owner[end[edges]]
        away = torch.nonzero(there != part).flatten()
        away = away[torch.argsort(there[away] * graph.num_edges + edges[away])]
        found[away] = len(others) + torch.arange(len(away))
        across = _counts(there[away], parts)
        return found, Route(away, across, across)

    entering_rows, back = rows(mine, left, graph.source)
    leaving_rows, out = rows(left, mine, graph.target)
    # What one way is sent, the other way is received.
    out, back = out._replace(received=back.sent), back._replace(received=out.sent)

    def turned(edges: Tensor, others: Tensor) -> Tensor:
        """For each of `edges` the row of its reverse in `others`, which hold it if there is one; or -1."""
        at = torch.full((graph.num_edges + 1,), -1)  # the last entry stands for no edge
        at[others] = torch.arange(len(others))
        return at[graph.reverse[edges]]

    buckets = EdgeBuckets.build(torch.bincount(source, minlength=num_atoms))
    found = LeavingEdges(source, leaving_rows, entering_rows, turned(left, mine), turned(mine, left), buckets)
    return found, out, back


def _no_route(parts: int) -> Route:
    return Route(torch.zeros(0, dtype=torch.int64), (0,) * parts, (0,) * parts)


def cut_by_edges(graph: ExtendedGraph, coordinates: Tensor, parts: int) -> tuple[Tensor, Counts]:
    """Atoms in an order whose contiguous parts have equal numbers of edges, and the number of atoms in each part.

    Systems stay together. Within a system atoms are sorted along the one of three axes that cuts the fewest edges:
    which one that is depends on the system's shape (cutting a periodic axis costs two faces), so all three are counted.
    """
    degree = torch.bincount(graph.target, minlength=graph.num_atoms)
    cost = degree if graph.num_edges else torch.ones_like(degree)
    best = torch.zeros(graph.num_systems, dtype=torch.int64)
    fewest = torch.full((graph.num_systems,), graph.num_edges + 1)
    for axis in range(3):
        order = _lexsort(coordinates[:, axis], graph.system)
        sizes = _even_cut(cost[order], parts)
        owner = torch.empty_like(order)
        owner[order] = torch.repeat_interleave(torch.arange(parts), torch.tensor(sizes))
        is_cut = owner[graph.source] != owner[graph.target]
        cuts = torch.bincount(graph.system[graph.target[is_cut]], minlength=graph.num_systems)
        best, fewest = torch.where(cuts < fewest, axis, best), torch.minimum(cuts, fewest)
    along = coordinates.gather(1, best[graph.system][:, None])[:, 0]
    order = _lexsort(along, graph.system)
    return order, _even_cut(cost[order], parts)


def _lexsort(minor: Tensor, major: Tensor) -> Tensor:
    order = torch.argsort(minor, stable=True)
    return order[torch.argsort(major[order], stable=True)]


def _even_cut(cost: Tensor, parts: int) -> Counts:
    """Cut a row of costs into contiguous parts, the largest of which is as small as it can be."""
    before = torch.cat([cost.new_zeros(1), torch.cumsum(cost, 0)])
    total, count = int(before[-1]), len(cost)
    low, high = max(-(-total // parts), int(cost.max()) if count else 0), total

    def ends(limit: int) -> list[int]:
        """Where parts end if each takes as much as `limit` allows."""
        found = [0]
        for _ in range(parts):
            found.append(int(torch.searchsorted(before, before[found[-1]] + limit, right=True)) - 1)
        return found

    while low < high:
        limit = (low + high) // 2
        low, high = (low, limit) if ends(limit)[-1] == count else (limit + 1, high)
    found = ends(low)
    return tuple(b - a for a, b in pairwise(found))


def _counts(owner: Tensor, parts: int) -> Counts:
    return tuple(torch.bincount(owner, minlength=parts).tolist())


def fingerprint(graph: ExtendedGraph, *cut: Tensor) -> int:
    """A checksum of a whole graph, and of how it is cut: every rank finds both out by itself."""
    value = zlib.crc32(str(graph.positions.dtype).encode())
    for tensor in (graph.positions, graph.atomic_numbers, graph.system, graph.source, graph.target, graph.shift, *cut):
        value = zlib.crc32(tensor.contiguous().numpy().tobytes(), value)
    return value


__all__ = ["OwnerExchange", "OwnerPartition", "Route", "cut_by_edges", "fingerprint", "partition_by_owner"]
