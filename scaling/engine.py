"""The one place that talks to DeepSpeed: starting processes, the training engine, what a rank holds of each parameter.

Everything else in the project sees `Engine` and a few collectives on small tensors.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

# Set before the import: DeepSpeed probes the machine and configures its logger while it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
logging.getLogger("torch.distributed").setLevel(logging.ERROR)

import deepspeed  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402

from egnscale.scaling.training_state import Piece, read_state, write_state  # noqa: E402

deepspeed_logger.setLevel(logging.WARNING)
for handler in deepspeed_logger.handlers:
    if isinstance(handler, logging.StreamHandler):
        handler.setStream(sys.stderr)  # standard output is for results
# DeepSpeed calls collectives under names that torch has begun to rename: nothing a user can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class _NothingCompatible(dict):
    """DeepSpeed's table of compiled operators, saying that none is available."""

    def get(self, key: Any, default: Any = None) -> bool:
        return False

    def __getitem__(self, key: Any) -> bool:
        return False


def start_world() -> World:
    """Join the process group that the launcher's environment describes; alone, form one of size 1. Idempotent.

    The `deepspeed` launcher and `torchrun` set RANK and WORLD_SIZE; under `mpirun`, mpi4py tells them. Otherwise this
    is one process.

    Raises:
        ValueError: under `mpirun` without mpi4py, and under `srun` with several tasks.
    """
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        # On CPU, DeepSpeed would compile a shared-memory operator (76 s) that only inference uses.
        if not cuda:
            deepspeed.ops.__compatible_ops__ = _NothingCompatible()
        with _launcher_environment() as by_mpi:
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=by_mpi, verbose=False
            )
        atexit.register(dist.destroy_process_group)
    # deepspeed.initialize insists on the variable.
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves every rank all cores.
        peers = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // peers))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


@contextmanager
def _launcher_environment() -> Iterator[bool]:
    """The variables that DeepSpeed starts from; yields whether it should ask MPI for them.

    A lone process gets them only for as long as they are needed: its child processes would inherit them.
    """
    if "RANK" in os.environ:
        yield False
        return
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", 1))) > 1:
        if importlib.util.find_spec("mpi4py") is None:
            raise ValueError("started by mpirun, but mpi4py is not installed: pip install 'egnscale[mpi]'")
        yield True
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if int(tasks) > 1:
        raise ValueError(
            f"started by srun with {tasks} tasks, which this version does not join; "
            "start one task on each node and let it run torchrun or deepspeed"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in alone.items()})
    try:
        yield False
    finally:
        for key in alone:
            os.environ.pop(key, None)


