"""The training state, in files that know no layout: what `--resume` reads.

    training/
        index.json              counters, the optimizer's step, and which file holds which parameter
        buffers.safetensors     the module's buffers
        00000.safetensors       NAME/fp32 (the master weight), NAME/exp_avg, ...: each whole and in fp32; a file holds
                                a share of the parameters

However the ranks divide the state among them, each holds of every parameter one `Piece`. Writing collects one
parameter's pieces at a time on the rank whose file it goes to; reading takes from the files what a piece needs.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DIRECTORY = "training"
INDEX = "index.json"
BUFFERS = "buffers.safetensors"
#: The key of a parameter's master weight; the others are the optimizer's own.
MASTER = "fp32"
#: A rank keeps about one file's content in memory while it writes.
FILE_BYTES = 1 << 30

#: Elements start..stop of a parameter's flattened quantity `key`: read(key, start, stop).
Read = Callable[[str, int, int], Tensor]


@dataclass(frozen=True)
class Piece:
    """Elements start..start + count of a flattened parameter, which this rank's optimizer keeps in one of its tensors.

    There they are at..at + count of the flattened tensor, and of the optimizer's state of that tensor.
    """

    shape: torch.Size
    holder: Tensor
    at: int
    start: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of the holder, or of a quantity that has an element for each of the holder's."""
        return tensor.detach().view(-1)[self.at : self.at + self.count]

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimizer's quantities that have an element for each of the holder's."""
        state = optimizer.state.get(self.holder, {})
        return {key: value for key, value in state.items() if key != "step" and value.shape == self.holder.shape}


def write_state(
    directory: Path,
    pieces: Mapping[str, Piece],
    optimizer: torch.optim.Optimizer,
    buffers: Mapping[str, Tensor],
    counters: Mapping[str, int],
    *,
    sharded: bool,
    device: torch.device,
) -> str:
    """Write the training state, each rank a share of it. Collective.

    Args:
        directory: the checkpoint.
        pieces: by parameter, in the same order on every rank.
        optimizer: whose parameters are the pieces' holders.
        buffers: of the module; rank 0's are written.
        counters: to be kept as they are.
        sharded: whether the ranks' pieces make up a parameter; False where each holds it whole.
        device: that the process group communicates from.

    Returns:
        why this rank could not write; "" where it could. It is not raised, since the others wait for its pieces.
    """
    directory = directory / DIRECTORY
    rank, size = dist.get_rank(), dist.get_world_size()
    keys = sorted({key for piece in pieces.values() for key in piece.state(optimizer)})
    # A parameter that never had a gradient has no state where it is not sharded.
    keys_of = {
        name: [MASTER, *(key for key in keys if sharded or key in piece.state(optimizer))]
        for name, piece in pieces.items()
    }
    plan = plan_files({name: 4 * pieces[name].shape.numel() * len(keys_of[name]) for name in pieces}, size, FILE_BYTES)
    problem = ""

    def write(name: str, tensors: Mapping[str, Tensor]) -> None:
        nonlocal problem
        if problem:
            return
        try:
            directory.mkdir(exist_ok=True)
            _write_tensors(directory / name, tensors)
        except OSError as error:
            problem = str(error)

    for round, names_of in enumerate(plan):
        mine: dict[str, Tensor] = {}
        for writer, names in enumerate(names_of):
            for name in names:
                mine |= _collect(name, pieces[name], optimizer, keys_of[name], writer, sharded=sharded, device=device)
        if mine:
            write(_file(round, rank, size), mine)
    if rank == 0:
        write(BUFFERS, buffers)
        steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
        files = {
            name: _file(round, writer, size)
            for round, names_of in enumerate(plan)
            for writer, names in enumerate(names_of)
            for name in names
        }
        index = {"step": max(steps, default=0.0), "counters": dict(counters), "files": files}
        if not problem:
            try:
                (directory / INDEX).write_text(json.dumps(index, indent=1))
            except OSError as error:
                problem = str(error)
    return problem


def read_state(
    directory: Path,
    pieces: Mapping[str, Piece],
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    *,
    weights_sharded: bool,
) -> dict[str, int]:
    """Read what this rank holds of the training state, whatever layout wrote it. Local.

    Args:
        directory: the checkpoint.
        pieces: by parameter.
        optimizer: whose parameters are the pieces' holders.
        weights: what the module computes with: whole parameters, or (`weights_sharded`) the pieces, perhaps padded.
            Parameters that are not among them are another stage's.
        buffers: of the module.

    Returns:
        the counters.

    Raises:
        ValueError: where it cannot be read or holds other parameters; one line with the file and the cause.
    """
    saved = _Saved(directory / DIRECTORY, {name: tuple(piece.shape) for name, piece in pieces.items()})
    for name, keys, read in saved.parameters():
        if name not in weights:
            continue  # another stage's
        piece, weight = pieces[name], weights[name].view(-1)
        stop = piece.start + piece.count
        if weights_sharded:
            master = read(MASTER, piece.start, stop)
            weight[: piece.count].copy_(master)
        else:
            whole = read(MASTER, 0, piece.shape.numel())
            weight.copy_(whole)
            master = whole[piece.start : stop]
        piece.of(piece.holder).copy_(master)
        state = optimizer.state[piece.holder]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(piece.holder, requires_grad=False)
            piece.of(state[key]).copy_(read(key, piece.start, stop))
        if keys:
            state["step"] = torch.tensor(saved.step)
    for name, buffer in saved.buffers({name: tuple(buffer.shape) for name, buffer in buffers.items()}).items():
        buffers[name].copy_(buffer)
    return saved.counters


def _collect(
    name: str,
    piece: Piece,
    optimizer: torch.optim.Optimizer,
    keys: list[str],
    writer: int,
    *,
    sharded: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """A parameter's training state, whole, on the rank that writes it; nothing on the others. Collective."""
    mine = dist.get_rank() == writer
    if not (sharded or mine):
        return {}
    here = {MASTER: piece.holder, **piece.state(optimizer)}
    whole = torch.zeros(len(keys), piece.shape.numel(), device=device)
    for row, key in zip(whole, keys, strict=True):
        if piece.count:
            row[piece.start : piece.start + piece.count].copy_(piece.of(here[key]))
    if sharded and dist.get_world_size() > 1:
        # An element comes from one rank and the others add zero; summed as integers, its bits stay as they are.
        dist.reduce(whole.view(torch.int32), writer)
    if not mine:
        return {}
    return {f"{name}/{key}": row.view(piece.shape).cpu() for row, key in zip(whole, keys, strict=True)}


