"""ASE databases in LMDB files (`*.aselmdb`), the format of OMat24, OMol25 and OC25.

Keys are row numbers from "1" on, values JSON compressed by zlib; `nextid` and `deleted_ids` tell which rows there are.
Read here directly: the package that writes them asks for clients of two database servers. Nothing in them is pickled.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.lmdb_files import LmdbFiles
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource, checked, identity

#: Bytes of one row's JSON; a structure of 100,000 atoms has about 20 million.
MAX_ROW_BYTES = 256 << 20


class AseLmdb(IndexedSource):
    """One `.aselmdb` file, or those of a directory in the order of their names.

    Raises:
        ValueError: if a file is no LMDB file, or not an ASE database.
    """

    kind = "ASE LMDB"

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self._lmdb = LmdbFiles(files)
        self._ids = [self._ids_of(i) for i in range(len(files))]
        self._ends = np.cumsum([len(ids) for ids in self._ids])
        self.num_units = int(self._ends[-1])

    def _ids_of(self, i: int) -> np.ndarray:
        """The row numbers of file `i`."""
        file = self.files[i]
        try:
            record = self._lmdb.get(i, b"nextid")
            if record is None:
                raise ValueError("no key `nextid`")
            following = _unpacked(record)
            record = self._lmdb.get(i, b"deleted_ids")
            deleted = [] if record is None else _unpacked(record)
            known = isinstance(deleted, list) and all(type(id_) is int for id_ in [following, *deleted])
            if not known or not 1 <= following <= self._lmdb[i].stat()["entries"] + len(deleted):
                raise ValueError("`nextid` and `deleted_ids` do not fit what is there")
        except ValueError as error:
            raise ValueError(f"{file} is not an ASE database in LMDB: {error}") from error
        return np.setdiff1d(np.arange(1, following), np.array(deleted, dtype=np.int64))

    def _read_one(self, i: int) -> Sample:
        file = int(np.searchsorted(self._ends, i, side="right"))
        id_ = int(self._ids[file][i - (int(self._ends[file - 1]) if file else 0)])
        where = f"{self.files[file]}: row {id_}"
        record = self._lmdb.get(file, b"%d" % id_)
        if record is None:
            raise BadSample(f"{where} is missing", "missing record")
        try:
            sample = _sample(_unpacked(record), i)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise BadSample(f"{where} cannot be read: {what}", "damaged record") from error
        return checked(sample, where)


def _unpacked(record: bytes) -> Any:
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(record, MAX_ROW_BYTES)
        if stream.unconsumed_tail or not stream.eof:
            raise ValueError("its JSON is cut short, or too large")
        return json.loads(text)
    except zlib.error as error:
        raise ValueError(f"not compressed by zlib ({error})") from error
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _sample(row: Any, index: int) -> Sample:
    if not isinstance(row, dict):
        raise ValueError("the row is not a JSON object")
    numbers = _array(row["numbers"], np.int64, (-1,))
    n = len(numbers)
    fixed = np.zeros(n, dtype=bool)
    for constraint in row.get("constraints") or []:
        if constraint.get("name") == "FixAtoms":
            indices = _array(constraint["kwargs"]["indices"], np.int64, (-1,))
            if len(indices) and (indices.min() < 0 or indices.max() >= n):
                raise ValueError("a constraint fixes atoms that are not there")
            fixed[indices] = True
    info = {**(row.get("data") or {}), **(row.get("key_value_pairs") or {})}
    sid, fid = identity(info, index, 0)
    energy, forces, tags = row.get("energy"), row.get("forces"), row.get("tags")
    return Sample(
        atomic_numbers=numbers,
        positions=_array(row["positions"], np.float64, (n, 3)),
        cell=_array(row["cell"], np.float64, (3, 3)),
        pbc=_array(row["pbc"], np.int64, (3,)).astype(bool),
        tags=np.zeros(n, dtype=np.int64) if tags is None else _array(tags, np.int64, (n,)),
        fixed=fixed,
        sid=sid,
        fid=fid,
        energy=None if energy is None else float(energy),
        forces=None if forces is None else _array(forces, np.float64, (n, 3)),
    )


def _array(value: Any, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """An array as ASE writes it into JSON: {"__ndarray__": [shape, type, flat list]}, or as nested lists."""
    if isinstance(value, dict):
        if "array" in value:  # a Cell object
            value = value["array"]
        if isinstance(value, dict):
            _, _, value = value["__ndarray__"]
    array = np.array(value)
    if array.size == 0:
        array = array.astype(dtype)
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and np.issubdtype(dtype, np.integer)):
        raise ValueError(f"an array of {array.dtype.name} where {np.dtype(dtype).name} was expected")
    if -1 not in shape and array.size != int(np.prod(shape)):
        raise ValueError(f"an array of {array.size} numbers where {shape} was expected")
    return array.astype(dtype).reshape(shape)
