"""Step through a pickle as data: nothing in it can run.

A pickle is a program. Here an interpreter steps through it that knows the opcodes for plain data and the few names in
`_CALLS` and `_VALUES`; no name is ever looked up, and each call is of a function of our own. Any other name ends the
reading with a line that says which. This is stricter than `torch.load(weights_only=True)`, which knows more names and
trusts what the file says of sizes and strides:

* a tensor must lie within its storage, and have no more elements;
* dictionary keys and set elements must be plain, since hashing deeply nested tuples can overflow the stack;
* containers are built of plain types alone, so that nothing later calls what a file chose.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: Beyond this many dimensions a tensor is none.
_MAX_DIMENSIONS = 16

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
#: Names that stand for themselves: types of storages and tensors, and what defaultdict may be made with.
_VALUES = {
    *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES)),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool")),
    "numpy.ndarray",
}
#: Names of Python 2 and of older numpy -> what they are called now.
_RENAMED = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}
#: numpy's letters for the scalars that are read -> those of `struct`.
_NUMPY_FORMATS = {
    **dict(zip(("f8", "f4", "f2"), "dfe", strict=True)),
    **dict(zip(("i8", "i4", "i2", "i1"), "qihb", strict=True)),
    **dict(zip(("u8", "u4", "u2", "u1", "b1"), "QIHB?", strict=True)),
}
#: What `shown` shows of a value.
_SHOWN = 60


class PickleError(ValueError):
    """A file that cannot be read, with the reason."""


@dataclass(frozen=True)
class _Name:
    """A name in the file, which stays a name."""

    text: str


@dataclass
class _NumpyType:
    """A numpy dtype: kind and size, such as f8."""

    text: str


@dataclass
class _NumpyArray:
    """A numpy array under construction."""

    values: Tensor | None = None


@dataclass
class Storage:
    """Elements of one type, as they lie in the file."""

    dtype: torch.dtype
    numel: int
    memory: mmap.mmap | None  #: None on the first pass over the older format
    start: int = 0  #: byte
    flat: Tensor | None = None  #: (numel,) all elements, made when first needed

    def view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor | None:
        """A tensor of these elements.

        Raises:
            PickleError: if it has more elements than the storage, or reaches beyond it.
        """
        numel = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if numel > self.numel or (numel and last >= self.numel):
            raise PickleError(f"a tensor of shape {size} reaches beyond its storage of {self.numel} elements")
        if self.memory is None:
            return None
        if not numel:
            return torch.empty(size, dtype=self.dtype)
        if self.flat is None:
            self.flat = self._flat(self.memory)
        return self.flat.as_strided(size, stride, offset)

    def _flat(self, memory: mmap.mmap) -> Tensor:
        if self.start % self.dtype.itemsize:  # the older format does not align
            buffer = bytearray(memory[self.start : self.start + self.numel * self.dtype.itemsize])
            return torch.frombuffer(buffer, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=self.numel, offset=self.start)


class Bytes:
    """A file in memory, for pickletools."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        self.at += len(found)
        return found

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.at) + 1
        found = self.data[self.at : end or len(self.data)]
        self.at += len(found)
        return found

    def tell(self) -> int:
        return self.at


def _refuse(what: str) -> PickleError:
    return PickleError(f"asks for {what}, which no OC20 checkpoint needs; refused, and nothing in the file was run")


