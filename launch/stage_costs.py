"""What layers of a model cost, where that cuts it into the stages of a pipeline, and a stage's step, traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from egnscale.launch.layer_watch import layer_names
from egnscale.models import AtomModelConfig, build_model
from egnscale.models.layered import LayeredModel
from egnscale.models.stage import Stage, at_positions
from egnscale.scaling.collectives import CountedGroup, added
from egnscale.scaling.layout import SharedExchange
from egnscale.scaling.memory_trace import Allocation, StepTrace, trace_step
from egnscale.scaling.packing import pack, unpack
from egnscale.scaling.planner import GIB, Machine, roofline
from egnscale.scaling.recompute import set_recompute
from egnscale.scaling.stages import Cut, imbalance, stage_bounds


class LayerCost(NamedTuple):
    """Of one layer and micro-batch."""

    name: str
    parameters: int
    flops: int  #: of the forward pass
    seconds: float  #: of the forward pass, foretold
    kept: int  #: bytes of activations that it keeps for the backward pass


def layer_costs(config: AtomModelConfig, step: StepTrace, machine: Machine) -> list[LayerCost]:
    """From the trace of a whole step."""
    with torch.device("meta"):
        model = build_model(config)
    kept: Counter[str] = Counter()
    for event in step.events:
        if isinstance(event, Allocation):
            if event.made.phase == "backward":
                break
            kept[event.made.layer] += event.size
    costs = []
    for name, layer in zip(layer_names(model), model.layers, strict=True):
        work = step.work.get(name)
        flops, seconds = (work.total_flops, roofline(machine, work)) if work is not None else (0, 0.0)
        costs.append(LayerCost(name, sum(p.numel() for p in layer.parameters()), flops, seconds, kept[name]))
    return costs


def bounds_of(costs: Sequence[LayerCost], stages: int, how: Cut) -> list[int]:
    """Stage s has layers found[s]..found[s + 1] - 1.

    Raises:
        ValueError: if there are too few layers.
    """
    readout_counts = how != "uniform"  # else it would make a layer of the block that it goes with two
    weights = [{"cost": one.seconds, "parameters": float(one.parameters), "uniform": 1.0}[how] for one in costs]
    return stage_bounds([*weights[:-1], weights[-1] * readout_counts], stages)


def stage_table(costs: Sequence[LayerCost], bounds: Sequence[int], how: Cut) -> str:
    """The stages, for people."""
    total = sum(one.seconds for one in costs) or 1.0
    slowest = imbalance([one.seconds for one in costs], bounds)
    lines = [f"{len(bounds) - 1} stages, cut by {how}; the slowest has {slowest:.2f} of their mean"]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        own = costs[begin:end]
        lines.append(
            f"  stage {number}: layers {begin}..{end - 1} of {len(costs)}, "
            f"{sum(one.parameters for one in own):,} parameters, "
            f"{sum(one.seconds for one in own) / total:.1%} of the forward time, "
            f"{sum(one.kept for one in own) / GIB:.3g} GiB of activations for each micro-batch"
        )
    return "\n".join(lines)


class Traced(NamedTuple):
    """A micro-batch's part of a step, of a whole model or of one stage, and what it sends."""

    step: StepTrace
    parameters: dict[str, int]
    exchanged: int  #: bytes, with the ranks that share its graph
    exchanges: int
    sent: int = 0  #: bytes, to the next stage and back


def on_meta(work: Any) -> tuple[Any, Any, CountedGroup | None]:
    """Graph and labels of a `Workload` on the meta device, and who counts its exchanges, where a graph is shared."""
    graph, batch = work.graph.to("meta"), work.batch.to("meta")
    if work.graph_ranks == 1:
        return graph, batch, None
    group = CountedGroup(work.graph_ranks, work.rank)
    exchange: SharedExchange = graph.exchange
    return replace(graph, exchange=exchange.join(group)), batch, group


def trace_stage(
    config: AtomModelConfig,
    task: Any,
    recompute: Any,
    dtype: torch.dtype,
    begin: int,
    end: int,
    work: Any,
) -> Traced:
    """Trace what one stage does with a micro-batch, on the meta device.

    Args:
        task: makes the loss of a prediction: called with (model, prediction, graph, batch).
        work: a `Workload`.
    """
    with torch.device("meta"):
        model = build_model(config)
    graph, batch, group = on_meta(work)
    conservative = config.forces == "conservative"
    module = nn.ModuleList(model.layers[begin:end]).to(dtype)
    nn.ModuleList(model.layers[:begin]).to(dtype)
    entries, dual_entries = _arrivals(model, begin, graph) if begin else (None, None)
    if group is not None:
        group.traffic.read()
    set_recompute(model, recompute, group)
    stage = Stage(model, begin, end)
    words: list[int] = []

    def receive(entries: Any) -> tuple[Tensor | None, Any]:
        if entries is None:
            return None, None
        size = max(1, sum(entry.words for entry in entries if entry is not None))
        flat = torch.empty(size, device="meta").requires_grad_()
        return flat, unpack(flat.clone(), entries)

    def send(leaves: Any) -> Tensor:
        flat, _ = pack(leaves)
        words.append(len(flat))
        return flat

    def step() -> Tensor:
        if not conservative:
            _, arrived = receive(entries)
            state = stage.state(graph, arrived)
            if not stage.last:
                return send(stage.leaves(state)).sum()
            return task(model, stage.prediction(state, graph), graph, batch)
        flat, arrived = receive(entries)
        at, positions = at_positions(graph)
        state = stage.state(at, arrived)
        value = stage.atom_energies(state, at).sum() if stage.last else send(stage.leaves(state)).sum()
        del state
        torch.autograd.grad(value, [positions, *([] if flat is None else [flat])])
        del value, arrived, flat
        _, arrived = receive(dual_entries)
        dual = stage.dual_state(graph, torch.zeros_like(graph.positions), arrived)
        if not stage.last:
            return send(stage.dual_leaves(dual)).sum()
        energies, derivatives = stage.dual_energies(dual, graph)
        return energies.sum() + derivatives.sum()

    known: list[Tensor] = [*batch.tensors().values(), *model.parameters(), *model.buffers()]
    graph.map(lambda x: known.append(x) or x)  # type: ignore[func-returns-value]
    names = layer_names(model)
    layers = {names[number]: model.layers[number] for number in range(begin, end)}
    traced = trace_step(module, step, layers, known)
    exchanges = added(group.traffic.read().values() if group is not None else [])
    parameters = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    return Traced(traced, parameters, exchanges.bytes, exchanges.calls, 2 * 4 * sum(words))


def _arrivals(model: LayeredModel, begin: int, graph: Any) -> tuple[Any, Any]:
    """What the layers before send: their state, and it with tangents."""
    before = Stage(model, 0, begin)
    with torch.no_grad():
        state = before.leaves(before.state(graph))
        entries = pack(state)[1]
        config: Any = getattr(model, "config", None)
        if config is None or config.forces != "conservative":
            return entries, None
        dual = before.dual_leaves(before.dual_state(graph, torch.zeros_like(graph.positions)))
        return entries, pack(dual)[1]
