"""Read files of `torch.save` as data: nothing in them can run, and nothing is allocated that the file does not hold.

A checkpoint from elsewhere is a pickle, which is a program. Here it is stepped through by an interpreter that knows the
opcodes for plain data and the few names in `_CALLS` and `_VALUES`; no name is ever looked up. Any other name ends the
reading with a line that says which. This is stricter than `torch.load(weights_only=True)`, which knows more names and
trusts what the file says of sizes and strides:

* zip entries must be stored plainly, lie within the file and have the checksum that the archive says;
* a storage must be as long as its entry, and a tensor must lie within its storage and have no more elements;
* dictionary keys and set elements must be plain, since hashing deeply nested tuples can overflow the stack.

Both formats of torch.save are read: the zip archive (torch 1.6 and later) and the plain sequence of pickles before it.
Tensors are views of the file mapped into memory, copied on write, so that what is not used is hardly read.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: First pickles of a file in the older format.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: Beyond this many entries or dimensions a file is no checkpoint.
_MAX_ENTRIES, _MAX_DIMENSIONS = 1_000_000, 16

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
#: What `_text` shows of a value.
_SHOWN = 60


class TorchFileError(ValueError):
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
class _Storage:
    """Elements of one type, as they lie in the file."""

    dtype: torch.dtype
    numel: int
    memory: mmap.mmap | None  #: None on the first pass over the older format
    start: int = 0  #: byte
    flat: Tensor | None = None  #: (numel,) all elements, made when first needed

    def view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor | None:
        """A tensor of these elements.

        Raises:
            TorchFileError: if it has more elements than the storage, or reaches beyond it.
        """
        numel = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if numel > self.numel or (numel and last >= self.numel):
            raise TorchFileError(f"a tensor of shape {size} reaches beyond its storage of {self.numel} elements")
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


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save: dicts, lists, tuples, sets, numbers, strings and tensors.

    OrderedDict, defaultdict and Counter come as dict, devices and paths as str, numpy's scalars as numbers, its arrays
    as tensors, and dtypes and other types as names without further meaning.

    Raises:
        ValueError: one line that says what is wrong with the file, or which name in it is refused.
        OSError: if it cannot be opened.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no ordinary file"
        raise ValueError(f"{path} is {kind}; expected a file of torch.save, such as checkpoint.pt")
    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zipfile, about names that stand twice
            return _read_archive(path, memory) if memory[:2] == b"PK" else _read_legacy(memory)
    except TorchFileError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        # Whatever a damaged file made one of the parsers below trip over.
        detail = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} is damaged, or no file of torch.save ({detail})") from None


# ----------------------------------------------------------------------------------------------------------- archive


def _read_archive(path: Path, memory: mmap.mmap) -> Any:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise TorchFileError("an entry of the archive stands twice")
    if len(entries) > _MAX_ENTRIES:
        raise TorchFileError(f"the archive has {len(entries)} entries")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise TorchFileError("a zip archive, but not one of torch.save (it has no data.pkl)")
    root = roots[0]
    if f"{root}constants.pkl" in entries:
        raise TorchFileError("a TorchScript program, which is no checkpoint")
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(_content(memory, order)) != b"little":
        raise TorchFileError("written on a big-endian machine; save it again on a little-endian one")

    storages: dict[str, _Storage] = {}
    total = 0

    def load(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        nonlocal total
        if key not in storages:
            entry = entries.get(f"{root}data/{key}")
            if entry is None:
                raise TorchFileError(f"the archive lacks the storage {_text(key)}")
            if entry.file_size != numel * dtype.itemsize:
                raise TorchFileError(
                    f"storage {_text(key)} has {entry.file_size} bytes, but {numel} elements of {dtype} were said"
                )
            total += entry.file_size
            if total > len(memory):
                raise TorchFileError("its storages overlap")
            content = _content(memory, entry)
            storages[key] = _Storage(dtype, numel, memory, _start(memory, entry))
            content.release()
        storage = storages[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise TorchFileError(f"storage {_text(key)} has two types")
        return storage

    content = _content(memory, entries[f"{root}data.pkl"])
    data = bytes(content)
    content.release()
    return _Interpreter(load).run(_Bytes(data))


def _start(memory: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """First byte of an entry's content, behind its local header."""
    at = entry.header_offset
    if at < 0 or at + 30 > len(memory) or memory[at : at + 4] != b"PK\3\4":
        raise TorchFileError(f"entry {_text(entry.filename)} is not where the archive says")
    name, extra = struct.unpack("<HH", memory[at + 26 : at + 30])
    return at + 30 + name + extra


