"""Exchanges of rows among the ranks that share a graph: differentiable, overlapped with other work, and counted.

An exchange is two operations, `post` and `arrive`, so that others fit in between. Each is the transpose of the other:
backward posts the opposite exchange where forward waited, and waits where forward posted. Because autograd runs
backward in the reverse order of forward, what overlaps in forward overlaps in backward too. Both are differentiable any
number of times.

A dual number (`torch.autograd.forward_ad`) travels as one row, its value and its tangent side by side: a pass on dual
numbers exchanges twice the bytes of a plain one in the same number of messages, backward and in a replay as well.

What autograd sees between the two is a token, a scalar that stands for the exchange; the rows themselves arrive in a
buffer that nobody can read too early.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

Counts = tuple[int, ...]


class Site(NamedTuple):
    """Where an exchange belongs."""

    layer: str  #: of the model, by whoever names layers (`Traffic.layer`)
    verb: str
    direction: str  #: forward, backward or, where backward runs a layer again, replay


@dataclass
class Tally:
    """What one site has exchanged on this rank."""

    calls: int = 0
    bytes: int = 0  #: sent to other ranks
    seconds: float = 0.0  #: waited for rows that had not arrived


class Traffic:
    """Counts exchanges and the time spent waiting for them.

    On a CUDA device waiting blocks the stream, not the process, and is measured with events.
    """

    def __init__(self) -> None:
        self.layer = ""
        self.direction = "forward"  #: or "replay", of exchanges that are no backward ones
        self.tallies: defaultdict[Site, Tally] = defaultdict(Tally)
        self._events: deque[tuple[Tally, torch.cuda.Event, torch.cuda.Event]] = deque()

    def name_layers(self, layers: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Count by layer from now on: "0 Embedding", "1 Block", ... Returns the hooks that do it."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: setattr(self, "layer", name)

        hooks = []
        for number, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(enter(f"{number} {type(layer).__name__}")))
            hooks.append(layer.register_forward_hook(enter("")))
        return hooks

    def site(self, verb: str) -> Site:
        return Site(self.layer, verb, self.direction)

    def count(self, site: Site, sent: int) -> None:
        tally = self.tallies[site]
        tally.calls, tally.bytes = tally.calls + 1, tally.bytes + sent

    def wait(self, site: Site, work: dist.Work | None, device: torch.device) -> None:
        tally = self.tallies[site]
        if work is None:
            return
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work.wait()
            end.record()
            self._events.append((tally, begin, end))
            while self._events and self._events[0][2].query():  # those that have passed: maybe nobody ever reads
                self._settle()
        else:
            begun = time.perf_counter()
            work.wait()
            tally.seconds += time.perf_counter() - begun

    def read(self) -> dict[Site, Tally]:
        """What was counted since the last reading."""
        while self._events:
            self._settle()
        found = dict(self.tallies)
        self.tallies.clear()
        return found

    def _settle(self) -> None:
        tally, begin, end = self._events.popleft()
        end.synchronize()
        tally.seconds += begin.elapsed_time(end) / 1e3


def added(tallies: Iterable[Tally]) -> Tally:
    """The sum of several tallies."""
    total = Tally()
    for tally in tallies:
        total.calls, total.bytes = total.calls + tally.calls, total.bytes + tally.bytes
        total.seconds += tally.seconds
    return total


@dataclass
class GraphGroup:
    """The ranks that share a graph, as one of them sees them.

    Args:
        ranks: of the world, in the order of their parts.
        rank: this one's place among them.
        process_group: carries rows.
        control: a gloo group, for small facts held on the CPU.
    """

    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup
    control: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)
    _agreed: set[tuple] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in the order of parts."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, fact: tuple, what: str) -> None:
        """Compare a fact with the other ranks, once for each fact; ranks that differ would wait for each other.

        Raises:
            ValueError: on every rank, naming who holds what.
        """
        if fact in self._agreed:
            return
        self._agreed.add(fact)
        self.compare(fact, what)

    def start_all_to_all(self, buffer: Tensor, rows: Tensor, received: Counts, sent: Counts) -> dist.Work | None:
        return dist.all_to_all_single(buffer, rows, list(received), list(sent), group=self.process_group, async_op=True)

    def start_all_reduce(self, x: Tensor) -> dist.Work | None:
        return dist.all_reduce(x, group=self.process_group, async_op=True)

    def compare(self, fact: tuple, what: str) -> None:
        """As `agree`, every time."""
        facts = self.gather(fact)
        if any(other != facts[0] for other in facts):
            held = "; ".join(
                f"rank {rank}: {', '.join(map(str, f))}" for rank, f in zip(self.ranks, facts, strict=True)
            )
            raise ValueError(f"ranks that share a graph disagree about {what} ({held})")


class CountedGroup(GraphGroup):
    """A rank's view of ranks that are not there: everything is counted and nothing exchanged.

    With tensors on the meta device, a model's forward and backward foretell its traffic at no cost.
    """

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(tuple(range(size)), rank, None, None)  # type: ignore[arg-type]

    def start_all_to_all(self, buffer: Tensor, rows: Tensor, received: Counts, sent: Counts) -> None:
        return None

    def start_all_reduce(self, x: Tensor) -> None:
        return None

    def compare(self, fact: tuple, what: str) -> None:
        pass


@dataclass
class _Flight:
    """One exchange under way; `back` is that of its backward."""

    group: GraphGroup
    site: Site
    sent: Counts
    received: Counts
    rows: Tensor | None = None
    buffer: Tensor | None = None
    work: dist.Work | None = None
    back: _Flight | None = None

    def reversed(self) -> _Flight:
        site = self.site._replace(direction="backward")
        return _Flight(self.group, site, sent=self.received, received=self.sent)

    def post(self, rows: Tensor) -> None:
        group = self.group
        shape = tuple(rows.shape[1:])
        group.agree((self.site.verb, shape, str(rows.dtype), rows.device.type), f"the rows of `{self.site.verb}`")
        self.rows = rows.contiguous()  # kept until it has gone
        self.buffer = rows.new_empty((sum(self.received), *shape))
        self.work = group.start_all_to_all(self.buffer, self.rows, self.received, self.sent)
        group.traffic.count(self.site, rows.numel() * rows.element_size())

    def arrive(self) -> Tensor:
        assert self.buffer is not None
        self.group.traffic.wait(self.site, self.work, self.buffer.device)
        buffer = self.buffer
        self.rows = self.buffer = self.work = None
        return buffer


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, flight: _Flight) -> Tensor:
        flight.post(rows)
        return rows.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.flight = inputs[1]

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return _Arrive.apply(token, ctx.flight.back), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(token: Tensor, flight: _Flight) -> Tensor:
        return flight.arrive()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.flight = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.back = ctx.flight.reversed()
        return _Post.apply(grad, ctx.flight.back), None


def _paired(x: Tensor) -> tuple[Tensor, bool]:
    """(N, ...) dual numbers -> plain (N, 2, ...), value and tangent of each row, and True; anything else as it is.

    Whether rows have tangents follows from the model and is the same on all ranks, also where there are no rows.
    """
    value, tangent = forward_ad.unpack_dual(x)
    return (x, False) if tangent is None else (torch.stack([value, tangent], min(1, x.dim())), True)


def _dual(pairs: Tensor) -> Tensor:
    """The inverse of `_paired`, for pairs."""
    return forward_ad.make_dual(*pairs.unbind(min(1, pairs.dim() - 1)))


class Exchange:
    """Rows on their way: `sent[p]` of them to part p, `received[p]` from there, both in the order of parts.

    Args:
        rows: (sum(sent), F), those for part 0 first.
    """

    def __init__(self, rows: Tensor, group: GraphGroup, verb: str, sent: Counts, received: Counts) -> None:
        self._flight = _Flight(group, group.traffic.site(verb), sent, received)
        rows, self._pairs = _paired(rows)
        self._token = _Post.apply(rows, self._flight)

    def wait(self) -> Tensor:
        """(sum(received), F), those from part 0 first. Once."""
        rows = _Arrive.apply(self._token, self._flight)
        return _dual(rows) if self._pairs else rows


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: GraphGroup, site: Site) -> Tensor:
        group.agree((site.verb, tuple(x.shape[1:]), str(x.dtype), x.device.type), f"the rows of `{site.verb}`")
        total = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            group.traffic.wait(site, group.start_all_reduce(total), x.device)
            # What a ring sends: every element to a neighbour, once on its way into the sum and once out of it.
            group.traffic.count(site, 2 * (group.size - 1) * x.numel() * x.element_size() // group.size)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.group, ctx.site = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grad, ctx.group, ctx.site._replace(direction="backward")), None, None


def sum_over_parts(x: Tensor, group: GraphGroup, verb: str) -> Tensor:
    """The sum of a tensor over the ranks that share a graph, for each of them. Its transpose is itself."""
    x, pairs = _paired(x)
    total = _Sum.apply(x, group, group.traffic.site(verb))
    return _dual(total) if pairs else total
