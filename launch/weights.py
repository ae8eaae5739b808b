"""Weights by name in a safetensors file, read and written one tensor at a time: a model need not fit one process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_BYTES = 4  # fp32


class WeightsFile:
    """A safetensors file that is open for reading: `weights[name]` reads one tensor."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        #: Of what it holds, by name.
        self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def leave_out(self, names: Iterable[str]) -> None:
        """Be as if some tensors were not there."""
        for name in list(names):
            del self.shapes[name]

    def check_fit(self, wanted: Mapping[str, torch.Size]) -> None:
        """Whether these are the weights of a model.

        Raises:
            ValueError: where names or shapes differ, naming the first few.
        """
        found = self.shapes
        problems = [f"lacks {name}" for name in wanted.keys() - found.keys()]
        problems += [f"has {name}, which the model does not" for name in found.keys() - wanted.keys()]
        problems += [
            f"{name} has shape {tuple(found[name])}, the model's is {tuple(wanted[name])}"
            for name in wanted.keys() & found.keys()
            if found[name] != wanted[name]
        ]
        if problems:
            more = f" (and {len(problems) - 3} more differences)" if len(problems) > 3 else ""
            raise ValueError(f"{self.path} does not fit the model: {'; '.join(sorted(problems)[:3])}{more}")


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a safetensors file.

    Raises:
        ValueError: if it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield WeightsFile(path, file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """All that a safetensors file holds.

    Raises:
        ValueError: if it is none.
    """
    with open_weights(path) as weights:
        return {name: weights[name] for name in weights.shapes}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file of contiguous tensors that share no memory.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(0o644)  # as the other files; safetensors leaves it to its owner alone


def save_weights(
    path: Path, weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size], *, write: bool
) -> None:
    """Write tensors by name in fp32, each as it comes. Every rank iterates over `weights`, one writes.

    Args:
        weights: in the order of `shapes`.
        shapes: of all of them.

    Raises:
        OSError: if it cannot be written.
    """
    problem: OSError | None = None
    with ExitStack() as files:
        file = None
        try:
            if write:
                file = files.enter_context(open(path, "wb"))
                file.write(_header(shapes))
        except OSError as error:
            problem = error
        # Bringing weights together takes every rank: also one that could not write goes on to the end.
        for name, tensor in weights:
            if file is None or problem is not None:
                continue
            assert tensor.shape == shapes[name], name
            try:
                file.write(tensor.detach().float().cpu().contiguous().view(-1).numpy().data)
            except OSError as error:
                problem = error
    if problem is not None:
        raise problem


def _header(shapes: Mapping[str, torch.Size]) -> bytes:
    """Of a safetensors file: its length as 8 bytes, then JSON of each tensor's type, shape and place."""
    entries, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + _BYTES * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
