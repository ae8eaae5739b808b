"""Reads the pickles in OC20's LMDB files as data: nothing that a pickle names is imported, and nothing is called.

`pickle_machine.py` steps through them; here is the vocabulary of those records:

- An object of `torch_geometric` is its class's name and its attributes. Neither torch_geometric nor torch is imported.
- A tensor is a view of the pickle's bytes, made after its size, strides and offset were checked against its storage.
  Within a storage's bytes there are pickles again, with a smaller vocabulary: no storage is in a storage.
- Dict keys are text.

`load_attributes` returns the attributes of a pickled `torch_geometric.data.Data`, in the layout of 2.0 and later
(attributes in `_store`) or before (attributes in the object itself).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from egnscale.data.pickle_machine import Budget, DamagedPickle, Machine, Name, Object, RefusedName, Vocabulary, shown
from egnscale.data.pickle_values import COMMON_CALLS, build_numpy, described_storage, dictionary, layout

__all__ = ["DamagedPickle", "RefusedName", "load", "load_attributes"]

#: OC20's records take about 1,500 steps; a list of numbers takes one step for each.
MAX_STEPS = 300_000


def load_attributes(record: bytes) -> dict[str, Any]:
    """The attributes of a pickled `torch_geometric.data.Data`; those that are None are left out.

    Values are int, float, str, NumPy arrays that may share memory with each other, and what else the pickle holds.

    Raises:
        RefusedName: naming the function or class that was asked for.
        DamagedPickle: if this is no such pickle.
    """
    graph = load(record)
    if not isinstance(graph, Object) or graph.name not in _GRAPHS:
        raise DamagedPickle(f"the pickle holds {shown(graph)}, not a torch_geometric Data")
    attributes = graph.state
    if isinstance(attributes, dict) and "_store" in attributes:
        store = attributes["_store"]
        if not isinstance(store, Object) or not isinstance(store.state, dict):
            raise DamagedPickle("the Data's _store is not what torch_geometric writes")
        attributes = store.state.get("_mapping")
    if not isinstance(attributes, dict):
        raise DamagedPickle("the Data has no attributes")
    return {name: value for name, value in attributes.items() if value is not None and name[:1] != "_"}


def load(record: bytes) -> Any:
    """The value of a pickle of plain values.

    Raises:
        RefusedName: naming the function or class that was asked for.
        DamagedPickle: if the bytes are not a pickle of plain values.
    """
    value = Machine(record, _RECORDS).run()
    if isinstance(value, Object) and value.name not in _CLASSES:
        raise DamagedPickle(f"the pickle holds {shown(value)} without content")
    return value


# ----------------------------------------------------------------------------------------------------------- tensors

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
_IN_STORAGE = Vocabulary("structure", mentions=_STORAGES)
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


def _storage(budget: Budget, content: Any) -> np.ndarray:
    """`torch.storage._load_from_bytes`: a file of torch.save's older format with one storage in it."""
    if not isinstance(content, bytes):
        raise DamagedPickle("a tensor's storage is not bytes")
    machine = Machine(content, _IN_STORAGE, budget, persistent=lambda id_: Object("storage", described_storage(id_)))
    if content.startswith(TORCH_HEADER):
        machine.at = len(TORCH_HEADER)
    else:
        if machine.run() != _TORCH_MAGIC or machine.run() != _TORCH_PROTOCOL:
            raise DamagedPickle("a tensor's storage is not in the format that torch writes into pickles")
        if machine.run().get("little_endian") is not True:
            raise DamagedPickle("a tensor's storage is big-endian")
    described, keys = machine.run(), machine.run()
    if not isinstance(described, Object) or keys != [described.state[1]]:
        raise DamagedPickle("a tensor's storage does not hold one storage")
    kind, _, count = described.state
    stored_as = _STORAGES[kind]
    dtype = np.dtype("<u2" if stored_as == "bfloat16" else stored_as)
    (written,) = struct.unpack_from("<q", content, machine.at)
    start = machine.at + 8
    if written != count or count * dtype.itemsize > len(content) - start:
        raise DamagedPickle(f"a tensor's storage of {count} elements is cut short")
    values = np.frombuffer(content, dtype, count, start)
    if stored_as == "bfloat16":
        budget.spend(4 * count)
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _tensor(budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`. Gradients, hooks and metadata (`rest`) mean nothing for data."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise DamagedPickle("a tensor has no storage")
    width = storage.dtype.itemsize
    # A stride of zero makes any number of elements out of one: no more than the record could hold.
    offset, size, stride = layout(offset, size, stride, len(storage), most=budget.size // width)
    if 0 in size:
        return np.zeros(size, storage.dtype)
    return np.ndarray(size, storage.dtype, storage, offset * width, tuple(step * width for step in stride))


# ---------------------------------------------------------------------------------------------------------- objects

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
    *_STORAGES,
}


def _maker(class_: str) -> Callable[..., Object]:
    return lambda budget: Object(class_)


def _new_object(budget: Budget, class_: Any, *rest: Any) -> Object:
    """`copyreg._reconstructor`: how protocols before 2 make objects."""
    if not isinstance(class_, Name) or class_.make is None:
        raise DamagedPickle(f"{shown(class_)} is made where an object was expected")
    return class_.make(budget)


def _attribute(budget: Budget, of: Any, name: Any) -> str:
    """`getattr`, which some versions of Python write for a member of an enumeration; for that one alone."""
    if not isinstance(of, Name) or of.name != _ATTRIBUTE_TYPE:
        raise RefusedName("the pickle asks for builtins.getattr, which no structure needs; nothing was run")
    return name


def _build(budget: Budget, target: Any, state: Any) -> Any:
    if not isinstance(target, Object) or target.name not in _CLASSES:
        return build_numpy(budget, target, state)
    if not isinstance(state, dict) or target.state is not None:
        raise DamagedPickle(f"the state of {shown(target)} is not what its class writes")
    target.state = state
    return target


_RECORDS = Vocabulary(
    "structure",
    calls={
        **COMMON_CALLS,
        "collections.OrderedDict": dictionary((str,)),
        "torch.storage._load_from_bytes": _storage,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor": _tensor,
        "copyreg._reconstructor": _new_object,
        "builtins.getattr": _attribute,
        _ATTRIBUTE_TYPE: lambda budget, name: name,
    },
    makes={name: _maker(name) for name in _CLASSES},
    mentions=_MENTIONED,
    build=_build,
    keys=(str,),
    max_steps=MAX_STEPS,
)