def _content(memory: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry, checked."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise TorchFileError(f"entry {_text(entry.filename)} is compressed or encrypted, as torch.save never does")
    start = _start(memory, entry)
    if start + entry.file_size > len(memory):
        raise TorchFileError(f"entry {_text(entry.filename)} reaches beyond the end: the file was cut short")
    content = memoryview(memory)[start : start + entry.file_size]
    if zlib.crc32(content) != entry.CRC:
        content.release()
        raise TorchFileError(f"entry {_text(entry.filename)} is damaged: its checksum differs from the archive's")
    return content


# ------------------------------------------------------------------------------------------------------ older format


def _read_legacy(memory: mmap.mmap) -> Any:
    """Pickles one after the other: magic, protocol, machine, the object, keys of storages; then the storages."""

    def no_storage(*_: Any) -> _Storage:
        raise TorchFileError("a storage where none can be")

    stream: Any = memory  # it reads as a file does, and no further than the file goes
    plain = _Interpreter(no_storage)
    if memory[257:262] == b"ustar":
        raise TorchFileError("a tar archive; unpack it if it holds a checkpoint (torch.save's tar format is not read)")
    if memory[:1] != b"\x80":
        raise TorchFileError("not a file of torch.save")
    if plain.run(stream) != _LEGACY_MAGIC:
        raise TorchFileError("a pickle, but not one of torch.save")
    if plain.run(stream) != _LEGACY_PROTOCOL:
        raise TorchFileError("an unknown version of torch.save's format")
    machine = plain.run(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise TorchFileError("written on a big-endian machine; save it again on a little-endian one")
    at = stream.tell()

    said: dict[str, tuple[torch.dtype, int]] = {}

    def declare(dtype: torch.dtype, key: str, numel: int, view: Any) -> _Storage:
        if said.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise TorchFileError(f"storage {_text(key)} has two types")
        if view is not None:
            raise TorchFileError("a storage within a storage, as torch has not written since 0.4")
        return _Storage(dtype, numel, None)

    # The storages lie behind the object that refers to them: it is stepped through twice.
    _Interpreter(declare).run(stream)
    keys = plain.run(stream)
    if not isinstance(keys, list) or len(keys) != len(said) or any(key not in said for key in keys):
        raise TorchFileError("its list of storages is damaged")
    places: dict[str, _Storage] = {}
    end = stream.tell()
    for key in keys:
        dtype, numel = said[key]
        if end + 8 + numel * dtype.itemsize > len(memory):
            raise TorchFileError("it was cut short: storages are missing at its end")
        if struct.unpack("<q", memory[end : end + 8])[0] != numel:
            raise TorchFileError(f"storage {_text(key)} has another length than was said")
        places[key] = _Storage(dtype, numel, memory, end + 8)
        end += 8 + numel * dtype.itemsize
    stream.seek(at)
    return _Interpreter(lambda dtype, key, numel, view: places[key]).run(stream)


class _Bytes:
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


# ------------------------------------------------------------------------------------------------------- interpreter


def _refuse(what: str) -> TorchFileError:
    return TorchFileError(f"asks for {what}, which no OC20 checkpoint needs; refused, and nothing in the file was run")


def _text(value: Any) -> str:
    """A value from the file as a short text; of containers the type alone, since they may hold themselves."""
    if value is None or isinstance(value, str | bytes | bool | float):
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else "a huge number"
    return value.text if isinstance(value, _Name) else f"a {type(value).__name__}"


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MAX_DIMENSIONS:
        raise TorchFileError("a tensor has a damaged shape")
    if any(type(item) is not int or not 0 <= item < 1 << 62 for item in value):
        raise TorchFileError("a tensor has a damaged shape")
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | None:
    if not isinstance(storage, _Storage):
        raise TorchFileError("a tensor without a storage")
    (offset,), size, stride = _sizes((offset,)), _sizes(size), _sizes(stride)
    if len(size) != len(stride):
        raise TorchFileError("a tensor has a damaged shape")
    return storage.view(offset, size, stride)


def _parameter(tensor: Any, *_: Any) -> Tensor | None:
    if tensor is not None and not isinstance(tensor, Tensor):
        raise TorchFileError("a parameter that is no tensor")
    return tensor


def _dictionary(*args: Any) -> dict:
    """OrderedDict(), OrderedDict([[key, value], ...]), Counter({...})."""
    made: dict = {}
    for pairs in args[:1]:
        if not isinstance(pairs, dict | list | tuple):
            raise TorchFileError("a damaged dictionary")
        for pair in pairs.items() if isinstance(pairs, dict) else pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TorchFileError("a damaged dictionary")
            made[_plain_key(pair[0])] = pair[1]
    return made


def _set(*args: Any) -> set:
    if len(args) > 1 or not all(isinstance(items, list | tuple | set | frozenset) for items in args):
        raise TorchFileError("a damaged set")
    return {_plain_key(item) for items in args for item in items}


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise TorchFileError("a damaged path")
    return "/".join(parts).replace("//", "/")


def _encoded(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TorchFileError("damaged bytes")
    return text.encode("latin1")


def _size(*args: Any) -> tuple[int, ...]:
    return _sizes(tuple(args[0]) if args and isinstance(args[0], list | tuple) else ())


def _device(kind: Any, *index: Any) -> str:
    return ":".join(str(part) for part in (kind, *index) if isinstance(part, str | int))


def _numpy_type(text: Any, *_: Any) -> _NumpyType:
    text = text.decode("latin1") if isinstance(text, bytes) else text
    if text not in _NUMPY_FORMATS:
        raise _refuse(f"a numpy value of type {_text(text)}")
    return _NumpyType(text)


def _numpy_scalar(kind: Any, data: Any = None, *_: Any) -> float | int | bool:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes):
        raise TorchFileError("a damaged numpy value")
    return struct.unpack("<" + _NUMPY_FORMATS[kind.text], data)[0]


def _numpy_array(*_: Any) -> _NumpyArray:
    return _NumpyArray()


def _fill_array(array: _NumpyArray, state: Any) -> None:
    """numpy's (version, shape, dtype, is_fortran, bytes)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise TorchFileError("a damaged numpy array")
    _, shape, kind, fortran, data = state
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(kind, _NumpyType) or not isinstance(data, bytes) or fortran:
        raise _refuse("a numpy array of an unusual kind")
    shape = _sizes(shape)
    length = struct.calcsize(_NUMPY_FORMATS[kind.text])
    if math.prod(shape) * length != len(data):
        raise TorchFileError("a damaged numpy array")
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
        raise _refuse(f"{_text(value)} as a dictionary's key")
    return value


class _Mark:
    pass


_MARK = _Mark()


class _Interpreter:
    """Steps through one pickle.

    Args:
        load: makes a storage of (dtype, key, number of elements, view).
    """

    def __init__(self, load: Callable[[torch.dtype, str, int, Any], _Storage]) -> None:
        self.load = load

    def run(self, stream: BinaryIO | _Bytes) -> Any:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise TorchFileError("a pickle without an end")

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise TorchFileError("a damaged pickle")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise TorchFileError("a damaged pickle")

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise TorchFileError("a damaged pickle")
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
                    raise _refuse(f"a call of {_text(called)}")
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
            case _ if isinstance(argument, str | bytes | int | float):
                push(argument)  # all that is left with an argument are strings, bytes and numbers
                if name in ("INST", "EXT1", "EXT2", "EXT4", "PERSID"):
                    raise _refuse(f"the opcode {name}")
            case _:
                raise _refuse(f"the opcode {name}")

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise TorchFileError("a damaged pickle")
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain_key(key)] = value

    def _name(self, module: Any, attribute: Any = "") -> _Name:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TorchFileError("a damaged pickle")
        text = f"{_RENAMED.get(module, module)}.{attribute}"
        if text not in _CALLS and text not in _VALUES:
            raise _refuse(_text(text)[1:-1])
        return _Name(text)

    def _storage(self, pid: Any) -> _Storage:
        pid = tuple(part.decode("latin1") if isinstance(part, bytes) else part for part in pid)
        kind, storage, key, _, numel, *rest = pid
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
            raise TorchFileError("a damaged storage")
        dtype = _STORAGES.get(storage.text.removeprefix("torch."))
        if dtype is None or type(numel) is not int or not 0 <= numel < 1 << 62:
            raise TorchFileError("a damaged storage")
        return self.load(dtype, key, numel, rest[0] if rest else None)
