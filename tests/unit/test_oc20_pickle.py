"""Pickles of OC20's are read as data: what torch_geometric wrote is read back, and nothing that they name is run."""

from __future__ import annotations

import collections
import functools
import io
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oc20_records import attributes, new_graph, old_graph, structures
from torch_geometric.data import Data

from egnscale.data import restricted_pickle
from egnscale.data.restricted_pickle import DamagedPickle, RefusedName, load, load_attributes

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def assert_read(graph: Data, given: dict[str, Any], protocol: int) -> None:
    read = load_attributes(pickle.dumps(graph, protocol=protocol))
    assert read.keys() == {name for name, value in given.items() if value is not None}
    for name, value in read.items():
        wanted = given[name]
        if isinstance(wanted, torch.Tensor):
            wanted = (wanted.float() if wanted.dtype == torch.bfloat16 else wanted).numpy()
        if isinstance(wanted, np.ndarray):
            assert value.shape == wanted.shape, name
            np.testing.assert_array_equal(value, wanted, err_msg=name)
        else:
            assert value == wanted, name
            assert type(value) is type(wanted), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("layout", [new_graph, old_graph])
def test_what_oc20_stores(layout: Callable[[dict[str, Any]], Data], modern: bool, protocol: int) -> None:
    given = attributes(structures(1)[0], modern=modern)
    assert_read(layout(given), given, protocol)


@pytest.mark.filterwarnings("ignore:Unable to accurately infer")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_that_may_be_stored(protocol: int) -> None:
    grid = torch.arange(20.0).reshape(4, 5)
    given = {
        "strided": grid.t()[1:, 1:],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "bfloat16": torch.tensor([0.5, -2.0, 3.140625], dtype=torch.bfloat16),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "short": torch.tensor([-300, 300], dtype=torch.int16),
        "flags": torch.tensor([True, False]),
        "array": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f8"),
        "nothing": np.zeros((0, 3)),
        "text": "Pt \u00e5",
        "list": [1, 2.5, None],
        "number": 10**20,
        "none": None,
    }
    graph = new_graph(given)
    assert graph.is_node_attr("array") in (True, False)  # fills a cache that is pickled too
    assert_read(graph, given, protocol)


def test_numpy_scalars_become_numbers() -> None:
    read = load_attributes(pickle.dumps(Data(a=np.float32(0.5), b=np.int64(7), c=np.bool_(True))))
    assert read == {"a": 0.5, "b": 7, "c": 1}


def test_tensors_may_share_a_storage() -> None:
    whole = torch.arange(12.0)
    read = load_attributes(pickle.dumps(Data(a=whole[:6].reshape(2, 3), b=whole[6:])))
    np.testing.assert_array_equal(read["a"], whole[:6].reshape(2, 3))
    np.testing.assert_array_equal(read["b"], whole[6:])


