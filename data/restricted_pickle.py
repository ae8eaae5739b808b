"""Reads the pickles in OC20's LMDB files as data: nothing that a pickle names is imported, and nothing is called.

A pickle is a program. Python's `pickle` runs it, and it may ask for any function there is. Here the same program is
read by a machine of our own whose values are numbers, text, bytes, lists, tuples, dicts and NumPy arrays:

- A name such as `torch._utils._rebuild_tensor_v2` stays a name. The few that structures need are spelled out below,
  each with a function of ours that does what is meant; every other one ends the reading and is named.
- An object of `torch_geometric` is its class's name and its attributes. Neither torch_geometric nor torch is imported.
- A tensor is a view of the pickle's bytes, made after its size, strides and offset were checked against its storage.
- What a record may cost is bounded by its length: steps, digits of an integer, bytes decoded. Dict keys are text.

`load_attributes` returns the attributes of a pickled `torch_geometric.data.Data`, in the layout of 2.0 and later
(attributes in `_store`) or before (attributes in the object itself).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

#: OC20's records take about 1,500 steps; a list of numbers takes one step for each.
MAX_STEPS = 300_000
_MAX_INTEGER_BYTES = 32
_MAX_DIMENSIONS = 8


class RefusedName(ValueError):
    """The pickle names a function or class that no structure needs."""


class DamagedPickle(ValueError):
    """The bytes are not a pickle, or not one of plain values."""


def load_attributes(record: bytes) -> dict[str, Any]:
    """The attributes of a pickled `torch_geometric.data.Data`; those that are None are left out.

    Values are int, float, str, NumPy arrays that may share memory with each other, and what else the pickle holds.

    Raises:
        RefusedName: naming the function or class that was asked for.
        DamagedPickle: if this is no such pickle.
    """
    graph = load(record)
    if not isinstance(graph, _Object) or graph.name not in _GRAPHS:
        raise DamagedPickle(f"the pickle holds {_kind(graph)}, not a torch_geometric Data")
    attributes = graph.state
    if isinstance(attributes, dict) and "_store" in attributes:
        store = attributes["_store"]
        if not isinstance(store, _Object) or not isinstance(store.state, dict):
            raise DamagedPickle("the Data's _store is not what torch_geometric writes")
        attributes = store.state.get("_mapping")
    if not isinstance(attributes, dict):
        raise DamagedPickle("the Data has no attributes")
    return {name: _resolved(value) for name, value in attributes.items() if value is not None and name[:1] != "_"}


def load(record: bytes) -> Any:
    """The value of a pickle of plain values.

    Raises:
        RefusedName: naming the function or class that was asked for.
        DamagedPickle: if the bytes are not a pickle of plain values.
    """
    try:
        return _resolved(_Machine(record, _Budget(len(record))).run())
    except (RefusedName, DamagedPickle):
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        # The machine leans on Python's own checks: an empty stack, a memo that is not there, text that is not UTF-8.
        raise DamagedPickle(f"the pickle is damaged ({type(error).__name__})") from error


# ------------------------------------------------------------------------------------------------------------ values


class _Name:
    """A function or class that the pickle named, and that we know."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Object:
    """An instance of a class that we know: its class's name and what the pickle says about it."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: Any = None) -> None:
        self.name = name
        self.state = state


class _Budget:
    """What reading one record may cost; shared with the pickles inside its storages."""

    __slots__ = ("bytes", "size", "steps")

    def __init__(self, size: int) -> None:
        self.size = size
        self.steps = MAX_STEPS
        self.bytes = 2 * size + 4096

    def spend(self, amount: int) -> None:
        self.bytes -= amount
        if self.bytes < 0:
            raise DamagedPickle("the pickle holds more than its own length")


def _resolved(value: Any) -> Any:
    """NumPy arrays arrive in two steps (make, then fill); this is the array once it is filled."""
    if isinstance(value, _Object) and value.name == "numpy.ndarray":
        if not isinstance(value.state, np.ndarray):
            raise DamagedPickle("an array has no content")
        return value.state
    return value


def _kind(value: Any) -> str:
    return f"a {value.name}" if isinstance(value, _Name | _Object) else f"a value of type {type(value).__name__}"


def _integers(values: Any, what: str) -> tuple[int, ...]:
    """Sizes, strides, shapes: not negative, and few."""
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise DamagedPickle(f"{what} is not a shape")
    if not all(type(value) is int and value >= 0 for value in values):
        raise DamagedPickle(f"{what} holds something else than sizes")
    return tuple(values)


# ------------------------------------------------------------------------------------------------- what names stand for

#: Storage -> how NumPy reads it. Booleans are read as bytes, so that no byte can be an invalid one.
_STORAGES = {
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "|i1",
    "torch.ByteStorage": "|u1",
    "torch.BoolStorage": "|u1",
    "torch.storage.UntypedStorage": "|u1",
}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_TORCH_SIZES = {"short": 2, "int": 4, "long": 4}
#: How nearly every storage begins: reading it anew for each tensor would take most of the time.
TORCH_HEADER = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (
        _TORCH_MAGIC,
        _TORCH_PROTOCOL,
        {"protocol_version": _TORCH_PROTOCOL, "little_endian": True, "type_sizes": _TORCH_SIZES},
    )
)
_NUMPY_TYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


def _storage(budget: _Budget, content: Any) -> np.ndarray:
    """`torch.storage._load_from_bytes`: a file of torch.save's older format with one storage in it."""
    if not isinstance(content, bytes):
        raise DamagedPickle("a tensor's storage is not bytes")
    machine = _Machine(content, budget, in_storage=True)
    if content.startswith(TORCH_HEADER):
        machine.at = len(TORCH_HEADER)
    else:
        if machine.run() != _TORCH_MAGIC or machine.run() != _TORCH_PROTOCOL:
            raise DamagedPickle("a tensor's storage is not in the format that torch writes into pickles")
        if machine.run().get("little_endian") is not True:
            raise DamagedPickle("a tensor's storage is big-endian")
    described = machine.run()
    keys = machine.run()
    if not (isinstance(described, _Object) and described.name == "storage" and keys == [described.state[1]]):
        raise DamagedPickle("a tensor's storage does not hold one storage")
    stored_as, _, count = described.state
    dtype = np.dtype("<u2" if stored_as == "bfloat16" else stored_as)
    (written,) = struct.unpack_from("<q", content, machine.at)
    start = machine.at + 8
    if written != count or not 0 <= count * dtype.itemsize <= len(content) - start:
        raise DamagedPickle(f"a tensor's storage of {count} elements is cut short")
    values = np.frombuffer(content, dtype, count, start)
    if stored_as == "bfloat16":
        budget.spend(4 * count)
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _described_storage(id_: Any) -> _Object:
    """What torch.save's persistent id says of a storage: (dtype, key, number of elements)."""
    if not (isinstance(id_, tuple) and len(id_) in (5, 6) and id_[0] == "storage" and isinstance(id_[1], _Name)):
        raise DamagedPickle("a tensor's storage is not described as torch does")
    stored_as, key, count = _STORAGES.get(id_[1].name), id_[2], id_[4]
    if stored_as is None or type(key) is not str or type(count) is not int or any(part is not None for part in id_[5:]):
        raise DamagedPickle("a tensor's storage is of an unknown type, or part of another")
    return _Object("storage", (stored_as, key, count))