def shown(value: Any) -> str:
    """A value from the file as a short text; of containers the type alone, since they may hold themselves."""
    if value is None or isinstance(value, str | bytes | bool | float):
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else "a huge number"
    return value.text if isinstance(value, _Name) else f"a {type(value).__name__}"


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise PickleError("a tensor has a damaged shape")
    if any(type(item) is not int or not 0 <= item < 1 << 62 for item in value):
        raise PickleError("a tensor has a damaged shape")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | None:
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    (offset,), size, stride = _sizes((offset,)), _sizes(size), _sizes(stride)
    if len(size) != len(stride):
        raise PickleError("a tensor has a damaged shape")
    return storage.view(offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Tensor | None:
    if tensor is not None and not isinstance(tensor, Tensor):
        raise PickleError("a parameter that is no tensor")
    return tensor


def _dictionary(*args: Any) -> dict:
    """OrderedDict(), OrderedDict([[key, value], ...]), Counter({...})."""
    made: dict = {}
    for pairs in args[:1]:
        if not isinstance(pairs, dict | list | tuple):
            raise PickleError("a damaged dictionary")
        for pair in pairs.items() if isinstance(pairs, dict) else pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise PickleError("a damaged dictionary")
            made[_plain_key(pair[0])] = pair[1]
    return made


def _set(*args: Any) -> set:
    if len(args) > 1 or not all(isinstance(items, list | tuple | set | frozenset) for items in args):
        raise PickleError("a damaged set")
    return {_plain_key(item) for items in args for item in items}


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise PickleError("a damaged path")
    return "/".join(parts).replace("//", "/")


def _encoded(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError("damaged bytes")
    return text.encode("latin1")


def _size(*args: Any) -> tuple[int, ...]:
    return _sizes(tuple(args[0]) if args and isinstance(args[0], list | tuple) else ())


def _device(kind: Any, *index: Any) -> str:
    return ":".join(str(part) for part in (kind, *index) if isinstance(part, str | int))


def _numpy_type(text: Any, *_: Any) -> _NumpyType:
    text = text.decode("latin1") if isinstance(text, bytes) else text
    if text not in _NUMPY_FORMATS:
        raise _refuse(f"a numpy value of type {shown(text)}")
    return _NumpyType(text)


def _numpy_scalar(kind: Any, data: Any = None, *_: Any) -> float | int | bool:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
        raise PickleError("a damaged numpy value")
    return struct.unpack("<" + _NUMPY_FORMATS[kind.text], data)[0]


def _numpy_array(*_: Any) -> _NumpyArray:
    return _NumpyArray()


def _fill_array(array: _NumpyArray, state: Any) -> None:
    """numpy's (version, shape, dtype, is_fortran, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise PickleError("a damaged numpy array")
    _, shape, kind, fortran, data = state
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes) or fortran:
        raise _refuse("a numpy array of an unusual kind")
    shape = _sizes(shape)
    length = struct.calcsize(_NUMPY_FORMATS[kind.text])
    if math.prod(shape) * length != len(data):
        raise PickleError("a damaged numpy array")
    values = [value for (value,) in struct.iter_unpack("<" + _NUMPY_FORMATS[kind.text], data)]
    array.values = torch.tensor(values, dtype=torch.float64 if kind.text[0] == "f" else None).reshape(shape)


#: What may be called, each our own function.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encoded,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
    "numpy.dtype": _numpy_type,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray._reconstruct": _numpy_array,
}


def _plain_key(value: Any) -> Any:
    if value is not None and not isinstance(value, str | bytes | int | float | bool):
        raise _refuse(f"{shown(value)} as a dictionary's key")
    return value


#: Where a MARK stands on the stack.
_MARK = object()


class Interpreter:
    """Steps through one pickle.

    Args:
        load: makes a storage of (dtype, key, number of elements, view).
    """

    def __init__(self, load: Callable[[torch.dtype, str, int, Any], Storage]) -> None:
        self.load = load

    def run(self, stream: BinaryIO | Bytes) -> Any:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise PickleError("a pickle without an end")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("a damaged pickle")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise PickleError("a damaged pickle")

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError("a damaged pickle")
        return self.stack[-1]

    def _step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "MARK":
                push(_MARK)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_SET":
                push(set())
            case "DICT":
                items = self._pop_to_mark()
                push({})
                self._set_items(items)
            case "LIST":
                push(self._pop_to_mark())
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self._pop() for _ in range(int(name[-1]))][::-1]))
            case "FROZENSET":
                push(_set(self._pop_to_mark()))
            case "APPEND":
                item = self._pop()
                self._top(list).append(item)
            case "APPENDS":
                items = self._pop_to_mark()
                self._top(list).extend(items)
            case "ADDITEMS":
                items = self._pop_to_mark()
                self._top(set).update(_set(items))
            case "SETITEM":
                self._set_items([self._pop(), self._pop()][::-1])
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self._pop()
                push(self.memo[argument])
            case "MEMOIZE":
                self.memo[len(self.memo)] = self._pop()
                push(self.memo[len(self.memo) - 1])
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "POP":
                self._pop()
            case "GLOBAL":
                push(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self._pop(), self._pop()
                push(self._name(module, attribute))
            case "REDUCE" | "NEWOBJ":
                args, called = self._pop(), self._pop()
                if not isinstance(called, _Name) or called.text not in _CALLS or not isinstance(args, tuple):
                    raise _refuse(f"a call of {shown(called)}")
                push(_CALLS[called.text](*args))
            case "BUILD":
                state = self._pop()
                if self.stack and isinstance(self.stack[-1], _NumpyArray):
                    _fill_array(self.stack[-1], state)
                    self.stack[-1] = self.stack[-1].values
                elif self.stack and isinstance(self.stack[-1], _NumpyType):
                    if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
                        raise _refuse("big-endian numpy values")
                else:
                    self._top(dict)  # attributes of an OrderedDict, such as a state dict's _metadata: of no use here
            case "BINPERSID":
                push(self._storage(self._pop()))
            case "INST" | "EXT1" | "EXT2" | "EXT4" | "PERSID":
                raise _refuse(f"the opcode {name}")
            case _ if isinstance(argument, str | bytes | int | float):
                push(argument)  # all that is left with an argument are texts, bytes and numbers
            case _:
                raise _refuse(f"the opcode {name}")

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise PickleError("a damaged pickle")
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def _name(self, module: Any, attribute: Any = "") -> _Name:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise PickleError("a damaged pickle")
        text = f"{_RENAMED.get(module, module)}.{attribute}"
        if text not in _CALLS and text not in _VALUES:
            raise _refuse(shown(text)[1:-1])
        return _Name(text)

    def _storage(self, pid: Any) -> Storage:
        pid = tuple(part.decode("latin1") if isinstance(part, bytes) else part for part in pid)
        kind, storage, key, _, numel, *rest = pid
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise PickleError("a damaged storage")
        dtype = _STORAGES.get(storage.text.removeprefix("torch."))
        if dtype is None or type(numel) is not int or not 0 <= numel < 1 << 62:
            raise PickleError("a damaged storage")
        return self.load(dtype, key, numel, rest[0] if rest else None)