def test_neither_torch_nor_torch_geometric_is_imported(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(pickle.dumps(new_graph(attributes(structures(1)[0]))))
    code = (
        "import sys; from egnscale.data.restricted_pickle import load_attributes; "
        "print(len(load_attributes(open(sys.argv[1], 'rb').read()))); "
        "sys.exit('torch' in sys.modules or 'torch_geometric' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "record")], check=False).returncode == 0


def test_the_usual_beginning_of_a_storage_is_only_a_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    record = pickle.dumps(Data(a=torch.arange(3.0)))
    assert restricted_pickle.TORCH_HEADER in record
    monkeypatch.setattr(restricted_pickle, "TORCH_HEADER", b"something else")
    np.testing.assert_array_equal(load_attributes(record)["a"], [0, 1, 2])
    for old, new in ((b"little_endianq\x02\x88", b"little_endianq\x02\x89"), (b"M\xe9\x03.", b"M\xe8\x03.")):
        assert old in record
        with pytest.raises(DamagedPickle, match=r"big-endian|format that torch"):
            load_attributes(record.replace(old, new))


def test_plain_values() -> None:
    for protocol in PROTOCOLS:
        value = {
            "a": [1, -(2**40), 2.5, None, True, "\u4e2d"],
            "b": (b"\x00\xff", ()),
            "c": collections.OrderedDict(x=1),
        }
        assert load(pickle.dumps(value, protocol=protocol)) == value


# ------------------------------------------------------------------------------------------------- hostile pickles


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def opened(module: str, name: str, arguments: bytes, end: bytes = b"R.") -> bytes:
    """A pickle that calls a global."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + end


class Reduced:
    """What pickle makes of an object with a hostile `__reduce__`."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def hostile(command: str) -> dict[str, tuple[bytes, str]]:
    """name -> (pickle that runs a shell command when it is unpickled, the name that must be given)."""
    shell = b"(" + text(command) + b"t"
    python = f"__import__('os').system({command!r})"
    inner = opened("posix", "system", shell)
    buffer = io.BytesIO()
    torch.save(Reduced(os.system, (command,)), buffer, _use_new_zipfile_serialization=False)
    in_storage = b"(B" + struct.pack("<I", len(buffer.getvalue())) + buffer.getvalue() + b"t"
    return {
        "os.system": (opened("os", "system", shell), "os.system"),
        "posix.system": (pickle.dumps(Reduced(os.system, (command,))), "posix.system"),
        "protocol 0": (pickle.dumps(Reduced(os.system, (command,)), protocol=0), "posix.system"),
        "eval": (pickle.dumps(Reduced(eval, (python,))), "builtins.eval"),
        "exec, Python 2's name": (pickle.dumps(Reduced(exec, (python,)), protocol=2), "__builtin__.exec"),
        "getattr": (opened("builtins", "getattr", b"(cos\nsystem\n" + text("x") + b"t"), "os.system"),
        "getattr of a known name": (
            opened("builtins", "getattr", b"(ctorch\nSize\n" + text("__class__") + b"t"),
            "builtins.getattr",
        ),
        "Popen": (pickle.dumps(Reduced(subprocess.Popen, (["sh", "-c", command],))), "subprocess.Popen"),
        "partial": (pickle.dumps(Reduced(functools.partial, (os.system, command))), "functools.partial"),
        "torch.load": (pickle.dumps(Reduced(torch.load, (io.BytesIO(inner),))), "torch.serialization.load"),
        "pickle.loads": (pickle.dumps(Reduced(pickle.loads, (inner,))), "_pickle.loads"),
        "__import__": (opened("builtins", "__import__", b"(" + text("os") + b"t"), "builtins.__import__"),
        "INST": (b"(" + text(command) + b"ios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\n" + text(command) + b"o.", "os.system"),
        "dotted name": (
            b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93" + shell + b"R.",
            "torch.serialization.os.system",
        ),
        "dotted name of a known module": (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x14_rebuild_tensor_v2.x\x93" + shell + b"R.",
            "torch._utils._rebuild_tensor_v2.x",
        ),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + shell + b"\x81.", "subprocess.Popen"),
        "NEWOBJ_EX": (b"\x80\x04csubprocess\nPopen\n" + shell + b"}\x92.", "subprocess.Popen"),
        "never called": (b"\x80\x02cos\nsystem\n.", "os.system"),
        "in an attribute": (pickle.dumps(Data(pos=Reduced(os.system, (command,)))), "posix.system"),
        "in a tensor's storage": (opened("torch.storage", "_load_from_bytes", in_storage), "posix.system"),
        "as a hook": (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\n" + text(command) + b"tR.",
            "os.system",
        ),
        "as __setstate__": (
            b"\x80\x02ctorch_geometric.data.data\nData\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb.",
            "os.system",
        ),
        "codec": (opened("_codecs", "decode", b"(" + text("x") + text("rot13") + b"t"), "_codecs.decode"),
        "unprintable": (opened("os\x1b[2J", "system", shell), "os?[2J.system"),
    }


@pytest.mark.parametrize("case", hostile(""))
def test_nothing_is_run_and_the_name_is_given(case: str, tmp_path: Path) -> None:
    record, name = hostile(f"touch {tmp_path}/ran")[case]
    with pytest.raises(RefusedName) as error:
        load(record)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "case", ["os.system", "posix.system", "eval", "INST", "in an attribute", "in a tensor's storage"]
)
def test_the_cases_are_hostile(case: str, tmp_path: Path) -> None:
    """Python's own pickle runs them."""
    record, _ = hostile(f"touch {tmp_path}/ran")[case]
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=record, check=False
    )
    assert (tmp_path / "ran").exists()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A pickled tensor over a storage of 6 floats, with any layout."""
    good = pickle.dumps(torch.zeros(6).reshape(2, 3), protocol=2)
    layout = b"K\x00K\x02K\x03\x86" if b"K\x00K\x02K\x03\x86" in good else b""
    assert layout, "the pickle of a tensor looks different now"
    start, end = good.index(layout), good.index(b"\x89", good.index(layout))

    def shape(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"

    return (
        good[:start]
        + b"\x8a\x09"
        + offset.to_bytes(9, "little", signed=True)
        + shape(size)
        + shape(stride)
        + good[end:]
    )


def test_tensor_helper_makes_tensors() -> None:
    assert pickle.loads(tensor((3, 2), (1, 3))).shape == (3, 2)
    assert load(tensor((3, 2), (1, 3))).shape == (3, 2)


OUTSIDE = {
    "too long": ((7,), (1,), 0),
    "offset": ((6,), (1,), 1),
    "stride": ((2, 3), (4, 1), 0),
    "far away": ((1,), (1,), 2**62),
    "negative offset": ((1,), (1,), -1),
    "negative stride": ((2,), (-1,), 1),
    "negative size": ((-2, -3), (3, 1), 0),
    "overflow": ((2**62, 4), (2**62, 1), 0),
    "expanded": ((2**40,), (0,), 0),
    "expanded twice": ((2**31, 2**31), (0, 0), 0),
    "ranks differ": ((2, 3), (1,), 0),
    "many dimensions": ((1,) * 40, (1,) * 40, 0),
    "no elements, but many": ((0, 2**62, 2**62), (1, 1, 1), 0),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_stays_in_its_storage(case: str) -> None:
    size, stride, offset = OUTSIDE[case]
    with pytest.raises(DamagedPickle):
        load(tensor(size, stride, offset))


def array(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """numpy's `_reconstruct` and its state."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01" + shape + dtype + b"\x89B" + struct.pack("<I", len(content)) + content + b"tb."
    )


