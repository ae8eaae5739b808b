"""Reads and converts damaged records; run by tests/unit/test_oc20_fuzz.py in a process of its own.

python oc20_record_fuzz.py write FILE COUNT SEED MARKER     an LMDB file of damaged records; hostile ones touch MARKER
python oc20_record_fuzz.py read FILE                        reads them all; prints what became of each, as JSON
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import struct
import sys
import time
from pathlib import Path

from egnscale.data.convert import _record
from egnscale.data.readers import open_source
from egnscale.data.source import BadSample

#: Address space that reading may add to what the imports took. A damaged length can ask for 2**64 bytes.
ROOM = 1 << 30
OPCODES = bytes({*b"(.012FIJKLMNPQRSTUVXabcdeghijlopqrstu}])BCG", *range(0x80, 0x99)})


def flip(record: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(record)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut(record: bytes, chance: random.Random) -> bytes:
    return record[: chance.randrange(len(record))]


def swap(record: bytes, chance: random.Random) -> bytes:
    a, b, c = sorted(chance.sample(range(len(record)), 3))
    return record[:a] + record[b:c] + record[a:b] + record[c:]


def splice(record: bytes, chance: random.Random) -> bytes:
    """Bytes taken out, or put in from elsewhere."""
    a, b, c = (chance.randrange(len(record)) for _ in range(3))
    return record[:a] + record[min(b, c) : min(b, c) + 64] + record[a + chance.randrange(64) :]


def opcodes(record: bytes, chance: random.Random) -> bytes:
    """Instructions where none were."""
    at = chance.randrange(len(record))
    return record[:at] + bytes(chance.choices(OPCODES, k=chance.randrange(1, 6))) + record[at:]


def numbers(record: bytes, chance: random.Random) -> bytes:
    """A length, size or value overwritten by an extreme one."""
    at = chance.randrange(len(record) - 8)
    value = chance.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1, chance.getrandbits(64)))
    width = chance.choice((1, 4, 8))
    return record[:at] + struct.pack("<Q", value)[:width] + record[at + width :]


def write(file: Path, count: int, seed: int, marker: str) -> None:
    import torch
    from oc20_records import attributes, new_graph, old_graph, structures, write_lmdb

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return chance.choice((os.system, os.popen)), (f"touch {marker}",)

    chance = random.Random(seed)
    samples = structures(20, seed)
    records = []
    for i in range(count):
        values = attributes(samples[i % 20], modern=chance.random() < 0.5)
        how = chance.choice((flip, flip, cut, swap, splice, opcodes, numbers, "shape", "hostile"))
        name = chance.choice(list(values))
        if how == "shape":
            wrong = (torch.zeros(2, 5), torch.zeros(0), torch.tensor(float("nan")), [[1]], "x", 10**30, {}, None)
            values[name] = chance.choice(wrong)
        elif how == "hostile":
            values[name] = Hostile()
        layout = chance.choice((new_graph, old_graph))
        record = pickle.dumps(layout(values), protocol=chance.randrange(2, 6))
        if how == "hostile" and chance.random() < 0.3:
            record = flip(record, chance)
        records.append(how(record, chance) if callable(how) else record)
    write_lmdb(file, records)


def read(file: Path) -> None:
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    source = open_source(file)
    whole, bad, wrong, slowest = 0, {}, [], 0.0
    start = time.monotonic()
    for i, sample in enumerate(source.read(0, source.num_units)):
        try:
            _record(sample)
            whole += 1
        except BadSample as error:
            bad[error.kind] = bad.get(error.kind, 0) + 1
            if not str(error).startswith(f"{file}: structure {i}") or "\n" in str(error) or len(str(error)) > 500:
                wrong.append(str(error))
        slowest = max(slowest, time.monotonic() - start)
        start = time.monotonic()
    print(json.dumps({"whole": whole, "bad": bad, "wrong": wrong, "slowest": slowest}))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        read(Path(sys.argv[2]))
