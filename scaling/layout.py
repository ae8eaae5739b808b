"""Which rank does what: the axes pipe x data x graph, and the process groups along them.

    pipe 1 x data 2 x graph 4 = 8 ranks
                graph 0  graph 1  graph 2  graph 3
        data 0        0        1        2        3
        data 1        4        5        6        7

Ranks that share a graph are consecutive, so that a launcher that fills node by node puts them on one node where they
fit. DeepSpeed is told nothing of the graph axis: every rank of a graph evaluates the same loss, verbs are exact
transposes, and DeepSpeed's mean over all ranks of a pipeline stage is then the right gradient, with no factor anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from egnscale.models.graph import ExtendedGraph, GraphExchange
from egnscale.scaling.collectives import Counts, GraphGroup, Site, Tally


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the three axes; the graph axis varies fastest.

    Raises:
        ValueError: for a size below one.
    """

    pipe: int = 1
    data: int = 1
    graph: int = 1

    def __post_init__(self) -> None:
        for axis in ("pipe", "data", "graph"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} is {getattr(self, axis)}; it must be at least 1")

    @classmethod
    def of_world(cls, size: int, *, graph: int = 1, pipe: int = 1) -> ParallelLayout:
        """The layout of a number of ranks, given how many share a graph and how many stages there are.

        Raises:
            ValueError: where they do not divide the ranks, with the numbers and what would.
        """
        together = cls(pipe=pipe, graph=graph)
        if size % (pipe * graph):
            possible = [p for p in range(1, size + 1) if size % p == 0 and (size // p) % pipe == 0]
            near = [p for p in possible if p <= graph][-3:] or possible[:3]
            advice = f"parallel.graph={' or '.join(map(str, near))}" if near else "another number of ranks"
            more = -(-size // (pipe * graph)) * pipe * graph
            raise ValueError(
                f"pipe({pipe}) x graph({graph}) = {pipe * graph} does not divide {size} rank{'s' * (size != 1)}; "
                f"try {advice}, or start {more} ranks"
            )
        return cls(together.pipe, size // (pipe * graph), together.graph)

    @property
    def size(self) -> int:
        return self.pipe * self.data * self.graph

    def rank(self, pipe: int = 0, data: int = 0, graph: int = 0) -> int:
        return (pipe * self.data + data) * self.graph + graph

    def place(self, rank: int) -> tuple[int, int, int]:
        """(pipe, data, graph) of a rank."""
        if not 0 <= rank < self.size:
            raise ValueError(f"there is no rank {rank} in {self}")
        rest, graph = divmod(rank, self.graph)
        return rest // self.data, rest % self.data, graph

    def graph_groups(self) -> list[tuple[int, ...]]:
        """Ranks that share a graph, group by group."""
        return [
            tuple(self.rank(pipe, data, graph) for graph in range(self.graph))
            for pipe in range(self.pipe)
            for data in range(self.data)
        ]

    def data_groups(self) -> list[tuple[int, ...]]:
        """Ranks that hold the same part of different graphs."""
        return [
            tuple(self.rank(pipe, data, graph) for data in range(self.data))
            for pipe in range(self.pipe)
            for graph in range(self.graph)
        ]

    def pipe_groups(self) -> list[tuple[int, ...]]:
        """The stages of one pipeline: ranks that hold the same part of the same graph."""
        return [
            tuple(self.rank(pipe, data, graph) for pipe in range(self.pipe))
            for data in range(self.data)
            for graph in range(self.graph)
        ]

    def __str__(self) -> str:
        ranks = f"{self.size} rank{'s' * (self.size != 1)}"
        return f"pipe {self.pipe} x data {self.data} x graph {self.graph} = {ranks}"

    def table(self) -> str:
        """The ranks, drawn."""
        width = max(len(f"graph {self.graph - 1}"), len(str(self.size - 1)))

        def line(name: str, cells: list[str]) -> str:
            margin = len(f"pipe {self.pipe - 1}  " * (self.pipe > 1) + f"data {self.data - 1}")
            return f"  {name:{margin}}  " + "  ".join(cell.rjust(width) for cell in cells)

        lines = [str(self), line("", [f"graph {graph}" for graph in range(self.graph)])]
        for pipe in range(self.pipe):
            for data in range(self.data):
                name = f"pipe {pipe}  " * (self.pipe > 1) + f"data {data}"
                lines.append(line(name, [str(self.rank(pipe, data, graph)) for graph in range(self.graph)]))
        return "\n".join(lines)


@dataclass(frozen=True)
class Mesh:
    """This rank's place in a layout, and its process groups."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    data_group: dist.ProcessGroup | None  #: None: this replica is alone
    graph_group: GraphGroup | None  #: None: every rank has whole graphs
    pipe_group: dist.ProcessGroup | None = None  #: None: every rank has all layers

    @classmethod
    def of_world(cls, device: torch.device, *, graph: int = 1, pipe: int = 1) -> Mesh:
        """Make the groups. Collective over the world, which has been started.

        Raises:
            ValueError: as `ParallelLayout.of_world`.
        """
        layout = ParallelLayout.of_world(dist.get_world_size(), graph=graph, pipe=pipe)
        rank = dist.get_rank()
        data_group, graph_group, pipe_group = None, None, None
        # Every rank takes part in making every group, its own or not.
        if layout.data > 1:
            for ranks in layout.data_groups():
                group = dist.new_group(list(ranks))
                data_group = group if rank in ranks else data_group
        if layout.graph > 1:
            for ranks in layout.graph_groups():
                group, control = dist.new_group(list(ranks)), dist.new_group(list(ranks), backend="gloo")
                if rank in ranks:
                    graph_group = GraphGroup(ranks, ranks.index(rank), group, control)
        if layout.pipe > 1:
            for ranks in layout.pipe_groups():
                group = dist.new_group(list(ranks))
                pipe_group = group if rank in ranks else pipe_group
        return cls(layout, rank, device, data_group, graph_group, pipe_group)

    @property
    def stage(self) -> int:
        return self.layout.place(self.rank)[0]

    @property
    def data_rank(self) -> int:
        return self.layout.place(self.rank)[1]

    @property
    def graph_rank(self) -> int:
        return self.layout.place(self.rank)[2]

    def sum_over_data(self, x: Tensor) -> Tensor:
        """Sum of a small tensor over replicas; what it sums is the same on all ranks of a graph."""
        x = x.clone()
        if self.data_group is not None:
            dist.all_reduce(x, group=self.data_group)
        return x

    def sum_over_stages(self, x: Tensor) -> Tensor:
        """Sum over the stages of this pipeline."""
        x = x.clone()
        if self.pipe_group is not None:
            dist.all_reduce(x, group=self.pipe_group)
        return x

    def place(self, graph: ExtendedGraph) -> ExtendedGraph:
        """A graph on this rank's device, joined to the parts that others hold. Collective over its ranks.

        Raises:
            ValueError: on each of them, if they hold parts of different graphs; naming them.
        """
        graph = graph.to(self.device)
        if self.graph_group is None:
            return graph
        exchange = _shared(graph)
        fact = (
            f"{graph.num_systems} structures",
            f"{sum(exchange.edges)} edges",
            f"checksum {exchange.fingerprint:08x}",
        )
        self.graph_group.compare(fact, "the batch")
        return replace(graph, exchange=exchange.join(self.graph_group))

    def name_layers(self, layers: Sequence[nn.Module]) -> None:
        """Let exchanges be counted by the layer of a model that asks for them."""
        if self.graph_group is not None:
            self.graph_group.traffic.name_layers(layers)

    def traffic(self) -> dict[Site, Tally]:
        """What this rank exchanged with those that share its graphs, since the last time."""
        return self.graph_group.traffic.read() if self.graph_group is not None else {}

    def collect(self, rows: Tensor, graph: ExtendedGraph) -> Tensor:
        """(V, F) rows of this part's atoms -> (N, F), of all atoms as the batch numbers them. Without gradient."""
        return rows if graph.exchange is None else _shared(graph).collect(rows)


class SharedExchange(Protocol):
    """What a mesh asks of the exchange of any partition."""

    @property
    def edges(self) -> Counts: ...  # of each part; together, of the whole graph

    @property
    def fingerprint(self) -> int: ...  # of the whole graph

    def join(self, group: GraphGroup) -> GraphExchange: ...

    def collect(self, rows: Tensor) -> Tensor: ...


def _shared(graph: ExtendedGraph) -> SharedExchange:
    assert graph.exchange is not None, "a whole graph, where ranks share graphs"
    return cast(SharedExchange, graph.exchange)
