"""What one training step allocates and computes, seen by running it: best on the meta device, where it takes no memory.

Every operation passes a dispatch mode, which keeps account of the storages that are alive, of floating-point operations
and of bytes read and written. Nothing is estimated: what autograd keeps, what backward makes for a moment, what is made
again, and the order of it all are those of the real step.

A trace is a list of events. Gradients of parameters leave it as soon as they are complete, since what becomes of them
depends on how optimizer states are sharded (`egnscale.scaling.rank_memory`); the uses of modules' parameters are
in it, since ZeRO-3 gathers them there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Phase = Literal["forward", "backward"]


class Made(NamedTuple):
    """Who made a tensor."""

    phase: Phase
    layer: str  #: "" outside of layers


class Allocation(NamedTuple):
    """A storage comes to life (size > 0) or goes (size < 0)."""

    key: int  #: of the storage: the same when it comes and when it goes
    size: int  #: bytes
    made: Made


class GradientReady(NamedTuple):
    """The gradient of a parameter is complete; its storage left the account with the event before."""

    name: str


class ParametersUsed(NamedTuple):
    """A module that holds parameters starts its forward pass."""

    names: tuple[str, ...]


Event = Allocation | GradientReady | ParametersUsed


@dataclass
class Work:
    """What operations cost."""

    flops: Counter[torch.dtype] = field(default_factory=Counter)
    bytes: int = 0  #: read and written, without views
    calls: int = 0  #: operations that touch memory
    #: (dtype, floating-point operations, bytes) of each, for a model of their time; equal ones counted together
    costs: Counter[tuple[torch.dtype, int, int]] = field(default_factory=Counter)

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


@dataclass
class StepTrace:
    """One forward and backward pass."""

    events: list[Event] = field(default_factory=list)
    work: dict[str, Work] = field(default_factory=dict)  #: by layer

    @property
    def total(self) -> Work:
        found = Work()
        for work in self.work.values():
            found.flops += work.flops
            found.costs += work.costs
            found.bytes, found.calls = found.bytes + work.bytes, found.calls + work.calls
        return found

    def peak(self) -> int:
        """Bytes of the tensors that are alive together, at most; gradients of parameters not among them."""
        alive = most = 0
        for event in self.events:
            if isinstance(event, Allocation):
                alive += event.size
                most = max(most, alive)
        return most

    def kept(self) -> int:
        """Bytes that are alive when forward has ended."""
        alive = 0
        for event in self.events:
            if isinstance(event, Allocation):
                if event.made.phase == "backward":
                    break
                alive += event.size
        return alive

    def alive_at(self, index: int) -> Counter[Made]:
        """Bytes by who made them, after the event with this index."""
        found: Counter[Made] = Counter()
        for event in self.events[: index + 1]:
            if isinstance(event, Allocation):
                found[event.made] += event.size
        return +found


class TraceMode(TorchDispatchMode):
    """Writes a `StepTrace`.

    Args:
        known: tensors that were there before: they are not accounted for.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.trace = StepTrace()
        self.phase: Phase = "forward"
        self.layer = ""
        self._next = 0
        self._alive: dict[int, tuple[int, int, Made, Any]] = {}  # storage's address -> key, size, made, weak reference
        self._known = {x.untyped_storage()._cdata: x for x in known}  # held, so that no address is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func.is_view or not made:
            return result
        new = [x for x in made if self._account(x)]
        self._count(func, args, kwargs, result, made, any_new=bool(new))
        return result

    def _account(self, x: Tensor) -> bool:
        """Whether a tensor's storage is new."""
        storage = x.untyped_storage()
        address = storage._cdata
        if address in self._alive or address in self._known:
            return False
        size = storage.nbytes()
        if not size:
            return False
        key, self._next = self._next, self._next + 1
        made = Made(self.phase, self.layer)
        # The storage's Python object lives as long as the storage.
        reference = weakref.ref(storage, lambda _: self._gone(address))
        self._alive[address] = (key, size, made, reference)
        self.trace.events.append(Allocation(key, size, made))
        return True

    def _gone(self, address: int) -> None:
        found = self._alive.pop(address, None)
        if found is not None:
            key, size, made, _ = found
            self.trace.events.append(Allocation(key, -size, made))

    def _count(self, func: Any, args: tuple, kwargs: dict, result: Any, made: list[Tensor], *, any_new: bool) -> None:
        packet = func._overloadpacket
        flops = 0
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=result))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any_new and not given:
            return
        if packet in _ALLOCATES_ONLY:
            return
        moved = sum(x.numel() * x.element_size() for x in (*given, *made))
        work = self.trace.work.setdefault(self.layer, Work())
        dtype = made[0].dtype
        work.flops[dtype] += flops
        work.bytes += moved
        work.calls += 1
        work.costs[dtype, flops, moved] += 1

    # Called from hooks

    def gradient(self, name: str, parameter: Tensor) -> None:
        """Take a complete gradient out of the account, and away."""
        assert parameter.grad is not None
        address = parameter.grad.untyped_storage()._cdata
        self._gone(address)
        self._known.pop(address, None)
        self.trace.events.append(GradientReady(name))
        parameter.grad = None

    def used(self, names: tuple[str, ...]) -> None:
        self.trace.events.append(ParametersUsed(names))

    def close(self) -> None:
        """Forget what is still alive."""
        self._alive.clear()
        self._known.clear()


_ALLOCATES_ONLY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_strided,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
}


def trace_step(
    module: nn.Module, loss: Callable[[], Tensor], layers: Mapping[str, nn.Module], known: Iterable[Tensor] = ()
) -> StepTrace:
    """Run `loss().backward()` and write down what it allocates and computes.

    Args:
        module: holds all parameters, without gradients.
        loss: makes the loss of a batch.
        layers: modules by the names that costs are to be found under.
        known: tensors that are there before the step, such as the batch; parameters and buffers are known.
    """
    held = [*module.parameters(), *module.buffers(), *known]
    mode = TraceMode(held)
    with _watched(module, layers, mode), mode:
        value = loss()
        mode.phase = "backward"
        value.backward()
        del value
    mode.close()
    return mode.trace


@contextmanager
def _watched(module: nn.Module, layers: Mapping[str, nn.Module], mode: TraceMode) -> Iterator[None]:
    """Hooks that tell the mode where it is."""
    handles = []
    stack: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append(mode.layer)
            mode.layer = name

        return hook

    def leave(*_: Any) -> None:
        mode.layer = stack.pop()

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(name)))
        handles.append(layer.register_forward_hook(leave))
    full = {id(p): name for name, p in module.named_parameters()}
    for child in module.modules():
        mine = tuple(full[id(p)] for p in child.parameters(recurse=False))
        if mine:
            handles.append(child.register_forward_pre_hook(lambda *_, mine=mine: mode.used(mine)))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: mode.gradient(name, p)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
