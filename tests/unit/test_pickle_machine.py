"""The machine under both readers of pickles: what a pickle may cost, and what may be a key."""

from __future__ import annotations

import collections
import pickle
import pickletools
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from egnscale.data import pickle_machine
from egnscale.data.pickle_machine import DamagedPickle, Machine, RefusedName, Vocabulary
from egnscale.data.restricted_pickle import load, load_attributes
from egnscale.launch.torch_file import read_torch_file

PLAIN = Vocabulary("test", max_steps=100_000)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def run(pickled: bytes, vocabulary: Vocabulary = PLAIN) -> Any:
    return Machine(pickled, vocabulary).run()


#: What no reader of ours takes.
LEFT_OUT = {"STRING", "PERSID", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "STOP"}


def test_opcodes_are_those_of_python() -> None:
    known = {opcode.name for opcode in pickletools.opcodes if ord(opcode.code) in pickle_machine._STEPS}
    assert known == {opcode.name for opcode in pickletools.opcodes} - LEFT_OUT
    assert len(known) == len(pickle_machine._STEPS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values(protocol: int) -> None:
    value = {7: 2, None: [], 2.5: (), True: [False, {}], "a": (1, (2, 3), "å\n"), -(2**59): [2**70, -(2**31), 1e300]}
    assert run(pickle.dumps(value, protocol=protocol)) == value
    assert repr(run(pickle.dumps([True, 1, 0, False], protocol=protocol))) == "[True, 1, 0, False]"


def test_pickles_one_after_the_other() -> None:
    machine = Machine(pickle.dumps([1]) + pickle.dumps("two") + b"rest", PLAIN)
    assert (machine.run(), machine.run()) == ([1], "two")
    assert machine.data[machine.at :] == b"rest"


def test_text_and_bytes_of_python_2() -> None:
    assert run(b"\x80\x02}U\x01aT\x02\x00\x00\x00\xe5bs.") == {"a": "åb"}


HASHED = {
    "deep tuple as a key": b"\x80\x04}N" + b"\x85" * 90_000 + b"Ns.",
    "deep tuple as one of many keys": b"\x80\x04}(K\x01K\x02N" + b"\x85" * 90_000 + b"Nu.",
    "deep tuple in a set": b"\x80\x04\x8f(N" + b"\x85" * 90_000 + b"\x90.",
    "deep tuple in a frozenset": b"\x80\x04(N" + b"\x85" * 90_000 + b"\x91.",
    "deep tuple in a dict of protocol 0": b"(N" + b"\x85" * 90_000 + b"Nd.",
    "integer beyond its hash": b"\x80\x04}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"Ns.",
    "list as a key": b"\x80\x04}]Ns.",
}


@pytest.mark.parametrize("case", HASHED)
def test_keys_are_looked_at_before_they_are_hashed(case: str) -> None:
    with pytest.raises(DamagedPickle, match=r"as a (dictionary's key|set's member)"):
        run(HASHED[case])


def test_places_in_the_memo_cannot_collide() -> None:
    """Multiples of 2^61 - 1 share a hash: a dict of 300,000 of them takes five minutes to fill."""
    pickled = b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(40_000)) + b"."
    began = time.monotonic()
    with pytest.raises(DamagedPickle, match="memo"):
        run(pickled)
    assert time.monotonic() - began < 5
    with pytest.raises(DamagedPickle, match="memo"):
        run(b"Np-1\n.")


DAMAGED = {
    "below a mark": b"\x80\x04NN(ast.",
    "odd items": b"\x80\x04}(K\x01K\x02K\x03u.",
    "line without an end": b"I12",
    "state of a dict": b"\x80\x04}}b.",
    "members of a list": b"\x80\x04](K\x01\x90.",
    "items of a set": b"\x80\x04\x8fK\x01a.",
    "one step too many": b"\x80\x04" + b"N" * 100_000 + b".",
    "old class": b"(ibuiltins\nint\n.",
    "call of a name that is only mentioned": b"cbuiltins\nint\n)R.",
    "instance of a name that is only mentioned": b"cbuiltins\nint\n)\x81.",
    "keywords": b"cbuiltins\nint\n)N\x92.",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage(case: str) -> None:
    with pytest.raises(DamagedPickle) as error:
        run(DAMAGED[case], Vocabulary("test", mentions={"builtins.int"}, max_steps=100_000))
    assert "\n" not in str(error.value)


def test_names_have_older_spellings_and_no_other() -> None:
    vocabulary = Vocabulary("test", calls={"builtins.set": lambda budget, items: len(items)}, max_steps=100)
    for module in ("builtins", "__builtin__"):
        assert run(b"c" + module.encode() + b"\nset\n((K\x01K\x02tt" + b"R.", vocabulary) == 2
    for refused in (b"cbuiltin\nset\n.", b"cset\nset\n.", b"cbuiltins\nset.pop\n.", b"c\nbuiltins.set\n."):
        with pytest.raises(RefusedName, match="which no test needs"):
            run(refused, vocabulary)


# ----------------------------------------------------------------------------------------------------- both readers


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_array_may_be_there_twice(protocol: int, tmp_path: Path) -> None:
    for array in (np.arange(6.0).reshape(2, 3).T, np.array([True, False] * 5000), np.arange(3, dtype=">i2")):
        read = load_attributes(pickle.dumps(Data(a=array, b=array, c=[array]), protocol=protocol))
        for value in (read["a"], read["b"], read["c"][0]):
            np.testing.assert_array_equal(value, array)
        if protocol >= 2:  # torch's own limit
            torch.save([array, array], tmp_path / "file.pt", pickle_protocol=protocol)
            for value in read_torch_file(tmp_path / "file.pt"):
                np.testing.assert_array_equal(value.numpy(), array)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_containers_in_both(protocol: int, tmp_path: Path) -> None:
    value = [collections.OrderedDict(a=1), collections.defaultdict(None, b=[2]), {"c", 3}, frozenset({"d"}), set()]
    assert load(pickle.dumps(value, protocol=protocol)) == value
    value.append(collections.Counter("abba"))
    torch.save(value, tmp_path / "file.pt", pickle_protocol=protocol)
    assert read_torch_file(tmp_path / "file.pt") == value


def test_one_array_filled_many_times_in_a_checkpoint(tmp_path: Path) -> None:
    torch.save(np.zeros(50_000, dtype=np.int8), tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "file.pt").read_bytes()
    # The state is in the memo as the bytes are; making 400 kB out of 10 bytes goes on until the file's length is spent.
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02i1K\x00K\x01tR"
    state = b"(K\x01J\x50\xc3\x00\x00\x85" + dtype + b"\x89B" + struct.pack("<I", 50_000) + bytes(50_000) + b"tq\x00"
    again = b"(" + reconstruct + state + b"b" + (reconstruct + b"h\x00b") * 1000 + b"t."
    start = len(whole) - len(whole[whole.index(b"cnumpy") :])
    (tmp_path / "file.pt").write_bytes(whole[:start] + again)
    with pytest.raises(ValueError, match="more than its own length"):
        read_torch_file(tmp_path / "file.pt")


def test_a_deep_tuple_among_the_keys_of_storages(tmp_path: Path) -> None:
    """In torch.save's older format. It once overflowed the stack."""
    path = tmp_path / "file.pt"
    torch.save([torch.zeros(4)], path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    keys = whole.rindex(b"\x80\x02]")
    path.write_bytes(whole[: keys + 3] + b")" + b"\x85" * 300_000 + b"a.")
    with pytest.raises(ValueError, match="list of storages is damaged"):
        read_torch_file(path)
