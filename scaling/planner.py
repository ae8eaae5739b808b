"""What a layout needs and how long its step takes; which of many to choose, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from egnscale.scaling.combinations import Combination
from egnscale.scaling.layout import ParallelLayout
from egnscale.scaling.memory_trace import Work
from egnscale.scaling.rank_memory import Device, Peak, States

GIB = 2**30
#: Of a process on the device, besides tensors: on a CPU the interpreter with torch and DeepSpeed after a first step
#: (measured), on a GPU the CUDA context and libraries (not measured here).
PROCESS: dict[Device, int] = {"cpu": int(0.42 * GIB), "cuda": int(0.75 * GIB)}
#: Of what is foretold, kept free besides: more than the error of any configuration in benchmarks/results.
ALLOWANCE = 0.10
#: With its default settings glibc takes up to so many times what tensors hold (about twice, in the few runs looked at).
HEAP_FACTOR = 2.3


@dataclass(frozen=True)
class Machine:
    """How fast one device computes, and reaches its memory and the others. FLOP/s, bytes/s, s."""

    name: str
    source: str  #: where the numbers come from, in words
    device: Device
    matmul: Mapping[str, float]  #: by precision
    bandwidth: float  #: of its memory
    link: float  #: to another rank, one way
    latency: float  #: of an exchange
    call: float  #: of starting an operation
    host_link: float = 25e9  #: to host memory

    @classmethod
    def read(cls, path: Path) -> Machine:
        """From a JSON file, as `write` makes it.

        Raises:
            ValueError: naming the file and what is wrong.
        """
        try:
            machine = cls(**json.loads(path.read_text()))
            numbers = [*machine.matmul.values(), machine.bandwidth, machine.link, machine.latency, machine.call]
            if not machine.matmul or min(numbers) <= 0:
                raise ValueError("all rates and times must be positive")
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is no machine description: {error} (egnscale bench machine writes one)") from None
        return machine

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    def rate(self, dtype: torch.dtype) -> float:
        low = dtype in (torch.bfloat16, torch.float16)
        return self.matmul["bf16" if low and "bf16" in self.matmul else "fp32"]


_SPECIFICATION = "its maker's specification, not measured: times are lower bounds"
MACHINES = {
    "h100": Machine(
        "h100", _SPECIFICATION, "cuda", {"fp32": 67e12, "bf16": 989e12}, 3.35e12, 450e9, 10e-6, 5e-6, host_link=55e9
    ),
    "h200": Machine(
        "h200", _SPECIFICATION, "cuda", {"fp32": 67e12, "bf16": 989e12}, 4.8e12, 450e9, 10e-6, 5e-6, host_link=55e9
    ),
    "cpu": Machine(
        "cpu", "a cautious guess for one core, not measured", "cpu", {"fp32": 5e10, "bf16": 5e10}, 8e9, 1e9, 1e-4, 1e-5
    ),
}


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step; nothing is taken to overlap."""

    compute: float
    exchange: float  #: among the ranks that share a graph, and from stage to stage
    reduce: float  #: gradients, and parameters where they are sharded
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.reduce + self.update


def roofline(machine: Machine, work: Work) -> float:
    """Seconds of some operations, one after the other."""
    return sum(
        count * (max(flops / machine.rate(dtype), moved / machine.bandwidth) + machine.call)
        for (dtype, flops, moved), count in work.costs.items()
    )


def times(
    machine: Machine, states: States, work: Work, exchanged: int, exchanges: int, *, stages: int = 1, sent: int = 0
) -> Times:
    """Roofline of each operation, and of communication its bytes over the slowest link.

    Args:
        work: of one micro-batch.
        exchanged, exchanges: bytes and exchanges of one micro-batch on this rank.
        stages: of the pipeline, all as slow as this one.
        sent: bytes of one micro-batch to the next stage and back.
    """
    compute = roofline(machine, work)
    micro, combination = states.gradient_accumulation, states.combination
    size = states.count * states.size * (states.ranks - 1) / states.ranks
    rounds = {0: 2.0, 1: 2.0, 2: 1.0 + micro, 3: micro * (4.0 if combination.recompute == "block" else 3.0)}
    updated = states.count if combination.zero == 0 else states.shard
    update = updated * 4 * (2 * (1 + states.moments) + 1) / machine.bandwidth
    update += 2 * states.on_host / machine.host_link
    turns = micro + stages - 1  # until the last micro-batch has gone through all stages
    return Times(
        turns * compute,
        turns * (exchanged / machine.link + exchanges * machine.latency + sent / machine.link),
        rounds[combination.zero] * size / machine.link,
        update,
    )