def plan_files(sizes: Mapping[str, int], writers: int, limit: int) -> list[list[list[str]]]:
    """Which writer writes which parameters, in rounds of at most one file for each.

    Args:
        sizes: bytes of each parameter's state.
        writers: ranks, which get about the same amount.
        limit: bytes of a file; one that is larger by itself gets its own.

    Returns:
        rounds; of each, every writer's names (none for a writer that has finished).
    """
    heap = [(0, writer) for writer in range(writers)]
    files: list[list[list[str]]] = [[] for _ in range(writers)]
    room = [0] * writers
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, writer = heap[0]
        heapq.heapreplace(heap, (load + sizes[name], writer))
        if not files[writer] or room[writer] < sizes[name]:
            files[writer].append([])
            room[writer] = limit
        files[writer][-1].append(name)
        room[writer] -= sizes[name]
    return [list(names) for names in zip_longest(*files, fillvalue=[])]


def _file(round: int, writer: int, writers: int) -> str:
    return f"{round * writers + writer:05d}.safetensors"


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; an OSError where that fails."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    path.chmod(0o644)  # as the other files; safetensors leaves it to its owner alone


class _Saved:
    """The files, read piece by piece; where one cannot be read or does not fit, a ValueError names it and the cause."""

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.directory, self.shapes = directory, shapes
        index = directory / INDEX
        try:
            record = json.loads(index.read_text())
            self.step = float(record["step"])
            self.counters = {str(name): int(value) for name, value in record["counters"].items()}
            self._files: dict[str, str] = dict(record["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} cannot be read: {error!r}") from None
        problems = [f"lacks {name}" for name in shapes.keys() - self._files.keys()]
        problems += [f"has {name}, which this run does not" for name in self._files.keys() - shapes.keys()]
        if problems:
            raise ValueError(f"{index} does not fit this run: it {'; '.join(sorted(problems)[:3])}")

    def parameters(self) -> Iterator[tuple[str, list[str], Read]]:
        """(name, keys of the optimizer's state, how to read it) of every parameter, file by file."""
        names_in: dict[str, list[str]] = {}
        for name, file_name in self._files.items():
            names_in.setdefault(file_name, []).append(name)
        for file_name, names in names_in.items():
            path = self.directory / file_name
            with _reading(path), safe_open(path, framework="pt") as file:
                keys: dict[str, list[str]] = {}
                for full_name in file.keys():  # noqa: SIM118
                    name, _, key = full_name.rpartition("/")
                    keys.setdefault(name, []).append(key)
                for name in names:
                    yield name, [key for key in keys.get(name, []) if key != MASTER], self._reader(file, path, name)

    def buffers(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        path = self.directory / BUFFERS
        with _reading(path), safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if {name: tuple(tensor.shape) for name, tensor in found.items()} != shapes:
            raise ValueError(f"{path} does not fit this run: it holds other buffers, or of other shapes")
        return found

    def _reader(self, file: Any, path: Path, name: str) -> Read:
        shape = tuple(self.shapes[name])

        def read(key: str, start: int, stop: int) -> Tensor:
            full_name = f"{name}/{key}"
            with _reading(path):
                stored = file.get_slice(full_name)
                found = tuple(stored.get_shape())
                if found != shape:
                    raise ValueError(f"{path}: {full_name} has shape {found}, this run's has {shape}")
                if start >= stop:
                    return torch.empty(0)
                if not shape:
                    return file.get_tensor(full_name).view(1)
                # Only whole rows can be read: take those that cover the range.
                width = prod(shape[1:])
                first = start // width
                rows = stored[first : -(-stop // width)].reshape(-1)
                return rows[start - first * width : stop - first * width]

        return read


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
