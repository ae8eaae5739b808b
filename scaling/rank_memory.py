"""The memory of one rank through a training run, allocation by allocation: what DeepSpeed holds around a traced step.

A step's own tensors come from its trace (`egnscale.scaling.memory_trace`); this module adds parameters, master weights,
gradients, optimizer states, averaged weights, buckets and what DeepSpeed, torch's AdamW and a checkpoint copy for a
moment, at the points of the step where they are there. Peaks are those of the whole sequence, not sums of peaks.

What DeepSpeed 0.19 does at each stage was read in its source and compared with the allocations of real runs:

* 0: gradients stay until the step, and are reduced through a flattened copy. In bf16 there are fp32 masters besides.
* 1, 2: parameters are views of one flat buffer; masters and moments are shards. A shard of gradients is flattened
  for the step, and AdamW makes two temporaries as large as it. Gradients leave for buckets at once (2) or at the end
  (1).
* 3: of parameters there are shards and what is gathered; gradients go through buckets into shards.

N parameters, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from egnscale.scaling.allocators import Allocator, CudaCache, Pages
from egnscale.scaling.combinations import Combination
from egnscale.scaling.memory_trace import Allocation, GradientReady, ParametersUsed, StepTrace
from egnscale.scaling.training_state import FILE_BYTES

Device = Literal["cpu", "cuda"]

PARAMETERS, MASTERS, GRADIENTS, OPTIMIZER = "parameters", "master weights", "gradients", "optimizer states"
AVERAGES, GATHERED, BUFFERS = "averaged weights", "gathered parameters", "communication buffers"
ACTIVATIONS, TEMPORARIES, BATCH = "activations", "temporaries", "batch"
STEP, CHECKPOINT = "temporaries of the optimizer step", "checkpoint"
#: In the order in which tables list them.
KINDS = (
    *(PARAMETERS, MASTERS, GRADIENTS, OPTIMIZER, AVERAGES, GATHERED, BUFFERS),
    *(ACTIVATIONS, TEMPORARIES, BATCH, STEP, CHECKPOINT),
)
#: Where activations of a pipeline's other micro-batches stand among layers.
OTHER_MICRO_BATCHES = "micro-batches in flight"
#: DeepSpeed reduces gradients without ZeRO in pieces of so many elements.
PLAIN_BUCKET = 500_000_000
#: What DeepSpeed takes where a configuration says nothing.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 1_000_000_000,
}
#: Steps that are gone through: in the first, moments are made; where freed memory is kept, it finds its use in a third.
STEPS = {"cpu": 2, "cuda": 3}


@dataclass(frozen=True, kw_only=True)
class States:
    """What a rank holds besides a step's own tensors depends on these."""

    parameters: Mapping[str, int]  #: elements, in the order of the model
    combination: Combination
    ranks: int  #: over which states are sharded: all of them, or those of a pipeline's stage
    ds_config: Mapping[str, Any]
    device: Device = "cpu"
    amsgrad: bool = False
    averaged: bool = False  #: weights, by `optim.ema_decay`
    checkpointed: bool = True
    gradient_accumulation: int = 1
    batch_bytes: int = 0  #: graph and labels of a micro-batch, or of all that go through a pipeline
    in_flight: int = 1  #: micro-batches whose activations are there together

    @property
    def count(self) -> int:
        return sum(self.parameters.values())

    @property
    def shard(self) -> int:
        return -(-self.count // self.ranks)

    @property
    def size(self) -> int:
        """Bytes of a parameter that is computed with."""
        return 4 if self.combination.precision == "fp32" else 2

    @property
    def moments(self) -> int:
        return 3 if self.amsgrad else 2

    def setting(self, name: str) -> int:
        given = self.ds_config.get("zero_optimization", {}).get(name, "auto")
        return DEFAULTS[name] if given == "auto" else int(given)

    @property
    def on_host(self) -> int:
        """Bytes of this rank's states that offloading keeps in host memory (on a disk: that pass through it)."""
        if self.combination.offload == "none":
            return 0
        # Masters, moments, gradients; parameters besides where they go too.
        states = self.shard * 4 * (1 + self.moments + 1)
        return states + (self.shard * self.size if self.combination.offload in ("parameters", "nvme") else 0)


@dataclass
class Peak:
    """The moment at which a rank holds most."""

    taken: int = 0  #: bytes from the system, what the allocator has not given back among them
    alive: int = 0  #: bytes of tensors
    when: str = ""
    kinds: Counter[str] = field(default_factory=Counter)  #: bytes of tensors by kind
    layers: Counter[str] = field(default_factory=Counter)  #: bytes of activations by layer

    @property
    def kept_back(self) -> int:
        """Bytes that are free and have not been given back to the system."""
        return self.taken - self.alive


class Ledger:
    """Allocations by kind, and the allocator that serves them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.allocator: Allocator = Pages() if device == "cpu" else CudaCache()
        self.when = ""
        self.peak = Peak()
        self._next = 0
        self._held: dict[int, tuple[int, str, str]] = {}
        self._touched = 0
        self._alive = 0
        self._kinds: Counter[str] = Counter()
        self._layers: Counter[str] = Counter()

    def add(self, size: int, kind: str, layer: str = "") -> int:
        """Allocate bytes; returns what frees them."""
        key, self._next = self._next, self._next + 1
        self._held[key] = size, kind, layer
        self.allocator.allocate(key, size)
        self._change(size, kind, layer)
        return key

    def drop(self, *keys: int) -> None:
        for key in keys:
            size, kind, layer = self._held.pop(key)
            self.allocator.free(key)
            self._change(-size, kind, layer)

    def touch(self, size: int, kind: str) -> None:
        """Use a part of a buffer for the first time: on a CPU, memory is taken only then."""
        self._touched += size
        self._change(size, kind, "")

    def _change(self, size: int, kind: str, layer: str) -> None:
        self._alive += size
        self._kinds[kind] += size
        if kind == ACTIVATIONS:
            self._layers[layer] += size
        taken = self.allocator.taken + self._touched
        if size > 0 and (taken, self._alive) > (self.peak.taken, self.peak.alive):
            self.peak.taken, self.peak.alive, self.peak.when = taken, self._alive, self.when
            self._at_peak = self._kinds.copy(), self._layers.copy()

    def result(self) -> Peak:
        self.peak.kinds, self.peak.layers = (+counts for counts in self._at_peak)
        return self.peak


class Buffer:
    """A bucket of fixed size: all there at once on a GPU, as far as it has been filled on a CPU."""

    def __init__(self, ledger: Ledger, elements: int, size: int) -> None:
        self.ledger, self.elements, self.size = ledger, elements, size
        self.filled = self.touched = 0
        self.key = ledger.add(elements * size, BUFFERS) if ledger.device == "cuda" else None

    def fill(self, elements: int) -> None:
        self.filled += elements
        if self.key is None and self.filled > self.touched:
            self.ledger.touch((self.filled - self.touched) * self.size, BUFFERS)
            self.touched = self.filled

    def drop(self) -> None:
        if self.key is not None:
            self.ledger.drop(self.key)
        else:
            self.ledger.touch(-self.touched * self.size, BUFFERS)


def peak_of_run(states: States, trace: StepTrace) -> Peak:
    """The most that one rank holds on its device, from its first parameter to its first checkpoint."""
    ledger = Ledger(states.device)
    run = _STAGES[states.combination.zero](states, ledger)
    ledger.when = "construction"
    run.build()
    for _ in range(STEPS[states.device]):
        for micro in range(states.gradient_accumulation):
            ledger.when = "forward and backward"
            batch = ledger.add(states.batch_bytes, BATCH)
            run.last = micro == states.gradient_accumulation - 1
            run.forward_backward(trace)
            ledger.drop(batch)
        ledger.when = "optimizer step"
        run.step()
    if states.checkpointed:
        ledger.when = "checkpoint"
        run.checkpoint()
    return ledger.result()


class _Plain:
    """Without ZeRO."""

    def __init__(self, states: States, ledger: Ledger) -> None:
        self.states, self.ledger = states, ledger
        self.gradients: dict[str, int] = {}
        self.moments: list[int] = []
        self.last = True  # whether this micro-batch ends a step

    @property
    def low(self) -> bool:
        return self.states.size == 2

    def each(self, size: int, kind: str) -> list[int]:
        """A tensor for each parameter."""
        return [self.ledger.add(size * count, kind) for count in self.states.parameters.values()]

    def build(self) -> None:
        made = self.each(4, PARAMETERS)
        if self.low:  # one by one, as a module is converted
            for key, count in zip(made, self.states.parameters.values(), strict=True):
                self.ledger.add(2 * count, PARAMETERS)
                self.ledger.drop(key)
            self.each(4, MASTERS)
            # DeepSpeed makes the moments by a step with gradients of zero.
            gradients = self.each(4, GRADIENTS)
            self.make_moments()
            self.ledger.drop(*gradients)
            self.ledger.drop(*self.moments)  # undone (`egnscale.scaling.engine`)
            self.moments.clear()
        if self.states.averaged:
            self.each(4, AVERAGES)

    def make_moments(self) -> None:
        if not self.moments:
            for count in self.states.parameters.values():
                self.moments += [self.ledger.add(4 * count, OPTIMIZER) for _ in range(self.states.moments)]

    def forward_backward(self, trace: StepTrace) -> None:
        add, drop = self.ledger.add, self.ledger.drop
        keys: dict[int, int] = {}
        others = add((self.states.in_flight - 1) * trace.kept(), ACTIVATIONS, OTHER_MICRO_BATCHES)
        self.begin()
        backward = False
        for event in trace.events:
            if isinstance(event, Allocation):
                if event.size > 0:
                    if not backward and event.made.phase == "backward":
                        backward = True
                        self.begin_backward()
                    kind = ACTIVATIONS if event.made.phase == "forward" else TEMPORARIES
                    keys[event.key] = add(event.size, kind, event.made.layer)
                else:
                    drop(keys.pop(event.key))
            elif isinstance(event, GradientReady):
                self.ready(event.name)
            elif isinstance(event, ParametersUsed):
                self.used(event.names, backward=backward)
        drop(others, *keys.values())
        self.end_backward()

    def begin(self) -> None: ...

    def begin_backward(self) -> None: ...

    def used(self, names: Sequence[str], *, backward: bool) -> None: ...

    def ready(self, name: str) -> None:
        """A gradient is complete."""
        if name not in self.gradients:
            self.gradients[name] = self.ledger.add(self.states.parameters[name] * self.states.size, GRADIENTS)

    def end_backward(self) -> None:
        if self.last:
            # Flattened, reduced, copied back.
            self.copy_for_a_moment(min(self.states.count, PLAIN_BUCKET) * self.states.size, BUFFERS)

    def copy_for_a_moment(self, size: int, kind: str) -> None:
        self.ledger.drop(self.ledger.add(size, kind))

    def step(self) -> None:
        gradients = self.each(4, GRADIENTS) if self.low else []
        self.make_moments()
        self.adamw(list(self.states.parameters.values()))
        self.ledger.drop(*gradients, *self.gradients.values())
        self.gradients.clear()

    def adamw(self, counts: Sequence[int]) -> None:
        """torch's update: on a CPU tensor by tensor, on a GPU all together."""
        if self.ledger.device == "cuda":
            self.ledger.drop(*[self.ledger.add(4 * count, STEP) for count in counts])
            return
        for count in counts:
            root = self.ledger.add(4 * count, STEP)
            quotient = self.ledger.add(4 * count, STEP)
            self.ledger.drop(root, quotient)

    def checkpoint(self) -> None:
        """Training state of as much as a file holds, from the device to the host."""
        states = self.states
        largest = max(states.parameters.values(), default=0) * 4 * (1 + states.moments)
        whole = 4 * (1 + states.moments) * -(-states.count // states.ranks)
        if self.ledger.device == "cuda":
            self.copy_for_a_moment(largest, CHECKPOINT)
            return
        self.copy_for_a_moment(max(min(whole, FILE_BYTES), largest), CHECKPOINT)


class _Sharded(_Plain):
    """ZeRO-1: optimizer states are sharded."""

    def build(self) -> None:
        states, ledger = self.states, self.ledger
        made = self.each(4, PARAMETERS)
        if self.low:
            for number, (key, count) in enumerate(zip(made, states.parameters.values(), strict=True)):
                made[number] = ledger.add(2 * count, PARAMETERS)
                ledger.drop(key)
        ledger.add(states.count * states.size, PARAMETERS)
        ledger.drop(*made)
        if not self.offloaded:
            if self.low:
                self.copy_for_a_moment(states.shard * 2, MASTERS)
            ledger.add(states.shard * 4, MASTERS)
        if states.averaged:
            ledger.add(4 * states.shard, AVERAGES)
        self.shard_of_gradients: int | None = None

    @property
    def offloaded(self) -> bool:
        return self.states.combination.offload != "none" and self.ledger.device == "cuda"

    def make_moments(self) -> None:
        if not self.moments and not self.offloaded:
            self.moments = [self.ledger.add(4 * self.states.shard, OPTIMIZER) for _ in range(self.states.moments)]

    def begin_backward(self) -> None:
        self.bucket = Buffer(self.ledger, self.states.setting("reduce_bucket_size"), self.states.size)

    def end_backward(self) -> None:
        if self.last:
            for name in list(self.gradients):
                self.into_bucket(name, self.gradients.pop(name))
            self.reduce()
        self.bucket.drop()

    def into_bucket(self, name: str, gradient: int) -> None:
        count = self.states.parameters[name]
        if self.bucket.filled + count > self.bucket.elements:
            self.reduce()
        if count <= self.bucket.elements:
            self.bucket.fill(count)
            self.ledger.drop(gradient)
        else:  # reduced by itself
            self.copy_for_a_moment(count * self.states.size, BUFFERS)
            self.ledger.drop(gradient)

    def reduce(self) -> None:
        if self.bucket.filled:
            self.copy_for_a_moment(self.bucket.filled * self.states.size, BUFFERS)
        self.bucket.filled = 0
        if self.shard_of_gradients is None and not self.offloaded:
            self.shard_of_gradients = self.ledger.add(self.states.shard * self.states.size, GRADIENTS)

    def step(self) -> None:
        states, ledger = self.states, self.ledger
        if self.offloaded:
            return
        flat = ledger.add(states.shard * states.size, STEP)
        if self.low:
            converted = ledger.add(states.shard * 4, STEP)
            ledger.drop(flat)
            flat = converted
        self.make_moments()
        self.adamw([states.shard])
        ledger.drop(flat)
        if self.shard_of_gradients is not None:
            ledger.drop(self.shard_of_gradients)
            self.shard_of_gradients = None


class _ShardedGradients(_Sharded):
    """ZeRO-2: gradients are sharded too, and leave as soon as they are complete."""

    def ready(self, name: str) -> None:
        self.into_bucket(name, self.ledger.add(self.states.parameters[name] * self.states.size, GRADIENTS))

    def end_backward(self) -> None:
        self.reduce()
        self.bucket.drop()


class _ShardedParameters(_ShardedGradients):
    """ZeRO-3: parameters are sharded too, and gathered where they are used."""

    def build(self) -> None:
        states, ledger = self.states, self.ledger
        in_host = states.combination.offload in ("parameters", "nvme") and ledger.device == "cuda"
        for count in states.parameters.values():
            whole = ledger.add(4 * count, PARAMETERS)
            if not in_host:
                ledger.add(-(-count // states.ranks) * states.size, PARAMETERS)
            ledger.drop(whole)
        if not self.offloaded:
            ledger.add(states.shard * 4, MASTERS)
        self.bucket = Buffer(ledger, states.setting("reduce_bucket_size"), states.size)
        ledger.add(states.shard * states.size, GRADIENTS)
        if states.averaged:
            ledger.add(4 * states.shard, AVERAGES)
        threshold = states.setting("stage3_param_persistence_threshold")
        self.persistent = {name for name, count in states.parameters.items() if count <= threshold}
        self.gathered: dict[str, int] = {}
        self.kept: dict[str, int] = {}  # gathered, given back, and still held by autograd
        self.arrivals: list[tuple[int, set[str]]] = []  # buffers, and who in them has not been asked for
        self.order: list[str] = []  # of first use

    def begin(self) -> None:
        self.position = 0  # in the order of use
        self.seen: set[str] = set()
        self.forward_order: list[str] = []

    def gather(self, names: Sequence[str]) -> None:
        """Parameters that are not there, copied out of the buffer that they arrive in.

        DeepSpeed keeps that buffer until the last of them has been asked for.
        """
        missing = [name for name in names if name not in self.gathered]
        size = self.states.size
        if not missing:
            return
        arrival = self.ledger.add(sum(self.states.parameters[name] for name in missing) * size, GATHERED)
        for name in missing:
            self.gathered[name] = self.ledger.add(self.states.parameters[name] * size, GATHERED)
        self.arrivals.append((arrival, set(missing)))

    def asked_for(self, names: Sequence[str]) -> None:
        for arrival, waiting in list(self.arrivals):
            waiting.difference_update(names)
            if not waiting:
                self.ledger.drop(arrival)
                self.arrivals.remove((arrival, waiting))

    def live(self) -> int:
        return sum(self.states.parameters[name] for name in self.gathered)

    def prefetch(self, upcoming: Sequence[str]) -> None:
        """As many of what comes next as DeepSpeed may bring before it is needed."""
        room = min(
            self.states.setting("stage3_prefetch_bucket_size"),
            self.states.setting("stage3_max_live_parameters") - self.live(),
        )
        wanted, elements = [], 0
        for name in upcoming:
            if elements >= room:
                break
            if name not in self.gathered:
                wanted.append(name)
                elements += self.states.parameters[name]
        self.gather(wanted)

    def used(self, names: Sequence[str], *, backward: bool) -> None:
        self.gather(names)
        self.asked_for(names)
        if backward:
            return  # a replay; what it gathers goes with the gradients
        self.forward_order += [name for name in names if name not in self.seen]
        self.seen.update(names)
        if self.order:
            at = len(self.forward_order)
            self.prefetch(self.order[at : at + 200])
        # What is used again only after a long way is given back, now that the next ones are here.
        remaining = self.states.count - sum(self.states.parameters[name] for name in self.forward_order)
        reuse = self.states.setting("stage3_max_reuse_distance")
        if 2 * remaining > reuse:
            for name in self.forward_order[: -len(names) or None]:
                if name in self.gathered and name not in self.persistent:
                    self.release(name, backward=False)

    def release(self, name: str, *, backward: bool) -> None:
        key = self.gathered.pop(name)
        if not backward and self.states.combination.recompute == "none":
            if name in self.kept:
                self.ledger.drop(self.kept.pop(name))
            self.kept[name] = key
        else:
            self.ledger.drop(key)

    def begin_backward(self) -> None:
        self.order = self.forward_order
        self.to_do = list(reversed(self.order))

    def ready(self, name: str) -> None:
        self.gather([name])
        self.asked_for([name])
        if name in self.to_do:
            at = self.to_do.index(name)
            del self.to_do[at]
            self.prefetch(self.to_do[at : at + 200])
        super().ready(name)
        if name in self.kept:
            self.ledger.drop(self.kept.pop(name))
        if name not in self.persistent:
            self.release(name, backward=True)

    def reduce(self) -> None:
        if self.bucket.filled:
            self.copy_for_a_moment(self.bucket.filled * self.states.size, BUFFERS)
        self.bucket.filled = 0

    def end_backward(self) -> None:
        self.reduce()
        self.asked_for(list(self.states.parameters))
        self.ledger.drop(*self.kept.values())
        self.kept.clear()
        for name in [name for name in self.gathered if name not in self.persistent]:
            self.release(name, backward=True)

    def step(self) -> None:
        if self.offloaded:
            return
        self.make_moments()
        most = min(self.states.shard, self.states.setting("sub_group_size"))
        flat = self.ledger.add(most * 4, STEP)
        self.adamw([most])
        self.ledger.drop(flat)


_STAGES: dict[int, Callable[[States, Ledger], Any]] = {
    0: _Plain,
    1: _Sharded,
    2: _ShardedGradients,
    3: _ShardedParameters,
}
