"""From a run's configuration to plans: its micro-batch, its traced step, what layouts need and how long they take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egnscale.data.batch import AtomBatch, Collate
from egnscale.data.dataset import Dataset, First
from egnscale.data.sample import Sample
from egnscale.data.sampler import BalancedBatchSampler
from egnscale.launch.bench_comm import slab
from egnscale.launch.config import RunConfig
from egnscale.launch.layer_watch import layer_names
from egnscale.launch.loading import PartCollate, graph_spec, open_data, sizes_for_balance
from egnscale.launch.run_files import read_trained, run_model
from egnscale.launch.stage_costs import LayerCost, Traced, bounds_of, layer_costs, on_meta, trace_stage
from egnscale.launch.tasks import IS2RE, S2EF, Normalizer
from egnscale.models import AtomModelConfig, ExtendedGraph, build_model, count_parameters
from egnscale.scaling.allocators import give_back_at_once
from egnscale.scaling.collectives import added
from egnscale.scaling.combinations import Combination, Recompute, SecondOrder, every_combination
from egnscale.scaling.ds_config import preset_name, read_ds_config
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.layout import ParallelLayout, SharedExchange
from egnscale.scaling.memory_trace import trace_step
from egnscale.scaling.planner import ALLOWANCE, HEAP_FACTOR, PROCESS, Machine, Plan, gib, times
from egnscale.scaling.rank_memory import States, peak_of_run
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
        return [*found, *self.batch.tensors().values()]


def largest_batch(
    store: Dataset,
    *,
    balance: str,
    batch_size: int,
    replicas: int,
    seed: int,
    accumulation: int = 1,
    micro_batches: int | None = None,
) -> list[int]:
    """Indices of the micro-batch with the most edges among the first ones of an epoch, over all replicas.

    Args:
        micro_batches: of one replica, that the run goes through; None for all.
    """
    sampler = BalancedBatchSampler(
        sizes_for_balance(store, balance), batch_size, replicas, seed=seed, accumulation=accumulation
    )
    return sampler.largest(store.num_edges, min(SEARCHED, micro_batches or SEARCHED))


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


def trace(
    model: AtomModelConfig, task: str, combination: Combination, second_order: SecondOrder, work: Workload
) -> Traced:
    """Trace a training step on the meta device."""
    flat = combination.forces == "conservative" and combination.zero == 3
    return _trace(model, task, combination.recompute, combination.precision, second_order, flat, work)


@lru_cache(maxsize=256)
def _trace(
    config: AtomModelConfig,
    task: str,
    recompute: Any,
    precision: str,
    second_order: SecondOrder,
    flat: bool,
    work: Workload,
) -> Traced:
    with torch.device("meta"):
        model = build_model(config)
    graph, batch, group = on_meta(work)
    set_recompute(model, recompute, group)
    normalizer = Normalizer(0.0, 1.0, 1.0)
    objective: S2EF | IS2RE = IS2RE(model, normalizer)
    if task == "s2ef":
        objective = S2EF(model, normalizer, second_order=second_order)
    if flat:
        flatten_layers(model)
    layers = dict(zip(layer_names(model), model.layers, strict=True))
    objective.to(PRECISIONS[precision])
    counts = torch.ones(2, dtype=torch.float64, device="meta")
    known: list[Tensor] = [counts, *batch.tensors().values()]
    graph.map(lambda x: known.append(x) or x)  # type: ignore[func-returns-value]
    step = trace_step(objective, lambda: objective(graph, batch, counts)[0], layers, known)
    sent = added(group.traffic.read().values()) if group is not None else added([])
    parameters = {name: p.numel() for name, p in objective.named_parameters() if p.requires_grad}
    return Traced(step, parameters, sent.bytes, sent.calls)


@lru_cache(maxsize=256)
def _trace_stage(
    config: AtomModelConfig, task: str, recompute: Any, precision: str, begin: int, end: int, work: Workload
) -> Traced:
    normalizer = Normalizer(0.0, 1.0, 1.0)
    counts = torch.ones(2, dtype=torch.float64, device="meta")

    def loss(model: Any, prediction: Any, graph: ExtendedGraph, batch: AtomBatch) -> Tensor:
        objective = IS2RE(model, normalizer) if task == "is2re" else S2EF(model, normalizer)
        return objective.loss(prediction, graph, batch, counts)

    return trace_stage(config, loss, recompute, PRECISIONS[precision], begin, end, work)


#: Structures of about so many atoms, where there is no training set to look at.
MADE_UP_ATOMS = 80


class Planner:
    """Plans of one run under different layouts, all with its global batch.

    Args:
        config: the run's.
        model: its model.
        machine: what it runs on.
        store: its training set; None: made-up slabs.
        ds_config: name or path of the DeepSpeed JSON; None takes the shipped one of each stage.
        process: bytes of the process besides tensors; None takes `PROCESS`.
    """

    def __init__(
        self,
        config: RunConfig,
        model: AtomModelConfig,
        machine: Machine,
        store: Dataset | None,
        *,
        atoms: int = MADE_UP_ATOMS,
        ds_config: str | None = None,
        process: int | None = None,
    ) -> None:
        self.config, self.model, self.machine, self.store, self.atoms = config, model, machine, store, atoms
        self.ds_config = ds_config or config.parallel.deepspeed
        self.process = PROCESS[machine.device] if process is None else process
        with torch.device("meta"):
            self.count = count_parameters(build_model(model))
        self._workloads: dict[tuple[int, int, int, int], Workload] = {}

    @classmethod
    def of_config(cls, config: RunConfig, machine: Machine, atoms: int | None = None) -> Planner:
        """From a configuration alone; where its training set is not there, for made-up slabs.

        Raises:
            ValueError: for a model that cannot be.
        """
        start = config.task.init_from
        model = run_model(config, None if start is None else read_trained(start).config)
        store = open_data(config.data.train) if atoms is None and config.data.train.exists() else None
        if store is not None and config.data.limit is not None:
            store = First(store, config.data.limit)
        return cls(config, model, machine, store, atoms=atoms or MADE_UP_ATOMS)

    @property
    def described(self) -> str:
        """What the micro-batches are made of."""
        if self.store is None:
            return f"made-up slabs of {self.atoms} atoms"
        return f"the micro-batch with the most edges of {self.config.data.train}"

    def workload(self, micro_batch: int, layout: ParallelLayout, accumulation: int) -> Workload:
        key = micro_batch, layout.data, layout.graph, accumulation
        if key not in self._workloads:
            if self.store is None:
                samples = [slab(self.atoms, number) for number in range(micro_batch)]
            else:
                optim = self.config.optim
                steps = None if optim.max_steps is None else optim.max_steps * optim.gradient_accumulation
                chosen = largest_batch(
                    self.store,
                    balance=optim.load_balancing,
                    batch_size=micro_batch,
                    replicas=layout.data,
                    seed=self.config.task.seed,
                    accumulation=accumulation,
                    micro_batches=steps,
                )
                samples = [self.store[index] for index in chosen]
            self._workloads[key] = workload(samples, self.model, layout.graph)
        return self._workloads[key]

    def plan(self, layout: ParallelLayout, combination: Combination, micro_batch: int, accumulation: int) -> Plan:
        """What one layout needs, and how long it takes."""
        work = self.workload(micro_batch, layout, accumulation)
        if layout.pipe > 1:
            return self._plan_pipeline(layout, combination, micro_batch, accumulation, work)
        traced = trace(self.model, self.config.task.name, combination, combination.chosen_second_order, work)
        states = self._states(traced.parameters, layout, combination, accumulation, work.bytes)
        return self._plan_of(traced, states, layout, micro_batch)

    def _plan_of(self, traced: Traced, states: States, layout: ParallelLayout, micro_batch: int) -> Plan:
        """Of a rank that holds these states and does this for each micro-batch."""
        total, accumulation = traced.step.total, states.gradient_accumulation
        return Plan(
            layout=layout,
            combination=states.combination,
            micro_batch=micro_batch,
            accumulation=accumulation,
            peak=peak_of_run(states, traced.step),
            process=self.process,
            host=states.on_host,
            times=times(
                *(self.machine, states, total, traced.exchanged, traced.exchanges),
                stages=layout.pipe,
                sent=traced.sent,
            ),
            flops=total.total_flops * accumulation,
            moved=total.bytes * accumulation,
            sent=traced.exchanged * accumulation,
        )

    def _states(
        self,
        parameters: Mapping[str, int],
        layout: ParallelLayout,
        combination: Combination,
        accumulation: int,
        batch_bytes: int,
        in_flight: int = 1,
    ) -> States:
        return States(
            parameters=parameters,
            combination=combination,
            ranks=layout.size // layout.pipe,
            ds_config=read_ds_config(self.ds_config or preset_name(combination.zero, combination.offload)),
            device=self.machine.device,
            amsgrad=self.config.optim.amsgrad,
            averaged=self.config.optim.ema_decay is not None,
            checkpointed=self.config.task.checkpoint_every is not None,
            gradient_accumulation=accumulation,
            batch_bytes=batch_bytes,
            in_flight=in_flight,
        )

    def _plan_pipeline(
        self, layout: ParallelLayout, combination: Combination, micro_batch: int, accumulation: int, work: Workload
    ) -> Plan:
        """Of the stage that needs most, at the pace of the slowest."""
        bounds = self.bounds(layout, combination, micro_batch, accumulation)
        plans = []
        for number in range(layout.pipe):
            traced = _trace_stage(
                self.model,
                self.config.task.name,
                combination.recompute,
                combination.precision,
                bounds[number],
                bounds[number + 1],
                work,
            )
            states = self._states(
                traced.parameters,
                layout,
                combination,
                accumulation,
                work.bytes * accumulation,  # every stage has all of a step's graphs
                min(layout.pipe - number, accumulation),
            )
            plans.append(self._plan_of(traced, states, layout, micro_batch))
        slowest = max((plan.times for plan in plans), key=lambda one: one.total)
        return replace(max(plans, key=lambda plan: plan.foretold), times=slowest)

    def costs(
        self, layout: ParallelLayout, combination: Combination, micro_batch: int, accumulation: int
    ) -> list[LayerCost]:
        """Of each layer, for the micro-batch with the most edges."""
        work = self.workload(micro_batch, layout, accumulation)
        traced = trace(self.model, self.config.task.name, combination, combination.chosen_second_order, work)
        return layer_costs(self.model, traced.step, self.machine)

    def bounds(
        self, layout: ParallelLayout, combination: Combination, micro_batch: int, accumulation: int
    ) -> list[int]:
        """Where layers are cut into stages.

        Raises:
            ValueError: if there are too few.
        """
        costs = self.costs(layout, combination, micro_batch, accumulation)
        return bounds_of(costs, layout.pipe, self.config.parallel.stage_cut)

    def combinations(self, *, offload: bool, pipe: int = 1) -> list[Combination]:
        """The legal ones: of conservative models in both ways, unless the configuration says one."""
        parallel = self.config.parallel
        ways: list[Any] = [parallel.second_order]
        if self.model.forces == "conservative" and parallel.second_order == "auto":
            ways = ["double_backward", "reverse_over_forward"]
        found = every_combination(
            forces=[self.model.forces],
            second_order=ways,
            pipe=[pipe],
            zero=[0, 1, 2, 3],
            recompute=["none", "selective", "block"],
            precision=[parallel.precision],
            offload=["none", "optimizer", "parameters"] if offload else ["none"],
            fp16_device=[True],
        )
        return [one for one in found if one.why_not() is None]

    def layouts(
        self,
        ranks: int,
        per_node: int,
        *,
        offload: bool = False,
        progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    ) -> list[Plan]:
        """Plans of all layouts of so many ranks that keep the configuration's global batch.

        Micro-batches are those that one, two or four of, or as many as the configuration says, make up the batch; in a
        pipeline, at least one for each stage.

        Args:
            progress: goes through what is to be planned, and may show how far it is.

        Raises:
            ValueError: where the ranks do not suit the configuration.
        """
        optim, parallel = self.config.optim, self.config.parallel
        whole = ParallelLayout.of_world(ranks, graph=parallel.graph, pipe=parallel.pipe)
        batch = optim.batch_size * optim.gradient_accumulation * whole.data
        todo: list[tuple[ParallelLayout, Combination, int, int]] = []
        pipes = [p for p in sorted({1, 2, 4, 8, parallel.pipe}) if p <= self.model.num_blocks + 1]
        for pipe, graph in product(pipes, _graph_sizes(ranks, per_node, parallel.graph)):
            if ranks % (pipe * graph):
                continue
            layout = ParallelLayout.of_world(ranks, graph=graph, pipe=pipe)
            if batch % layout.data:
                continue
            of_replica = batch // layout.data
            rounds = {pipe, 2 * pipe, 4 * pipe, optim.gradient_accumulation}
            for accumulation in sorted(a for a in rounds if a >= pipe and of_replica % a == 0):
                todo += [
                    (layout, combination, of_replica // accumulation, accumulation)
                    for combination in self.combinations(offload=offload, pipe=pipe)
                ]
        return [self.plan(*one) for one in progress(todo)]

    def record(self, plan: Plan, available: int, host: int | None) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": plan.settings,
            "data": plan.layout.data,
            "fits": plan.fits(available, host),
            "needed": plan.needed,
            "foretold": plan.foretold,
            "process": plan.process,
            "kept_by_allocator": plan.peak.kept_back,
            "host": plan.host,
            "peak_in": plan.peak.when,
            "memory": dict(plan.peak.kinds),
            "activations_by_layer": dict(plan.peak.layers),
            "seconds": asdict(plan.times) | {"total": plan.times.total},
            "flops": plan.flops,
            "bytes": plan.moved,
            "bytes_sent_for_graphs": plan.sent,
        }


def _graph_sizes(ranks: int, per_node: int, given: int) -> list[int]:
    """Powers of two within a node, and the configuration's."""
    powers = [2**n for n in range(16) if 2**n <= min(ranks, per_node) and ranks % 2**n == 0]
    return sorted({*powers, given})


