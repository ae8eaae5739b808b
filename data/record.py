"""One `Sample` as bytes, and back: the record of the native store. No pickle, so reading runs no code.

    bytes 0-3    b"EGNR"
    bytes 4-7    format version, uint32
    bytes 8-11   CRC-32 of everything from byte 12 on, uint32
    bytes 12-15  length H of the header, uint32
    H bytes      header, JSON: sid, fid, energy, energy_relaxed, arrays = [[name, dtype, shape], ...]
    the rest     the arrays one after the other, C order, in the order of the header

Everything is little-endian. JSON numbers round-trip float64 exactly, so energies lose nothing. Forces are stored as
float32: a relative 6e-8, far below what any calculator converges to. What is None is left out.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

from egnscale.data.sample import Sample

MAGIC = b"EGNR"
VERSION = 1
_PREFIX = struct.Struct("<4sIII")
_CHECKED_FROM = 12

#: Field -> dtype on disk; the dtype in memory is that of `Sample`.
STORED_AS = {
    "atomic_numbers": "|u1",
    "positions": "<f8",
    "cell": "<f8",
    "pbc": "|b1",
    "tags": "|i1",
    "fixed": "|b1",
    "forces": "<f4",
    "positions_relaxed": "<f8",
}
_IN_MEMORY = {"|u1": np.int64, "|i1": np.int64, "|b1": np.bool_, "<f4": np.float64, "<f8": np.float64}


def encode_sample(sample: Sample) -> bytes:
    """The record of one sample.

    Raises:
        ValueError: if the sample makes no sense (see `Sample.validate`), or a value does not fit its stored type.
    """
    sample.validate()
    arrays, payload = [], []
    for name, dtype in STORED_AS.items():
        value = getattr(sample, name)
        if value is None:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            stored = np.ascontiguousarray(value, dtype=dtype)
        # A float32 force may be rounded but not overflow; integers and booleans must survive exactly.
        fits = np.isfinite(stored).all() if stored.dtype.kind == "f" else (stored == value).all()
        if not fits:
            raise ValueError(f"{sample.name}: {name} does not fit {stored.dtype.name}")
        arrays.append([name, dtype, list(stored.shape)])
        payload.append(stored.tobytes())
    header = {
        "sid": int(sample.sid),
        "fid": int(sample.fid),
        "energy": None if sample.energy is None else float(sample.energy),
        "energy_relaxed": None if sample.energy_relaxed is None else float(sample.energy_relaxed),
        "arrays": arrays,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    checked = b"".join([struct.pack("<I", len(text)), text, *payload])
    return struct.pack("<4sII", MAGIC, VERSION, zlib.crc32(checked)) + checked


def decode_sample(record: bytes | memoryview) -> Sample:
    """The sample of one record; its arrays are copies.

    Raises:
        ValueError: if the bytes are not a record, come from another format version, or fail their checksum.
    """
    if len(record) < _PREFIX.size:
        raise ValueError(f"a record of {len(record)} bytes is cut short")
    magic, version, checksum, length = _PREFIX.unpack_from(record)
    if magic != MAGIC:
        raise ValueError("this is not an egnscale record")
    if version != VERSION:
        raise ValueError(f"the record has format version {version}; this egnscale reads version {VERSION}")
    if zlib.crc32(memoryview(record)[_CHECKED_FROM:]) != checksum:
        raise ValueError("the record fails its checksum")
    start = _PREFIX.size + length
    header = json.loads(bytes(record[_PREFIX.size : start]))
    fields: dict[str, Any] = {}
    for name, dtype, shape in header.pop("arrays"):
        stored = np.frombuffer(record, dtype=dtype, count=int(np.prod(shape)), offset=start)
        fields[name] = stored.reshape(shape).astype(_IN_MEMORY[dtype])
        start += stored.nbytes
    return Sample(**fields, **header)