F8 = (
    b"cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def test_array_helper_makes_arrays() -> None:
    np.testing.assert_array_equal(load(array(b"K\x02\x85", F8, np.array([1.5, 2.5]).tobytes())), [1.5, 2.5])


#: A billion laughs: 10**30 items, if anyone wrote them out.
LAUGHS = b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(30))
BOMBS = {
    "empty": b"",
    "no stop": b"\x80\x04N",
    "empty stack": b"\x80\x04.",
    "cut in a string": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "64-bit string": b"\x80\x04\x8d" + b"\xff" * 8 + b"a.",
    "64-bit bytearray": b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00a.",
    "integer of 2 GB": b"\x80\x04\x8b\xff\xff\xff\x7f\x00.",
    "negative length": b"\x80\x04\x8b\xff\xff\xff\xff\x00.",
    "integer of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "memo of 32 GB": b"\x80\x04Nr\xff\xff\xff\xff0.",
    "memo that is not there": b"\x80\x04h\x05.",
    "deep tuple": b"\x80\x04N" + b"\x85" * 400_000 + b".",
    "deep tuple as a key": b"\x80\x04}N" + b"\x85" * 200_000 + b"Ns.",
    "deep lists": b"\x80\x04" + b"](" * 100_000 + b"e" * 100_000 + b".",
    "marks": b"\x80\x04" + b"(" * 200_000 + b".",
    "dict of integers": b"\x80\x04}K\x01K\x02s.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "extension code": b"\x80\x02\x82\x01.",
    "persistent id": b"\x80\x02NQ.",
    "state of a number": b"\x80\x02K\x01}b.",
    "state of a name": b"\x80\x02ctorch\nSize\n}b.",
    "state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__defaults__") + b"Ns\x86b.",
    "state twice": b"\x80\x02ctorch_geometric.data.data\nData\n)\x81}b}b.",
    "call of a class": b"\x80\x02ctorch_geometric.data.data\nData\n)R.",
    "call of a number": b"\x80\x02K\x01)R.",
    "call without arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "not arguments": b"\x80\x02ctorch.storage\n_load_from_bytes\nK\x01R.",
    "storage of text": opened("torch.storage", "_load_from_bytes", b"(" + text("x") + b"t"),
    "storage of nothing": opened("torch.storage", "_load_from_bytes", b"(C\x00t"),
    "storage in a zip file": opened("torch.storage", "_load_from_bytes", b"(C\x04PK\x03\x04t"),
    "object dtype": array(b"K\x01\x85", F8.replace(text("f8"), text("O8")), b"\x00" * 8),
    "text dtype": array(b"K\x01\x85", F8.replace(text("f8"), text("U2")), b"\x00" * 8),
    "dtype with fields": array(b"K\x01\x85", F8.replace(b"NNN", b"N(t}"), b"\x00" * 8),
    "dtype of a tuple": array(b"K\x01\x85", b"cnumpy\ndtype\n((Nt\x89\x88tR", b"\x00" * 8),
    "dtype of a deep tuple": array(b"K\x01\x85", b"cnumpy\ndtype\n(N" + b"\x85" * 200_000 + b"\x89\x88tR", b"\x00" * 8),
    "dtype of laughs": b"\x80\x02cnumpy\ndtype\n(" + LAUGHS + b"\x89\x88tR.",
    "encoding of laughs": opened("_codecs", "encode", b"(" + text("x") + LAUGHS + b"t"),
    "array shorter than its shape": array(b"K\x03\x85", F8, b"\x00" * 16),
    "array of a huge shape": array(b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x40\x85", F8, b"\x00" * 16),
    "array of a negative shape": array(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", F8, b"\x00" * 16),
    "array without content": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR.",
    "array of a name": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(ctorch\nSize\nK\x00\x85C\x01btR.",
    "text encoded many times": (
        b"\x80\x02"
        + text("x" * 10_000)
        + b"q\x00"
        + (b"c_codecs\nencode\n(h\x00" + text("latin1") + b"tR") * 2_000
        + b"."
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case: str) -> None:
    with pytest.raises(DamagedPickle) as error:
        load(BOMBS[case])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_lists_that_hold_each_other_cost_nothing() -> None:
    assert len(load(b"\x80\x02" + LAUGHS + b".")) == 10
    cyclic = b"\x80\x02]q\x00h\x00a."
    assert len(load(cyclic)) == 1


@pytest.mark.parametrize("value", [[1, 2], "text", 5, {"pos": 1}, torch.zeros(3), collections.OrderedDict(a=1)])
def test_something_else_than_a_graph(value: Any) -> None:
    with pytest.raises(DamagedPickle, match="not a torch_geometric Data"):
        load_attributes(pickle.dumps(value))


def test_graph_without_attributes() -> None:
    with pytest.raises(DamagedPickle, match="no attributes"):
        load_attributes(b"\x80\x02ctorch_geometric.data.data\nData\n)\x81.")
    with pytest.raises(DamagedPickle, match="_store"):
        load_attributes(b"\x80\x02ctorch_geometric.data.data\nData\n)\x81}" + text("_store") + b"K\x01sb.")