# Before and during training


@dataclass(frozen=True)
class Forecast:
    """What a run was foretold to need on this rank, and what there is."""

    planner: Planner
    plan: Plan
    available: int
    others: tuple[Plan, ...] = ()  #: layouts that need less

    def advice(self, limit: int) -> str:
        """The nearest settings that fit into so many bytes, in a few words."""
        fitting = [other for other in self.others if other.fits(limit)]
        if not fitting:
            return "no setting on these ranks fits; use more ranks, or a smaller optim.batch_size or model"
        return "; ".join(f"{_changes(self.plan, other)} needs {gib(other.needed)}" for other in fitting[:2])

    def refusal(self) -> str:
        return (
            f"this run would not fit: a rank needs {gib(self.plan.needed)} ({gib(self.plan.foretold)} foretold, and "
            f"{ALLOWANCE:.0%} to be safe), and there are {gib(self.available)}; {self.advice(self.available)} "
            "(parallel.check_memory=false starts it anyway)"
        )

    def of_failure(self, peak: int) -> str:
        """After memory has run out at `peak` bytes."""
        # What is said to fit has to fit into less than what did not.
        advice = self.advice(min(self.available, self.plan.foretold))
        return (
            f"out of memory: this rank had {gib(peak)}, it was foretold {gib(self.plan.foretold)} at its peak in "
            f"{self.plan.peak.when}, and there were {gib(self.available)}; try next: {advice}"
        )


