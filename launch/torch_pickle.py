"""What the pickles in files of torch.save may say: the vocabulary of OC20 checkpoints for `data/pickle_machine.py`.

Tensors are views of the file mapped into memory. This is stricter than `torch.load(weights_only=True)`, which knows
more names and trusts what the file says of sizes and strides: here a tensor must lie within its storage, and have no
more elements. Containers are built of plain types alone, so that nothing later calls what a file chose.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from egnscale.data.pickle_machine import PLAIN_KEYS, Budget, DamagedPickle, Machine, Vocabulary
from egnscale.data.pickle_values import (
    COMMON_CALLS,
    array_from_buffer,
    build_numpy,
    described_storage,
    dictionary,
    layout,
)

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
#: Names that stand for themselves: types of storages and tensors, and what defaultdict may be made with.
_MENTIONED = {
    *_STORAGES,
    *(str(dtype) for dtype in _STORAGES.values()),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool")),
    "numpy.ndarray",
}
_PURPOSE = "OC20 checkpoint"
#: One byte can make a set of 200: this bounds it to 2 GB. A large checkpoint takes some 100,000.
_MAX_STEPS = 10_000_000


@dataclass
class Storage:
    """Elements of one type, as they lie in the file."""

    dtype: torch.dtype
    numel: int
    memory: mmap.mmap | None  #: None on the first pass over the older format
    start: int = 0  #: byte
    flat: Tensor | None = None  #: (numel,) all elements, made when first needed

    def view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor | None:
        """A tensor of these elements, of a layout that was checked."""
        if self.memory is None:
            return None
        if 0 in size:
            return torch.empty(size, dtype=self.dtype)
        if self.flat is None:
            self.flat = self._flat(self.memory)
        return self.flat.as_strided(size, stride, offset)

    def _flat(self, memory: mmap.mmap) -> Tensor:
        if self.start % self.dtype.itemsize:  # the older format does not align
            buffer = bytearray(memory[self.start : self.start + self.numel * self.dtype.itemsize])
            return torch.frombuffer(buffer, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=self.numel, offset=self.start)


def reader(data: bytes | mmap.mmap, load: Callable[[torch.dtype, str, int], Storage], at: int = 0) -> Machine:
    """A machine for the object of a checkpoint, which begins at `at`.

    Args:
        load: makes a storage of (dtype, key, number of elements).
    """

    def persistent(id_: Any) -> Storage:
        kind, key, numel = described_storage(id_)
        if kind not in _STORAGES:
            raise DamagedPickle("a damaged storage: it is of an unknown type")
        return load(_STORAGES[kind], key, numel)

    return Machine(data, _CHECKPOINTS, persistent=persistent, at=at)


def plain_reader(data: bytes | mmap.mmap, at: int = 0) -> Machine:
    """A machine for the pickles around the object, which hold numbers, text, lists and dicts."""
    return Machine(data, _PLAIN, at=at)


def _tensor(budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | None:
    if not isinstance(storage, Storage):
        raise DamagedPickle("a tensor without a storage")
    return storage.view(*layout(offset, size, stride, storage.numel, most=storage.numel))


def _parameter(budget: Budget, tensor: Any, *_: Any) -> Tensor | None:
    if tensor is not None and not isinstance(tensor, Tensor):
        raise DamagedPickle("a parameter that is no tensor")
    return tensor


def _path(budget: Budget, *parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise DamagedPickle("a damaged path")
    budget.spend(sum(len(part) + 1 for part in parts))
    return "/".join(parts).replace("//", "/")


def _device(budget: Budget, kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or not (index is None or type(index) is int):
        raise DamagedPickle("a damaged device")
    budget.spend(len(kind))
    return kind if index is None else f"{kind}:{index}"


def _as_tensor(budget: Budget, array: np.ndarray) -> Tensor:
    """float64, int64 or bool, copied: the pickle's bytes may be read only, and of another byte order."""
    kind = array.dtype.kind
    budget.spend(array.nbytes)
    wide: np.ndarray = array.astype({"f": np.float64, "b": np.bool_}.get(kind, np.int64))
    if kind == "u" and (wide < 0).any():
        raise DamagedPickle("a NumPy array has integers beyond 63 bits")
    return torch.from_numpy(wide)


def _tensor_from_buffer(budget: Budget, *arguments: Any) -> Tensor:
    return _as_tensor(budget, array_from_buffer(budget, *arguments))


def _build(budget: Budget, target: Any, state: Any) -> Any:
    if type(target) is dict:
        return target  # attributes of an OrderedDict, such as a state dict's _metadata: of no use here
    built = build_numpy(budget, target, state)
    return _as_tensor(budget, built) if isinstance(built, np.ndarray) else built


_CALLS: dict[str, Callable[..., Any]] = {
    **COMMON_CALLS,
    "numpy._core.numeric._frombuffer": _tensor_from_buffer,
    "collections.OrderedDict": dictionary(PLAIN_KEYS),
    "collections.Counter": dictionary(PLAIN_KEYS),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.device": _device,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
}
_CHECKPOINTS = Vocabulary(_PURPOSE, calls=_CALLS, makes=_CALLS, mentions=_MENTIONED, build=_build, max_steps=_MAX_STEPS)
_PLAIN = Vocabulary(_PURPOSE, max_steps=_MAX_STEPS)
