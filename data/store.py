"""The native store: a directory of LMDB shards that many processes read at once. docs/data-format.md has the layout.

    data.0000.lmdb ...   records (data/record.py) under the keys 00000000, 00000001, ... and one key `format`
    metadata.json        format version, shards with sizes and digests, statistics, provenance
    metadata.npz         natoms, neighbors (edges), sid, fid of every structure, for load balancing

- Read-only and without locks; environments are opened where they are first used, once for each process.
- Every record carries a checksum, every shard its size and digest; what does not fit is one line naming the file.
- `write_store` (data/store_writer.py) writes it, completely or not at all.
"""

from __future__ import annotations

import json
import operator
import os
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from egnscale.data.lmdb_files import open_environment
from egnscale.data.record import decode_sample
from egnscale.data.sample import Sample
from egnscale.data.store_writer import COLUMNS, FORMAT, FORMAT_KEY, VERSION, digest, key, write_store

__all__ = ["Store", "write_store"]


class Store:
    """A data set as torch's map-style data sets are: `len(store)`, `store[i] -> Sample`.

    Cheap to pickle and safe to fork: a process opens the shards when it first reads from them.

    Raises:
        FileNotFoundError: if `path`, its metadata or one of its shards is not there.
        ValueError: if what is there is not a complete store of this format version.
    """

    path: Path
    metadata: dict[str, Any]
    num_atoms: np.ndarray  #: (S,) int32, atoms of each structure
    num_edges: np.ndarray  #: (S,) int32, edges of each structure's OC20 graph
    sid: np.ndarray  #: (S,) int64
    fid: np.ndarray  #: (S,) int64
    ids_known = True  #: see `egnscale.data.dataset.Dataset`

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = _read_metadata(self.path)
        shards = self.metadata["shards"]
        self._files = [self.path / shard["name"] for shard in shards]
        self._ends = np.cumsum([shard["num_samples"] for shard in shards])
        columns = _read_columns(self.path / "metadata.npz", self.metadata["num_samples"])
        self.num_atoms, self.num_edges, self.sid, self.fid = (columns[name] for name in COLUMNS)
        self._opened: list[lmdb.Environment | None] = []
        self._pid = -1
        for i, shard in enumerate(shards):
            size = self._files[i].stat().st_size
            if size != shard["bytes"]:
                raise ValueError(
                    f"{self._files[i]} has {size} bytes, {shard['bytes']} were written: "
                    "the copy is incomplete or the file was changed; copy or make it again"
                )
            self._environment(i)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Sample:
        i = operator.index(i)
        where = i + len(self) if i < 0 else i
        if not 0 <= where < len(self):
            raise IndexError(f"{self.path} holds {len(self)} structures; there is no number {i}")
        shard = int(np.searchsorted(self._ends, where, side="right"))
        within = where - (int(self._ends[shard - 1]) if shard else 0)
        file = self._files[shard]
        try:
            with self._environment(shard).begin(buffers=True) as transaction:
                record = transaction.get(key(within))
                if record is None:
                    raise ValueError("the record is missing")
                return decode_sample(record)
        except (ValueError, lmdb.Error) as error:
            raise ValueError(
                f"{file}: structure {within} cannot be read: {error}; the file is damaged, copy or make it again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": [], "_pid": -1}

    def verify(self) -> None:
        """Read everything, comparing every digest, checksum and count.

        Raises:
            ValueError: naming the first file that is not as it was written.
        """
        # Digests first: a damaged LMDB tree can lead its reader anywhere, so it is not walked before.
        for file, shard in zip(self._files, self.metadata["shards"], strict=True):
            if digest(file) != shard["sha256"]:
                raise ValueError(f"{file} is not as it was written (sha256 differs); copy or make it again")
        for i in range(len(self)):
            sample = self[i]
            if (sample.num_atoms, sample.sid, sample.fid) != (self.num_atoms[i], self.sid[i], self.fid[i]):
                raise ValueError(f"{self.path / 'metadata.npz'} does not describe structure {i}; make the store again")

    def _environment(self, shard: int) -> lmdb.Environment:
        if self._pid != os.getpid():
            self._opened, self._pid = [None] * len(self._files), os.getpid()
        environment = self._opened[shard]
        if environment is None:
            environment = self._opened[shard] = _open_shard(self._files[shard])
        return environment


def _open_shard(path: Path) -> lmdb.Environment:
    """The environment of one shard."""
    environment = open_environment(path)
    try:
        with environment.begin() as transaction:
            marker = transaction.get(FORMAT_KEY)
    except lmdb.Error as error:
        raise ValueError(f"{path} is not an LMDB file, or is damaged ({error}); copy or make it again") from error
    if marker is None:
        raise ValueError(
            f"{path} is an LMDB file, but not of an egnscale store; `egnscale data convert` converts OC20's"
        )
    return environment


def _read_metadata(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; a store is a directory with metadata.json in it")
    file = path / "metadata.json"
    if not file.exists():
        inside = sorted(str(found.parent.relative_to(path)) for found in path.glob("*/*/metadata.json"))
        if inside:
            raise ValueError(f"{path} holds several stores: name one of {', '.join(inside)}")
        hint = "; `egnscale data convert` converts OC20's" if any(path.glob("*.lmdb")) else ""
        raise FileNotFoundError(f"{path} has no metadata.json, so it is not an egnscale store{hint}")
    try:
        metadata = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); copy or make the store again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{file} does not describe an egnscale store (no format: {FORMAT})")
    if metadata["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {metadata['version']}; this egnscale reads version {VERSION}: "
            "make the store again, or use the egnscale that made it"
        )
    missing = {"num_samples", "shards", "statistics"} - metadata.keys()
    if missing or sum(shard["num_samples"] for shard in metadata["shards"]) != metadata["num_samples"]:
        raise ValueError(f"{file} is damaged (entries missing or counts that differ); copy or make the store again")
    return metadata


def _read_columns(file: Path, length: int) -> dict[str, np.ndarray]:
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; copy or make the store again")
    try:
        with np.load(file, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in COLUMNS}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); copy or make the store again") from error
    if any(column.shape != (length,) for column in columns.values()):
        raise ValueError(f"{file} does not have {length} entries in each column; copy or make the store again")
    return columns