@dataclass(frozen=True)
class Plan:
    """A layout, what it needs and how long it takes."""

    layout: ParallelLayout
    combination: Combination
    micro_batch: int  #: structures of a replica
    accumulation: int
    peak: Peak
    process: int  #: bytes
    host: int  #: bytes of host memory that offloaded states take on this rank
    times: Times
    flops: int  #: of a step, this rank's
    moved: int  #: bytes read and written in a step
    sent: int  #: bytes to ranks that share the graph, in a step

    @property
    def foretold(self) -> int:
        """Bytes that this rank is foretold to have at most."""
        return self.peak.taken + self.process

    @property
    def needed(self) -> int:
        """The same with the safety allowance: what must be there."""
        return int(self.foretold * (1 + ALLOWANCE))

    def fits(self, available: int, host: int | None = None) -> bool:
        return self.needed <= available and (host is None or self.host <= host)

    @property
    def settings(self) -> dict[str, object]:
        """As they are said in a configuration."""
        found: dict[str, object] = {
            "parallel.graph": self.layout.graph,
            "parallel.pipe": self.layout.pipe,
            "parallel.zero": self.combination.zero,
            "parallel.recompute": self.combination.recompute,
            "parallel.offload": self.combination.offload,
            "optim.batch_size": self.micro_batch,
            "optim.gradient_accumulation": self.accumulation,
        }
        if self.combination.forces == "conservative":
            found["parallel.second_order"] = self.combination.chosen_second_order
        return found


def ranked(plans: list[Plan], available: int, host: int | None = None) -> list[Plan]:
    """Those that fit, fastest first; among equals (2 %) the one that changes least; then the others, smallest first."""

    def order(plan: Plan) -> tuple[float, ...]:
        effort = plan.combination.zero + ("none", "selective", "block").index(plan.combination.recompute)
        if plan.fits(available, host):
            return (
                0,
                _rounded(plan.times.total),
                effort + plan.layout.graph + plan.layout.pipe + plan.accumulation,
                plan.needed,
            )
        return (1, plan.needed, 0, 0)

    return sorted(plans, key=order)


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.1e}")


def explained(plans: list[Plan], available: int, host: int | None = None) -> str:
    """Why the first of ranked plans is the first, in words."""
    best = plans[0]
    if not best.fits(available, host):
        return (
            f"nothing fits: the smallest layout needs {gib(best.needed)} on each device, and there are "
            f"{gib(available)}; use more devices, offload, or a smaller micro-batch"
        )
    fitting = [plan for plan in plans if plan.fits(available, host)]
    faster = [plan for plan in plans if plan.times.total < best.times.total * 0.98 and plan not in fitting]
    words = [f"{len(fitting)} of {len(plans)} layouts fit into {gib(available)}"]
    words.append(f"this one takes {best.times.total:.3g} s a step, the least of them (within 10 %, the simplest)")
    parts = asdict(best.times)
    longest = max(parts, key=lambda name: parts[name])
    words.append(f"{parts[longest] / best.times.total:.0%} of it {longest}")
    if faster:
        near = min(faster, key=lambda plan: plan.needed)
        words.append(f"faster ones do not fit, the nearest ({short(near)}) by {gib(near.needed - available)}")
    largest = best.peak.kinds.most_common(1)
    if largest:
        words.append(f"most memory goes to {largest[0][0]}, {gib(largest[0][1])}, at its peak in {best.peak.when}")
    return "; ".join(words)


def short(plan: Plan) -> str:
    """A plan in a few words."""
    found = [f"pipe {plan.layout.pipe}"] if plan.layout.pipe > 1 else []
    found += [f"graph {plan.layout.graph}", f"ZeRO-{plan.combination.zero}", f"recompute {plan.combination.recompute}"]
    if plan.combination.offload != "none":
        found.append(f"offload {plan.combination.offload}")
    return ", ".join([*found, f"{plan.micro_batch} structures x {plan.accumulation}"])


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": GIB, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def read_size(text: str) -> int:
    """`80GiB` in bytes.

    Raises:
        ValueError: for anything else than a positive number with a unit.
    """
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no amount of memory; write 80GiB") from None
    if not 0 < size < float("inf"):
        raise ValueError(f"{text!r} is no amount of memory; it must be positive")
    return int(size)
