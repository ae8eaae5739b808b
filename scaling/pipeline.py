"""DeepSpeed's pipeline engine, and what it does not offer: passes of one's own on its 1F1B schedule.

A pass sends micro-batches through the stages. `train` is DeepSpeed's own forward and backward; `differentiate` goes
forward and back to something that every stage reads (positions), without touching a parameter's gradient; `forward`
only goes forward. Each calls `compute(number, arrived)`, which runs this rank's layers on micro-batch `number`.

What a stage computes with besides what arrives, every rank has from its own loader: graphs do not travel. Each message
says which micro-batch it belongs to, and its mark is compared with the receiver's.

This module leans on private names of DeepSpeed (`_PRIVATE`), which were read in 0.19: another version is refused.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from egnscale.scaling.engine import Engine, World
from egnscale.scaling.packing import pack, read_entries, unpack, write_entries

#: What a stage makes of micro-batch `number`: what it sends on, or, on the last stage, the number to go back from (or
#: nothing, if nobody goes back). `arrived` is None on the first stage.
Compute = Callable[[int, Sequence[Tensor | None] | None], Any]

#: What it uses of the engine: of its class, and of each engine (besides `_compute_loss`, which `train_batch` sets).
_PRIVATE = (
    *("_exec_schedule", "_exec_reduce_tied_grads", "_exec_reduce_grads", "_exec_optimizer_step", "_INSTRUCTION_MAP"),
    "set_dataiterator",
)
_PRIVATE_ATTRIBUTES = ("pipe_buffers", "grad_layer", "total_loss", "total_additional_losses")
VERSION = "0.19."
#: The end of a step in DeepSpeed's schedule, which is asked for by itself.
_END = (instructions.ReduceTiedGrads, instructions.ReduceGrads, instructions.OptimizerStep)
_COMPUTING = (instructions.ForwardPass, instructions.BackwardPass)


class StageTime(NamedTuple):
    """Seconds of a stage's passes: those that it computed, and all of them. The rest is waiting and sending."""

    computing: float
    total: float


@dataclass
class _Stopwatch:
    computing: float = 0.0
    total: float = 0.0
    _events: list[tuple[Any, Any, bool]] = field(default_factory=list)

    @contextmanager
    def measure(self, device: torch.device, *, computing: bool) -> Iterator[None]:
        """On a GPU by its own clock, which `read` looks at."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end, computing))
            return
        started = time.perf_counter()
        yield
        self._add(time.perf_counter() - started, computing=computing)

    def read(self) -> StageTime:
        """Since the last time."""
        for begin, end, computing in self._events:
            end.synchronize()
            self._add(begin.elapsed_time(end) / 1000, computing=computing)
        self._events.clear()
        found = StageTime(self.computing, self.total)
        self.computing = self.total = 0.0
        return found

    def _add(self, seconds: float, *, computing: bool) -> None:
        if computing:
            self.computing += seconds
        else:
            self.total += seconds


def bubble(times: Sequence[StageTime]) -> float:
    """Which part of the time stages did not compute, given the times of them all."""
    total = sum(time.total for time in times)
    return 1 - sum(time.computing for time in times) / total if total else 0.0


def stage_imbalance(times: Sequence[StageTime]) -> float:
    """The longest over the mean time that a stage computed; 1 is perfect."""
    computing = [time.computing for time in times]
    return max(computing) * len(computing) / sum(computing) if sum(computing) else 1.0


def check_deepspeed(engine: Any = None) -> None:
    """Whether this DeepSpeed is the one that this module was written for.

    Args:
        engine: to look at as well, once there is one.

    Raises:
        ValueError: naming what is missing, and the way out.
    """
    missing = [name for name in _PRIVATE if not hasattr(PipelineEngine, name)]
    missing += [name for name in _PRIVATE_ATTRIBUTES if engine is not None and not hasattr(engine, name)]
    if missing or not deepspeed.__version__.startswith(VERSION):
        lacks = f", and lacks {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"parallel.pipe leans on private names of DeepSpeed {VERSION}*; this is {deepspeed.__version__}{lacks}; "
            f"install deepspeed=={VERSION}*, or set parallel.pipe to 1"
        )


class _Body(nn.Module):
    """This rank's layers, as the one layer of its stage that DeepSpeed sees."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.compute: Callable[[Any], Any] | None = None

    def forward(self, inputs: Any) -> Any:
        assert self.compute is not None
        return self.compute(inputs)


