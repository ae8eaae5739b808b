"""One graph over several ranks, as the paper has it (Figure 1b): triplets split, all-reduces in between.

* Triplets, the most numerous, are cut into contiguous equal shares, one for each rank. They are never communicated.
* Atoms and edges are whole on every rank, and so are their features: everyone updates all of them.
* Every aggregate is a sum over one's own share (of triplets, edges, atoms), then an all-reduce.

For any block that lists its triplets. It is there to compare with: `partition.py` owns edges by target, updates none of
them twice, and sends much less.

Of the gradients: a verb here maps the copies of all ranks to the copies of all ranks, and its backward is the exact
transpose of that map. What ranks compute alike from their copies needs no care: if all evaluate the same loss, the
mean over ranks of their gradients is the gradient (of parameters, and as well of anything else that all hold a copy of,
such as positions; one rank's gradient alone is not).

V atoms, E edges, T triplets, B systems, all of the whole graph; P parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from egnscale.models.graph import Change, ExtendedGraph, Pending, SegmentSum, Triplets, WholeGraph, segment_sum
from egnscale.scaling.collectives import Counts, GraphGroup, sum_over_parts
from egnscale.scaling.partition import fingerprint


@dataclass(frozen=True, eq=False)
class AllReduceExchange:
    """What a rank that holds a share of the triplets knows about the others."""

    atoms: Counts  #: in each part's share of the sums over atoms
    edges: Counts  #: in each part's share of the sums over edges
    fingerprint: int  #: of the whole graph, to notice ranks that hold different batches
    group: GraphGroup | None = None

    def join(self, group: GraphGroup) -> AllReduceExchange:
        """The same, able to reach the other parts."""
        return replace(self, group=group)

    def map(self, change: Change) -> AllReduceExchange:
        return self

    def collect(self, rows: Tensor) -> Tensor:
        """Rows of atoms are whole already."""
        return rows

    def partition(self, graph: ExtendedGraph) -> AllReducePartition:
        if self.group is None:
            raise ValueError("this is one part of a graph; `Mesh.place` joins it to the ranks that hold the others")
        part = self.group.rank
        return AllReducePartition(graph.held, _range(self.atoms, part), _range(self.edges, part), self.group)


@dataclass(frozen=True, eq=False)
class AllReducePartition:
    """The verbs where atoms and edges are whole on every rank, and triplets are not."""

    held: WholeGraph  #: with this part's triplets
    atoms: slice  #: this part's share of the sums over atoms
    edges: slice  #: this part's share of the sums over edges
    group: GraphGroup

    def gather_sources(self, h: Tensor, weight: Tensor | None = None) -> Pending:
        return self.held.gather_sources(h, weight)

    def swap(self, x: Tensor) -> Pending:
        return self.held.swap(x)

    def to_targets(self, x: Tensor) -> Pending:
        return self.held.to_targets(x)

    def to_sources(self, x: Tensor) -> Pending:
        return self.held.to_sources(x)

    def aggregate_triplets(self, x: Tensor) -> Tensor:
        return sum_over_parts(self.held.aggregate_triplets(x), self.group, "aggregate_triplets")

    def aggregate(self, x: Tensor, segment_sum: SegmentSum = segment_sum) -> Tensor:
        own = segment_sum(x[self.edges], self.held.target[self.edges], len(self.held.system))
        return sum_over_parts(own, self.group, "aggregate")

    def total(self, x: Tensor) -> Tensor:
        own = segment_sum(x[self.atoms], self.held.system[self.atoms], self.held.num_systems)
        return sum_over_parts(own, self.group, "total")

    def reduce(self, x: Tensor) -> Tensor:
        """A sum over the atoms or edges that each holds is the sum over all of them: here each holds all.

        So nothing is exchanged. A sum over this part's triplets, of which others hold the rest, is no argument for
        `reduce`: `aggregate_triplets` makes edge rows of it, which can be summed.
        """
        return x


def partition_by_triplets(graph: ExtendedGraph, parts: int, part: int) -> ExtendedGraph:
    """One part of a whole graph: all of its atoms and edges, and a share of its triplets.

    Args:
        graph: whole, on the CPU, with triplets.
        parts: P.
        part: which one, 0 .. P - 1.

    Raises:
        ValueError: if the graph does not list its triplets.
    """
    if graph.triplets is None:
        raise ValueError(
            "this partition shares out triplets, and the graph lists none; make a list with "
            "dataclasses.replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms)), or partition by owner"
        )
    sender, receiver = graph.triplets
    share = _range(_even_shares(len(receiver), parts), part)
    exchange = AllReduceExchange(
        atoms=_even_shares(graph.num_atoms, parts),
        edges=_even_shares(graph.num_edges, parts),
        fingerprint=fingerprint(graph),
    )
    # Cloned: a slice would keep, and send to other processes, the storage of the whole list.
    return replace(graph, triplets=Triplets(sender[share].clone(), receiver[share].clone()), exchange=exchange)


def bytes_per_block(
    graph: ExtendedGraph, parts: int, *, triplet: int, edge: int, node: int, dtype: torch.dtype = torch.float32
) -> dict[str, int]:
    """What each rank sends in the forward pass of one EGN block, by verb; the backward pass sends as much again.

    In a ring, a rank sends (P - 1) / P of an array while it is summed, and as much while the sum is handed out.

    Args:
        graph: whole, or any part of it by `partition_by_triplets`.
        parts: P.
        triplet, edge, node: features of what is summed into edges, into atoms and into systems.
        dtype: of the features; half-precision rows are summed in fp32.
    """
    item = max(dtype.itemsize, torch.float32.itemsize)
    numbers = {
        "aggregate_triplets": graph.num_edges * triplet,
        "aggregate": graph.num_atoms * edge,
        "total": graph.num_systems * node,
    }
    return {verb: 2 * (parts - 1) * count * item // parts for verb, count in numbers.items()}


def _even_shares(count: int, parts: int) -> Counts:
    """Sizes of contiguous shares that differ by at most one; some are zero where there is less than one for each."""
    return tuple((part + 1) * count // parts - part * count // parts for part in range(parts))


def _range(shares: Counts, part: int) -> slice:
    first = sum(shares[:part])
    return slice(first, first + shares[part])


__all__ = ["AllReduceExchange", "AllReducePartition", "bytes_per_block", "partition_by_triplets"]