def _tensor(budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`. Gradients, hooks and metadata (`rest`) mean nothing for data."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise DamagedPickle("a tensor has no storage")
    size, stride = _integers(size, "a tensor's size"), _integers(stride, "a tensor's stride")
    (offset,) = _integers((offset,), "a tensor's offset")
    if len(size) != len(stride):
        raise DamagedPickle(f"a tensor has size {list(size)} and {len(stride)} strides")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if last >= len(storage):
        raise DamagedPickle(f"a tensor of size {list(size)} reaches beyond its storage of {len(storage)} elements")
    # A stride of zero makes any number of elements out of one.
    width = storage.dtype.itemsize
    if _product(size) * width > budget.size:
        raise DamagedPickle(f"a tensor of size {list(size)} is larger than the record that holds it")
    strides = tuple(step * width for step in stride)
    return np.ndarray(size, storage.dtype, storage, offset * width, strides)


def _product(size: tuple[int, ...]) -> int:
    result = 1
    for count in size:
        result *= count
    return result


def _encoded(budget: _Budget, text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`: how protocols before 3 write bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise DamagedPickle("bytes are not written as Python writes them")
    budget.spend(len(text))
    return text.encode("latin1")


def _dtype(budget: _Budget, code: Any, *rest: Any) -> _Object:
    # Not hashed before it is known to be text: hashing a deep tuple overflows the stack.
    if type(code) is not str or code not in _NUMPY_TYPES:
        raise DamagedPickle("a NumPy array is of a type that holds no plain numbers")
    return _Object("numpy.dtype", np.dtype("u1" if code == "b1" else code))


def _order(dtype: np.dtype, state: Any) -> np.dtype:
    """What a pickle says about a dtype after its name: version, byte order, and nothing else for plain numbers."""
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        raise DamagedPickle("a NumPy type's byte order is damaged")
    if any(part is not None for part in state[2:5]):
        raise DamagedPickle("a NumPy array is of a type that holds no plain numbers (fields)")
    return dtype.newbyteorder(state[1]) if state[1] in "<>" else dtype


def _plain(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _Object) or dtype.name != "numpy.dtype":
        raise DamagedPickle("a NumPy array has no type")
    return dtype.state


def _array(content: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
    plain, shape = _plain(dtype), _integers(shape, "a NumPy array's shape")
    if not isinstance(content, bytes) or len(content) != _product(shape) * plain.itemsize:
        raise DamagedPickle(f"a NumPy array of shape {list(shape)} does not have the bytes for it")
    values = np.frombuffer(content, plain) if content else np.zeros(0, plain)
    return values.reshape(shape, order="F" if fortran else "C")


def _empty_array(budget: _Budget, type_: Any, *rest: Any) -> _Object:
    if not isinstance(type_, _Name) or type_.name != "numpy.ndarray":
        raise DamagedPickle("a NumPy array is not an ndarray")
    return _Object("numpy.ndarray")


def _array_from_buffer(budget: _Budget, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _array(content, dtype, shape, order == "F")


def _scalar(budget: _Budget, dtype: Any, content: Any) -> int | float:
    return _array(content, dtype, (), False)[()].item()


def _new_object(budget: _Budget, class_: Any, *rest: Any) -> _Object:
    if not isinstance(class_, _Name) or class_.name not in _CLASSES:
        raise DamagedPickle(f"{_kind(class_)} is made where an object was expected")
    return _Object(class_.name)


def _ordered(budget: _Budget, *items: Any) -> dict[str, Any]:
    if items:
        raise DamagedPickle("an OrderedDict is not written as Python 3 writes it")
    return {}


def _listed(budget: _Budget, items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise DamagedPickle("a set is not made of a list")
    budget.spend(8 * len(items))
    return list(items)


def _attribute(budget: _Budget, of: Any, name: Any) -> str:
    """`getattr`, which some versions of Python write for a member of an enumeration; for that one alone."""
    if not isinstance(of, _Name) or of.name != _ATTRIBUTE_TYPE:
        raise RefusedName("the pickle asks for builtins.getattr, which no structure needs; nothing was run")
    return name


#: Nodes or edges: the keys of a cache of torch_geometric, {AttrType.NODE: {"pos"}, ...}.
_ATTRIBUTE_TYPE = "torch_geometric.data.storage.AttrType"
_GRAPHS = {"torch_geometric.data.data.Data", "torch_geometric.data.Data"}
_CLASSES = _GRAPHS | {f"torch_geometric.data.storage.{name}Storage" for name in ("Base", "Node", "Edge", "Global")}
#: Named in passing, never made.
_MENTIONED = {
    "torch_geometric.data.data.DataTensorAttr",
    "torch_geometric.data.data.DataEdgeAttr",
    "torch_geometric.data.feature_store.TensorAttr",
    "torch_geometric.data.graph_store.EdgeAttr",
    "numpy.ndarray",
    "builtins.object",
    "__builtin__.object",
    *_STORAGES,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch.Size": lambda budget, sizes: _integers(sizes, "a torch.Size"),
    "numpy.dtype": _dtype,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda budget, factory=None: {},
    "_codecs.encode": _encoded,
    **dict.fromkeys(("builtins.bytes", "__builtin__.bytes"), lambda budget: b""),
    _ATTRIBUTE_TYPE: lambda budget, name: name,
    "builtins.getattr": _attribute,
    **dict.fromkeys(("builtins.set", "__builtin__.set"), _listed),
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), _new_object),
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
}
_KNOWN = {name: _Name(name) for name in _CLASSES | _MENTIONED | _CALLS.keys()}


# ------------------------------------------------------------------------------------------------------- the machine


class _Machine:
    """Reads pickles that stand one after the other in `data`.

    Args:
        data: the bytes; `at` is where reading has come to.
        budget: what may be spent; shared with machines inside this one.
        in_storage: whether persistent ids mean torch's storages; elsewhere they mean nothing.
    """

    def __init__(self, data: bytes, budget: _Budget, in_storage: bool = False) -> None:
        self.data = data
        self.at = 0
        self.budget = budget
        self.in_storage = in_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the next pickle."""
        self.stack, self.marks, self.memo = [], [], {}
        data, budget, steps = self.data, self.budget, _STEPS
        while True:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.stack.pop()
            budget.steps -= 1
            if budget.steps < 0:
                raise DamagedPickle(f"the pickle takes more than {MAX_STEPS:,} steps")
            step = steps.get(code)
            if step is None:
                raise DamagedPickle(f"the pickle has an opcode that no structure needs (0x{code:02x})")
            step(self)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if count < 0 or end > len(self.data):
            raise DamagedPickle("the pickle is cut short")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def line(self, encoding: str = "utf-8") -> str:
        end = self.data.index(b"\n", self.at)
        taken = self.data[self.at : end]
        self.at = end + 1
        return taken.decode(encoding)

    def since_mark(self) -> list[Any]:
        """Everything above the last mark, which is taken off with it."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedPickle("a name is not text")
        full = f"{module}.{name}"
        # Inside a storage there are types of storages and nothing else: no storage in a storage.
        known = _KNOWN.get(full) if not self.in_storage or full in _STORAGES else None
        if known is None:
            shown = "".join(c if c.isprintable() else "?" for c in full[:100])
            raise RefusedName(f"the pickle asks for {shown}, which no structure needs; nothing was run")
        self.stack.append(known)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function.name not in _CALLS or not isinstance(arguments, tuple):
            raise DamagedPickle(f"the pickle calls {_kind(function)}")
        self.stack.append(_CALLS[function.name](self.budget, *arguments))

    def make(self) -> None:
        arguments, class_ = self.stack.pop(), self.stack.pop()
        if arguments != ():
            raise DamagedPickle("an object is made with arguments")
        self.stack.append(_new_object(self.budget, class_))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Object):
            raise DamagedPickle(f"the pickle changes {_kind(target)}")
        if target.name == "numpy.dtype":
            target.state = _order(target.state, state)
        elif target.name == "numpy.ndarray":
            _, shape, dtype, fortran, content = state
            target.state = _array(content, dtype, shape, bool(fortran))
        elif target.name in _CLASSES and isinstance(state, dict) and target.state is None:
            target.state = state
        else:
            raise DamagedPickle(f"the state of {_kind(target)} is not what its class writes")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise DamagedPickle("items are set on something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Text only: hashing a deep tuple overflows the stack, and integers can be chosen to collide.
            if type(key) is not str:
                raise DamagedPickle(f"a dict's key is {_kind(key)}, not text")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise DamagedPickle("items are added to something else than a list")
        target.extend(items)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def integer(self, count: int) -> None:
        if count > _MAX_INTEGER_BYTES:
            raise DamagedPickle(f"an integer has {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def written_integer(self) -> None:
        text = self.line().removesuffix("L")
        if len(text) > 2 * _MAX_INTEGER_BYTES:
            raise DamagedPickle(f"an integer has {len(text)} digits")
        self.push({"00": False, "01": True}.get(text, int(text)))

    def pop(self) -> None:
        # A mark without anything above it is taken off by POP too.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def dict_since_mark(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def instance(self) -> None:
        self.name(self.line(), self.line())
        raise DamagedPickle(f"{_kind(self.stack[-1])} is made as Python 2 made old classes")

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise DamagedPickle("a tuple lacks its items")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(values)

    def persistent(self) -> None:
        if not self.in_storage:
            raise DamagedPickle("the pickle refers to objects outside it")
        self.push(_described_storage(self.stack.pop()))

    def make_with_keywords(self) -> None:
        if self.stack.pop() != {}:
            raise DamagedPickle("an object is made with arguments")
        self.make()


_I1, _U1 = struct.Struct("<b"), struct.Struct("<B")
_U2, _I4, _U4, _U8 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<Q")
_F8 = struct.Struct(">d")
_STOP = ord(".")

#: The opcodes by the names of `pickletools`. Left out: Python 2's strings, extension codes, out-of-band buffers.
_STEPS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: a hint for reading ahead
    ord("("): lambda m: m.marks.append(len(m.stack)),  # MARK
    ord("0"): _Machine.pop,  # POP
    ord("1"): _Machine.since_mark,  # POP_MARK
    ord("2"): lambda m: m.push(m.stack[-1]),  # DUP
    # plain values
    ord("N"): lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    ord("I"): _Machine.written_integer,  # INT
    ord("L"): _Machine.written_integer,  # LONG
    ord("J"): lambda m: m.push(m.number(_I4)),  # BININT
    ord("K"): lambda m: m.push(m.number(_U1)),  # BININT1
    ord("M"): lambda m: m.push(m.number(_U2)),  # BININT2
    0x8A: lambda m: m.integer(m.number(_U1)),  # LONG1
    0x8B: lambda m: m.integer(m.number(_U4)),  # LONG4
    ord("F"): lambda m: m.push(float(m.line())),  # FLOAT
    ord("G"): lambda m: m.push(m.number(_F8)),  # BINFLOAT
    ord("V"): lambda m: m.push(m.line("raw_unicode_escape")),  # UNICODE
    0x8C: lambda m: m.push(m.take(m.number(_U1)).decode("utf-8")),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.push(m.take(m.number(_U4)).decode("utf-8")),  # BINUNICODE
    0x8D: lambda m: m.push(m.take(m.number(_U8)).decode("utf-8")),  # BINUNICODE8
    ord("C"): lambda m: m.push(m.take(m.number(_U1))),  # SHORT_BINBYTES
    ord("B"): lambda m: m.push(m.take(m.number(_U4))),  # BINBYTES
    0x8E: lambda m: m.push(m.take(m.number(_U8))),  # BINBYTES8
    0x96: lambda m: m.push(m.take(m.number(_U8))),  # BYTEARRAY8
    # containers; a set is a list here, since nothing asks what is in it
    ord(")"): lambda m: m.push(()),  # EMPTY_TUPLE
    ord("t"): lambda m: m.push(tuple(m.since_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    ord("]"): lambda m: m.push([]),  # EMPTY_LIST
    ord("l"): lambda m: m.push(m.since_mark()),  # LIST
    ord("a"): lambda m: m.extend([m.stack.pop()]),  # APPEND
    ord("e"): lambda m: m.extend(m.since_mark()),  # APPENDS
    0x8F: lambda m: m.push([]),  # EMPTY_SET
    0x90: lambda m: m.extend(m.since_mark()),  # ADDITEMS
    0x91: lambda m: m.push(m.since_mark()),  # FROZENSET
    ord("}"): lambda m: m.push({}),  # EMPTY_DICT
    ord("d"): _Machine.dict_since_mark,  # DICT
    ord("s"): _Machine.set_item,  # SETITEM
    ord("u"): lambda m: m.set_items(m.since_mark()),  # SETITEMS
    # the memo
    ord("p"): lambda m: m.remember(int(m.line())),  # PUT
    ord("q"): lambda m: m.remember(m.number(_U1)),  # BINPUT
    ord("r"): lambda m: m.remember(m.number(_U4)),  # LONG_BINPUT
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    ord("g"): lambda m: m.push(m.memo[int(m.line())]),  # GET
    ord("h"): lambda m: m.push(m.memo[m.number(_U1)]),  # BINGET
    ord("j"): lambda m: m.push(m.memo[m.number(_U4)]),  # LONG_BINGET
    # names and objects
    ord("c"): lambda m: m.name(m.line(), m.line()),  # GLOBAL
    0x93: _Machine.stack_global,  # STACK_GLOBAL
    ord("i"): _Machine.instance,  # INST
    ord("R"): _Machine.call,  # REDUCE
    0x81: _Machine.make,  # NEWOBJ
    0x92: _Machine.make_with_keywords,  # NEWOBJ_EX
    ord("b"): _Machine.build,  # BUILD
    ord("Q"): _Machine.persistent,  # BINPERSID
}
