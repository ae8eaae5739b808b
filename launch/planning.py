"""From a run's configuration to plans: its micro-batch, its traced step, what each layout needs and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch, Collate
from egnscale.data.dataset import Dataset
from egnscale.data.sample import Sample
from egnscale.data.sampler import BalancedBatchSampler
from egnscale.launch.loading import PartCollate, graph_spec, sizes_for_balance
from egnscale.launch.tasks import IS2RE, S2EF, Normalizer
from egnscale.models import AtomModelConfig, ExtendedGraph, build_model
from egnscale.scaling.collectives import CountedGroup, added
from egnscale.scaling.combinations import Combination, SecondOrder
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.layout import SharedExchange
from egnscale.scaling.memory_trace import StepTrace, trace_step
from egnscale.scaling.recompute import set_recompute

#: Micro-batches of an epoch that are looked at for the largest.
SEARCHED = 2000
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """The micro-batch that a layout is planned for, as the rank that has most of it holds it."""

    graph: ExtendedGraph
    batch: AtomBatch
    graph_ranks: int
    rank: int  #: of those, the one with the most edges

    @property
    def bytes(self) -> int:
        """What it takes on the device."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.graph.map(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return [*found, *self.batch._tensors().values()]


def largest_batch(
    store: Dataset, *, balance: str, batch_size: int, replicas: int, seed: int, micro_batches: int | None = None
) -> list[int]:
    """Indices of the micro-batch with the most edges among the first ones of an epoch, over all replicas.

    Args:
        micro_batches: of one replica, that the run goes through; None for all.
    """
    sampler = BalancedBatchSampler(sizes_for_balance(store, balance), batch_size, replicas, seed=seed)
    order = sampler._order(0)
    steps = min(len(sampler), SEARCHED, micro_batches or SEARCHED)
    edges = store.num_edges
    dealt = (part for step in range(steps) for part in sampler._deal(order, step))
    return max(dealt, key=lambda part: int(edges[part].sum())).tolist()


def workload(samples: Sequence[Sample], model: AtomModelConfig, graph_ranks: int = 1) -> Workload:
    """The graph of some structures, or the largest part of it; structures without labels get made-up ones."""
    collate = Collate(graph_spec(model), model.num_elements)
    graph, batch = PartCollate(collate, graph_ranks, 0)(samples)
    rank = 0
    if graph_ranks > 1:
        exchange: SharedExchange = graph.exchange  # type: ignore[assignment]
        rank = max(range(graph_ranks), key=lambda part: exchange.edges[part])
        if rank:
            graph, batch = PartCollate(collate, graph_ranks, rank)(samples)
    energies = torch.zeros(len(samples), dtype=torch.float64)
    labels: dict[str, Any] = {"energy": energies, "energy_relaxed": energies}
    if batch.forces is None:
        labels["forces"] = torch.zeros_like(graph.positions)
    return Workload(graph, replace(batch, **labels), graph_ranks, rank)


@dataclass(frozen=True)
class Traced:
    """A step and what it sends to the ranks that share its graph."""

    step: StepTrace
    parameters: dict[str, int]
    exchanged: int  #: bytes
    exchanges: int


def trace(model: AtomModelConfig, task: str, combination: Combination, second_order: SecondOrder, work: Workload) -> Traced:
    """Trace a training step on the meta device."""
    flat = combination.forces == "conservative" and combination.zero == 3
    return _trace(model, task, combination.recompute, combination.precision, second_order, flat, work)


@lru_cache(maxsize=256)
def _trace(
    config: AtomModelConfig, task: str, recompute: Any, precision: str, second_order: SecondOrder, flat: bool, work: Workload
) -> Traced:
    with torch.device("meta"):
        model = build_model(config)
    graph, batch = work.graph.to("meta"), work.batch.to("meta")
    group = None
    if work.graph_ranks > 1:
        group = CountedGroup(work.graph_ranks, work.rank)
        exchange: SharedExchange = graph.exchange  # type: ignore[assignment]
        graph = replace(graph, exchange=exchange.join(group))
    set_recompute(model, recompute, group)
    normalizer = Normalizer(0.0, 1.0, 1.0)
    objective: S2EF | IS2RE = IS2RE(model, normalizer)
    if task == "s2ef":
        objective = S2EF(model, normalizer, second_order=second_order)
    layers = {f"{number} {type(layer).__name__}": layer for number, layer in enumerate(model.layers)}
    if flat:
        flatten_layers(model)
        layers = {f"{number} {type(layer).__name__}": layer for number, layer in enumerate(model.layers)}
    objective.to(PRECISIONS[precision])
    counts = torch.ones(2, dtype=torch.float64, device="meta")
    known: list[Tensor] = [counts, *batch._tensors().values()]
    graph.map(lambda x: known.append(x) or x)  # type: ignore[func-returns-value]
    step = trace_step(objective, lambda: objective(graph, batch, counts)[0], layers, known)
    sent = added(group.traffic.read().values()) if group is not None else added([])
    parameters = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad}
    return Traced(step, parameters, sent.bytes, sent.calls)