def _changes(old: Plan, new: Plan) -> str:
    before = old.settings
    return " ".join(f"{key}={value}" for key, value in new.settings.items() if value != before.get(key))


def available_memory(device: torch.device) -> int:
    """Bytes that this rank may use, what it has already included."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free + PROCESS["cuda"], total)  # this process's context is there already
    free = next(
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    with contextlib.suppress(OSError, ValueError):  # no limit, or another kind of control group
        group = Path("/sys/fs/cgroup")
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = next(int(size) for name, size in lines if name == "inactive_file")  # given up when others need memory
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used + files)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    return free // local + _resident()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def surely_fits(planner: Planner, layout: ParallelLayout, available: int) -> bool:
    """Whether even a coarse upper bound fits, so that nothing need be traced."""
    optim, model = planner.config.optim, planner.model
    if planner.store is None:
        return False
    edges = int(planner.store.num_edges.max(initial=1)) * optim.batch_size * 2  # symmetrised ones may be more
    widths = [value for name, value in vars(model).items() if "emb" in name or "channels" in name or "radial" in name]
    width = max(widths) + 8 * model.num_spherical**2
    activations = 4 * edges * width * 250 * (model.num_blocks + 1)
    return planner.process + 48 * planner.count + activations * HEAP_FACTOR < available / 2


def settle(
    planner: Planner, layout: ParallelLayout, combination: Combination, available: int, say: Callable[[str], None]
) -> tuple[Combination, Forecast | None]:
    """Choose how conservative forces are trained, and check that the run fits.

    Returns:
        the combination, with a way of second order in place of auto, and the forecast; None where it surely fits.

    Raises:
        ValueError: if it does not fit, with what would.
    """
    conservative = combination.forces == "conservative"
    chosen = replace(combination, second_order=combination.chosen_second_order) if conservative else combination
    if surely_fits(planner, layout, available):
        return chosen, None
    optim = planner.config.optim
    size = optim.batch_size, optim.gradient_accumulation
    plan = planner.plan(layout, chosen, *size)
    if conservative and combination.second_order == "auto" and combination.zero < 3:
        other = planner.plan(layout, replace(chosen, second_order="reverse_over_forward"), *size)
        plan, rest = sorted((plan, other), key=lambda one: one.times.total)
        if rest.fits(available) and not plan.fits(available):
            plan, rest = rest, plan
        say(
            f"second order: {plan.combination.second_order}, {plan.times.total:.3g} s a step and {gib(plan.needed)}; "
            f"{rest.combination.second_order} takes {rest.times.total:.3g} s and {gib(rest.needed)}, and there are "
            f"{gib(available)}"
        )
    forecast = Forecast(planner, plan, available)
    if not plan.fits(available):
        raise ValueError(with_others(forecast).refusal())
    if planner.machine.device == "cpu" and plan.foretold * HEAP_FACTOR > available and give_back_at_once():
        say(
            f"{gib(plan.foretold)} foretold of {gib(available)}: freed memory goes back to the system at once, "
            "which takes up to 1.7 times as long"
        )
    return plan.combination, forecast


def with_others(forecast: Forecast) -> Forecast:
    """The forecast, with layouts on the same ranks that need less: one setting changed, then two."""
    planner, plan = forecast.planner, forecast.plan
    recomputes: tuple[Recompute, ...] = ("none", "selective", "block")
    zeros = (0, 1, 2, 3)
    now = plan.combination
    candidates = [
        replace(now, zero=zero, recompute=recompute, second_order="auto")
        for zero in zeros[now.zero :]
        if plan.layout.size > 1 or zero == now.zero
        for recompute in recomputes[recomputes.index(now.recompute) :]
    ]
    legal = [one for one in candidates if one.why_not() is None]
    others = [planner.plan(plan.layout, one, plan.micro_batch, plan.accumulation) for one in legal]
    if plan.micro_batch % 2 == 0:
        others.append(planner.plan(plan.layout, now, plan.micro_batch // 2, plan.accumulation * 2))
    fewer = [other for other in others if other.needed < plan.needed]
    return replace(forecast, others=tuple(sorted(fewer, key=lambda other: other.times.total)))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def out_of_memory(forecast: Forecast | None, peak: int) -> str:
    """What to say after memory has run out at `peak` bytes."""
    if forecast is None:
        return (
            f"out of memory: this rank had {gib(peak)}, and the run was not foretold (it seemed to fit easily, or "
            "parallel.check_memory is false); try next: parallel.recompute=block, or a smaller optim.batch_size"
        )
    return with_others(forecast).of_failure(peak)