def computes_in_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this process's device."""
    return bool(get_accelerator().is_fp16_supported())


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a small tensor over all ranks."""
    value = value.clone()
    dist.all_reduce(value)
    return value


def gather_over_ranks(value: Any) -> list[Any]:
    """A small picklable value of every rank, in the order of ranks."""
    if dist.get_world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def once(action: Callable[[], Any]) -> None:
    """Do something on rank 0 while the others wait; where it fails, it fails on every rank. Collective.

    Raises:
        ValueError, OSError: with the message of rank 0's error.
    """
    problem: tuple[bool, str] | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (ValueError, OSError) as error:
            problem = (isinstance(error, OSError), str(error))
    problem = gather_over_ranks(problem)[0]
    if problem is not None:
        raise (OSError if problem[0] else ValueError)(problem[1])


@contextmanager
def sharded_layers(ds_config: dict[str, Any], *holders: type[nn.Module]) -> Iterator[None]:
    """Within, a model is built for ZeRO-3 layer by layer: never is more than one of its layers whole.

    A layer's parameters are shared out among the ranks as soon as it is part of the model, or of a list of layers.
    DeepSpeed's own context would put buffers and constants into the parameters' precision, and shares out a module's
    parameters before its parent has initialised them.

    Args:
        ds_config: the complete DeepSpeed configuration.
        holders: classes of what holds layers.
    """
    precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtype for key, dtype in precisions.items() if ds_config.get(key, {}).get("enabled")), torch.float32)

    swapper = None

    def share(parent: nn.Module, name: str, layer: nn.Module | None) -> None:
        nonlocal swapper
        if layer is None or not isinstance(parent, holders):
            return
        whole = [parameter for parameter in layer.parameters() if not hasattr(parameter, "ds_id")]
        for parameter in whole:
            parameter.data = parameter.data.to(dtype)
        if whole:
            # One swapper for all layers: with NVMe it has the buffers that they pass through.
            context = deepspeed.zero.Init(module=layer, config_dict_or_path=ds_config, param_swapper=swapper)
            swapper = context.param_swapper

    hook = register_module_module_registration_hook(share)
    try:
        yield
    finally:
        hook.remove()


#: DeepSpeed's counters; they go on where a resumed run goes on.
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
#: DeepSpeed's names of what makes up a dynamic loss scale.
_LOSS_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """`deepspeed.initialize`, and what a rank holds of each parameter under each ZeRO stage.

    Args:
        module: computes the loss: `module(*args)` is what `engine(*args)` returns. Parameters on the meta device are
            another stage's.
        optimizer: over the module's parameters; None: only to predict.
        ds_config: a complete DeepSpeed configuration (`egnscale.scaling.ds_config`).
        world: this process.
        wrapped: what DeepSpeed gets in place of the module.
        share: this rank among those that share its parameters' states; None: they are all of the world.

    Raises:
        ValueError: for a configuration whose state could not be saved.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        ds_config: dict[str, Any],
        world: World,
        *,
        wrapped: nn.Module | None = None,
        share: int | None = None,
    ) -> None:
        offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
        if offload.get("ratio", 1.0) != 1.0:
            raise ValueError(
                "the DeepSpeed configuration offloads a part of the optimizer (ratio), and such state cannot be saved; "
                "leave ratio out"
            )
        self.world = world
        self.module = module
        self._share = world.rank if share is None else share
        self._shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self._trainable = {name: p for name, p in module.named_parameters() if p.requires_grad and not p.is_meta}
        self.zero_stage = int(ds_config.get("zero_optimization", {}).get("stage", 0))
        self._engine, *_ = deepspeed.initialize(
            model=wrapped or module.to(world.device), optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        if self.zero_stage == 0 and hasattr(self._engine.optimizer, "fp32_groups"):
            # bf16 without ZeRO: DeepSpeed makes the optimizer's state by a step without gradients, which counts as a
            # step and decays the weights.
            self._engine.optimizer.refresh_fp32_params()
            self._engine.basic_optimizer.state.clear()
        if hasattr(self._loss_scaler, "raise_error_at_min_scale"):
            # Whoever counts skipped steps knows better when to stop, and says it in one line.
            self._loss_scaler.raise_error_at_min_scale = False

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    @contextmanager
    def calling_module(self) -> Iterator[None]:
        """Within, the module and its parts may be called directly, as evaluation does: without the engine's backward.

        ZeRO-3 gathers what a part uses of another one's parameters only where it is told that a forward pass is on.
        """
        parts = [module._parameters for module in self.module.modules() if hasattr(module._parameters, "_in_forward")]
        for parameters in parts:
            parameters._in_forward = True
        try:
            yield
        finally:
            for parameters in parts:
                parameters._in_forward = False

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> bool:
        """Count one micro-batch; returns True where it ended with an optimizer step."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        return boundary

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def set_lr(self, lr: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient, before clipping; NaN where DeepSpeed does not compute it (stage 0)."""
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    # What a rank computes with. Stages 0 to 2: every parameter whole. Stage 3: a flat shard of each, of equal size.

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """(name, what this rank holds) of each trainable parameter, in the precision it computes in; live tensors."""
        for name, parameter in self._trainable.items():
            yield name, (parameter.ds_tensor if self.zero_stage == 3 else parameter).detach()  # type: ignore[attr-defined]

    @torch.no_grad()
    def write_held(self, parts: Mapping[str, Tensor]) -> None:
        """Overwrite what `held` gives, not the masters. Collective at stage 3."""
        for name, part in parts.items():
            parameter = self._trainable[name]
            if self.zero_stage < 3:
                parameter.copy_(part)
                continue
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            shard.copy_(part)
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                # Small parameters stay gathered between steps.
                flat = torch.empty(shard.numel() * self.world.size, dtype=shard.dtype, device=self.world.device)
                dist.all_gather_into_tensor(flat, shard.to(flat.device))
                parameter.copy_(flat[: parameter.numel()].view_as(parameter))
        if self.zero_stage == 3:
            self._engine.optimizer.invalidate_secondary_tensor()

    # Master weights, and what else has a number for each of theirs: in fp32, of stage 1 on shared out among the ranks.

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's elements of the master weight) of each trainable parameter: flat, live."""
        for name, piece in self._pieces.items():
            yield name, piece.of(piece.holder)

    def whole_masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, master weight), whole. Collective from stage 1 on: every rank must exhaust it."""
        for name, part in self.masters():
            yield name, self.whole(name, part)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A parameter-shaped quantity from the parts that the ranks have of it, fp32. Collective from stage 1 on."""
        piece = self._pieces[name]
        flat = torch.zeros(piece.shape.numel(), device=self.world.device)
        flat[piece.start : piece.start + piece.count] = part
        if self.zero_stage > 0 and self.world.size > 1:
            # An element comes from one rank and the others add zero; summed as integers, its bits stay as they are.
            dist.all_reduce(flat.view(torch.int32))
        return flat.view(piece.shape)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a parameter-shaped quantity: the inverse of `whole`. Local."""
        piece = self._pieces[name]
        return whole.reshape(-1)[piece.start : piece.start + piece.count]

    def shapes(self) -> dict[str, torch.Size]:
        """Of each trainable parameter, whole."""
        return {name: piece.shape for name, piece in self._pieces.items()}

    @torch.no_grad()
    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Compute with other weights than the masters, until `write_held`: given as parts of them. Collective."""
        self._write_weights((name, self.whole(name, part)) for name, part in parts.items())

    @torch.no_grad()
    def set_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take whole weights for the masters, and compute with them. Collective at stage 3."""
        masters = dict(self.masters())

        def through_masters() -> Iterator[tuple[str, Tensor]]:
            for name, whole in weights:
                masters[name].copy_(self.part(name, whole))
                yield name, whole

        self._write_weights(through_masters())

    def _write_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, whole in weights:
            if name not in self._trainable:
                continue
            part = whole
            if self.zero_stage == 3:
                shard: Tensor = self._trainable[name].ds_tensor  # type: ignore[attr-defined]
                part = torch.zeros_like(shard)
                mine = self.part(name, whole)
                part[: mine.numel()] = mine
            self.write_held({name: part})

    # The training state: fp32 masters and the optimizer's state.

    def save(self, directory: Path) -> None:
        """Write the training state below a directory, each rank a share of it. Collective.

        Raises:
            OSError: on every rank, if any could not write.
        """
        problem = write_state(
            directory,
            self._pieces,
            self._engine.basic_optimizer,
            dict(self.module.named_buffers()),
            {name: getattr(self._engine, name) for name in _COUNTERS},
            sharded=self.zero_stage > 0,
            device=self.world.device,
        )
        if problems := [text for text in gather_over_ranks(problem) if text]:
            raise OSError(problems[0])

    def load(self, directory: Path) -> None:
        """Read what `save` wrote under whatever layout. Collective.

        Raises:
            ValueError: on every rank, where a file cannot be read or does not fit.
        """
        problem = ""
        try:
            counters = read_state(
                directory,
                self._pieces,
                self._engine.basic_optimizer,
                dict(self.held()),
                dict(self.module.named_buffers()),
                weights_sharded=self.zero_stage == 3,
            )
        except ValueError as error:
            problem = str(error)
        if problems := [text for text in gather_over_ranks(problem) if text]:
            raise ValueError(problems[0])
        for name in _COUNTERS:
            setattr(self._engine, name, counters[name])
        if self.zero_stage == 3:
            self.write_held(dict(self.held()))  # small parameters stay gathered between steps

    @cached_property
    def _pieces(self) -> dict[str, Piece]:
        """Where this rank keeps its piece of each trainable parameter's training state."""
        optimizer, rank = self._engine.optimizer, self._share
        found: dict[int, Piece] = {}
        trainable = self._trainable
        if self.zero_stage == 0:
            groups = getattr(optimizer, "fp16_groups", None)
            masters = {id(p): p for p in trainable.values()}
            if groups is not None:  # bf16
                for group, fp32_group in zip(groups, optimizer.fp32_groups, strict=True):
                    masters |= {id(p): master for p, master in zip(group, fp32_group, strict=True)}
            found = {id(p): Piece(p.shape, masters[id(p)], 0, 0, p.numel()) for p in trainable.values()}
        elif self.zero_stage < 3:
            for group, offsets, holder in self._flat_groups():
                # Every rank has an equal part of the group's flattened parameters.
                begin, end = rank * holder.numel(), (rank + 1) * holder.numel()
                for p, offset in zip(group, offsets, strict=True):
                    low, high = max(offset, begin), min(offset + p.numel(), end)
                    found[id(p)] = Piece(p.shape, holder, low - begin, low - offset, max(0, high - low))
        else:
            masters_of = optimizer.fp32_partitioned_groups_flat
            for p in trainable.values():
                group, at, size = optimizer.grad_position[optimizer.get_param_id(p)]
                shape: torch.Size = p.ds_shape  # type: ignore[attr-defined]
                count = max(0, min(size, shape.numel() - rank * size))
                found[id(p)] = Piece(shape, masters_of[group], at, rank * size, count)
        pieces = {name: found[id(p)] for name, p in trainable.items()}
        # Of another stage's parameters there is nothing here; all ranks list the same names in the same order.
        nothing = torch.empty(0, device=self.world.device)
        return {name: pieces.get(name, Piece(shape, nothing, 0, 0, 0)) for name, shape in self._shapes.items()}

    def _flat_groups(self) -> Iterator[tuple[list[nn.Parameter], list[int], Tensor]]:
        """Of ZeRO-1 and -2's groups: parameters, their offsets in the flattened group, this rank's fp32 part of it."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp32_groups_flat_partition"):  # bf16 with gradients accumulated in fp32
            for group, holder in zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True):
                yield group, [0, *accumulate(p.numel() for p in group)][:-1], holder
        else:
            yield from zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                optimizer.single_partition_of_fp32_groups,
                strict=True,
            )

    # What a step is going to do, and whether it did it.

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies losses by, so that small gradients do not vanish; 1 in other precisions."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def loss_scaling(self) -> dict[str, float]:
        """Where fp16's loss scale stands, and how long ago a gradient overflowed."""
        scaler = self._loss_scaler
        return {name: getattr(scaler, name) for name in _LOSS_SCALING if hasattr(scaler, name)}

    def load_loss_scaling(self, state: Mapping[str, float]) -> None:
        """Go on where `loss_scaling` was taken, under whatever stage."""
        scaler = self._loss_scaler
        for name, value in state.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

    @property
    def _loss_scaler(self) -> Any:
        """DeepSpeed keeps it in one place for stage 0 and in another for the others; None where there is none."""
        optimizer = self._engine.optimizer
        return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed has left out so far, since a gradient was not finite."""
        return int(self._engine.skipped_steps)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's elements of the averaged gradient, before clipping) of each trainable parameter, flat.

        As `masters`, and to be read between the last backward pass of a step and the step. A gradient that DeepSpeed
        has put on a disk is left out.
        """
        scale = self.loss_scale
        flat = {}
        for holder, parts in self._gradient_parts():
            whole = torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1)
            flat[id(holder)] = whole.float() / scale if scale != 1 else whole.float()
        for name, piece in self._pieces.items():
            if id(piece.holder) in flat:
                yield name, piece.of(flat[id(piece.holder)])

    def whole_gradient_norm(self) -> float:
        """Norm of what `gradients` gives, over all parameters; NaN or infinite if an element is. Collective."""
        parts = [part for _, pieces in self._gradient_parts() for part in pieces if part.numel()]
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if parts:
            norms = torch._foreach_norm([part.float() if part.dtype == torch.float16 else part for part in parts])
            square = torch.stack([norm.double() for norm in norms]).square().sum().to(square.device)
        dist.all_reduce(square)
        if self.zero_stage == 0:
            square /= self.world.size  # every rank has all of it
        return float(square.sqrt()) / self.loss_scale

    def _gradient_parts(self) -> list[tuple[Tensor, list[Tensor]]]:
        """(holder of `Piece`s, tensors that make up its gradient when flattened), times the loss scale."""
        optimizer = self._engine.optimizer
        if self.zero_stage == 0:
            grads = ((self._pieces[name].holder, p.grad) for name, p in self._trainable.items())
            return [(holder, [grad]) for holder, grad in grads if grad is not None]
        if self.zero_stage == 3:
            holders, offloaded = optimizer.fp32_partitioned_groups_flat, optimizer.offload_optimizer
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # bf16 with gradients accumulated in fp32
            gradients = optimizer.fp32_groups_gradient_flat_partition
            return [(h, [g]) for h, g in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True)]
        else:
            holders, offloaded = optimizer.single_partition_of_fp32_groups, optimizer.cpu_offload
        if offloaded:
            if hasattr(optimizer, "_wait_for_offload_copies"):
                optimizer._wait_for_offload_copies()
            return [(holder, [holder.grad]) for holder in holders if holder.grad is not None]
        return [(holder, list(optimizer.averaged_gradients[i])) for i, holder in enumerate(holders)]