class Pipeline(Engine):
    """A stage of a pipeline, and of its optimizer.

    Args:
        module: holds the parameters of the whole model; those of other stages are on the meta device.
        layers: of this stage.
        optimizer: over their parameters; None: only to predict.
        ds_config: a complete DeepSpeed configuration, with as many gradient accumulation steps as micro-batches.
        world: this process.
        stages: how many there are; ranks of a stage are consecutive.

    Raises:
        ValueError: for a DeepSpeed that lacks what this needs.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | None,
        ds_config: dict[str, Any],
        world: World,
        stages: int,
    ) -> None:
        check_deepspeed()
        ranks = world.size // stages
        self.stages, self.stage = stages, world.rank // ranks
        self._watch = None if optimizer is None else _Stopwatch()
        self._body = _Body(layers)
        whole: list[nn.Module] = [nn.Identity() for _ in range(stages)]
        whole[self.stage] = self._body
        module._apply(lambda x: x if x.is_meta else x.to(world.device))
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints how it cuts what has been cut
            pipe = PipelineModule(whole, num_stages=stages, partition_method="uniform", dynamic_shape=True)
            super().__init__(module, optimizer, ds_config, world, wrapped=pipe, share=world.rank % ranks)
        check_deepspeed(self._engine)
        self._marks: Sequence[int] = ()
        self._number = 0  # of the micro-batch that comes next

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def time(self) -> StageTime:
        """What this stage's passes took since the last time, without the reduction of gradients. Local."""
        return self._watch.read() if self._watch is not None else StageTime(0.0, 0.0)

    def __call__(self, *args: Any) -> Any:
        raise TypeError("a pipeline goes through whole steps: forward_backward, forward or differentiate")

    def backward(self, loss: Tensor) -> None:
        raise TypeError("a pipeline goes backward in forward_backward")

    # Passes

    def forward_backward(self, compute: Compute, marks: Sequence[int]) -> None:
        """Forward and backward for every micro-batch, and the reduction of gradients; `step` follows. Collective.

        Args:
            compute: on the last stage, gives the loss.
            marks: an integer for each micro-batch, the same on all ranks that work on it.
        """
        self._engine.total_loss = None
        self._engine.total_additional_losses = None
        self._engine._compute_loss = True
        self._run(instructions.TrainSchedule(len(marks), self.stages, self.stage), compute, marks)
        self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()

    def step(self) -> bool:
        self._engine._exec_optimizer_step()
        return True

    @torch.no_grad()
    def forward(self, compute: Compute, marks: Sequence[int]) -> None:
        """Forward for every micro-batch, without gradients. Collective."""
        schedule = instructions.InferenceSchedule(len(marks), self.stages, self.stage)

        def forward(engine: Any, buffer_id: int) -> None:
            engine.pipe_buffers["outputs"][buffer_id] = self._compute(compute, engine.pipe_buffers["inputs"][buffer_id])

        self._run(schedule, compute, marks, instead={instructions.ForwardPass: forward})

    def differentiate(self, compute: Compute, of: Callable[[int], Tensor], marks: Sequence[int]) -> list[Tensor]:
        """Forward for every micro-batch, and back to what each stage reads by itself. Collective.

        Args:
            compute: on the last stage, gives the number to differentiate.
            of: what to differentiate it in, given the micro-batch; asked for once that has been computed.

        Returns:
            of every micro-batch the derivative through this stage's reading of it: their sum over stages is the whole.
        """
        found: dict[int, Tensor] = {}
        numbers: dict[int, int] = {}

        def forward(engine: Any, buffer_id: int) -> None:
            numbers[buffer_id] = self._number
            engine.pipe_buffers["outputs"][buffer_id] = self._compute(compute, engine.pipe_buffers["inputs"][buffer_id])

        def backward(engine: Any, buffer_id: int) -> None:
            number, buffers = numbers.pop(buffer_id), engine.pipe_buffers
            inputs, outputs = buffers["inputs"][buffer_id], buffers["outputs"][buffer_id]
            result, seed = (outputs, None) if self.last else (outputs[0], engine.grad_layer[0])
            arrived = [] if self.first else [inputs[0]]
            mine, *before = torch.autograd.grad(
                result, [of(number), *arrived], seed, allow_unused=True, materialize_grads=True
            )
            found[number] = mine
            for x, gradient in zip(arrived, before, strict=True):
                x.grad = gradient
            buffers["outputs"][buffer_id] = None

        with torch.enable_grad():
            self._run(
                instructions.TrainSchedule(len(marks), self.stages, self.stage),
                compute,
                marks,
                instead={instructions.ForwardPass: forward, instructions.BackwardPass: backward},
            )
        return [found[number] for number in range(len(marks))]

    def _run(
        self,
        schedule: Any,
        compute: Compute,
        marks: Sequence[int],
        instead: dict[type, Callable[..., None]] | None = None,
    ) -> None:
        """Carry out a schedule of DeepSpeed's but for its end, with some of its instructions done otherwise."""
        engine, steps = self._engine, schedule.steps
        schedule.steps = lambda: ([one for one in step if not isinstance(one, _END)] for step in steps())
        table = {**type(engine)._INSTRUCTION_MAP, **(instead or {})}
        engine._INSTRUCTION_MAP = {kind: self._timed(kind, function) for kind, function in table.items()}
        engine.set_dataiterator(iter([(torch.tensor(number), torch.tensor(number)) for number in range(len(marks))]))
        self._marks, self._number = marks, 0
        self._body.compute = lambda inputs: self._compute(compute, inputs)
        try:
            with self._measured(computing=False):
                engine._exec_schedule(schedule)
        finally:
            del engine._INSTRUCTION_MAP
            self._body.compute = None
            for buffers in engine.pipe_buffers.values():
                buffers[:] = [None] * len(buffers)

    def _timed(self, kind: type, function: Callable[..., None]) -> Callable[..., None]:
        if kind not in _COMPUTING:
            return function

        def timed(engine: Any, buffer_id: int) -> None:
            with self._measured(computing=True):
                function(engine, buffer_id)

        return timed

    def _measured(self, *, computing: bool) -> AbstractContextManager[None]:
        if self._watch is None:
            return contextlib.nullcontext()
        return self._watch.measure(self.world.device, computing=computing)

    # Messages: a flat tensor, and integers: the micro-batch's number, its mark, what the flat tensor holds

    def _compute(self, compute: Compute, inputs: Any) -> Any:
        """On every stage, micro-batches come in order."""
        number, arrived = self._number, None
        self._number += 1
        if not self.first:
            flat, header = inputs
            theirs, mark, *entries = header.tolist()
            if (theirs, mark) != (number, self._marks[number] if number < len(self._marks) else None):
                raise ValueError(
                    f"stage {self.stage} expects another micro-batch than stage {self.stage - 1} sends: {number} of "
                    f"{len(self._marks)}, and {theirs} comes (mark {mark}); do all ranks read the same data?"
                )
            arrived = unpack(flat, read_entries(entries))
        result = compute(number, arrived)
        if self.last:
            return result
        flat, sent = pack(result)
        return flat, torch.tensor([number, self._marks[number], *write_entries(sent)], device=self.world.device)
