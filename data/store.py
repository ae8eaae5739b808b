"""The native store: a directory of LMDB shards that many processes read at once. docs/data-format.md has the layout.

    data.0000.lmdb ...   records (data/record.py) under the keys 00000000, 00000001, ... and one key `format`
    metadata.json        format version, shards with sizes and digests, statistics, provenance
    metadata.npz         natoms, neighbors (edges), sid, fid of every structure, for load balancing

- Written into a temporary directory, synchronised, renamed: a store is complete or absent.
- Read-only and without locks; environments are opened where they are first used, once for each process.
- Every record carries a checksum, every shard its size and digest; what does not fit is one line naming the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import shutil
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np

from egnscale.data.neighbors import count_edges
from egnscale.data.record import decode_sample, encode_sample
from egnscale.data.sample import Sample

FORMAT = "egnscale-store"
VERSION = 1
#: About 3 GB for OC20's structures. Each open shard is an open file, so there should be hundreds, not thousands.
SHARD_SIZE = 500_000
_FORMAT_KEY = b"format"
_FIRST_MAP_SIZE = 16 << 20  # bytes; doubled when full
_BATCH_BYTES = 4 << 20  # bytes written in one transaction
_COLUMNS = {"natoms": "int32", "neighbors": "int32", "sid": "int64", "fid": "int64"}


def _key(i: int) -> bytes:
    return b"%08d" % i


# ---------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes one LMDB file; a context manager that removes the file if anything goes wrong inside."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_samples = 0
        self._pending: list[tuple[bytes, bytes]] = []
        self._pending_bytes = 0
        self._map_size = _FIRST_MAP_SIZE
        with self._one_line():
            # Not synchronised at every transaction; __exit__ does it once.
            self._environment = lmdb.open(str(self.path), subdir=False, lock=False, sync=False, map_size=self._map_size)

    def add(self, record: bytes) -> None:
        """Append one encoded sample."""
        self._put(_key(self.num_samples), record)
        self.num_samples += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        complete = False
        try:
            if kind is None:
                marker = {"format": FORMAT, "version": VERSION, "num_samples": self.num_samples}
                self._put(_FORMAT_KEY, json.dumps(marker).encode())
                self._flush()
                with self._one_line():
                    self._environment.sync(True)
                complete = True
        finally:
            self._environment.close()
            if not complete:
                self.path.unlink(missing_ok=True)

    def _put(self, key: bytes, value: bytes) -> None:
        self._pending.append((key, value))
        self._pending_bytes += len(value)
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        with self._one_line():
            while self._pending:
                try:
                    with self._environment.begin(write=True) as transaction:
                        for key, value in self._pending:
                            transaction.put(key, value, append=True)
                except lmdb.MapFullError:
                    # The transaction is lost, its records are not: enlarge the map and put them again.
                    self._map_size *= 2
                    self._environment.set_mapsize(self._map_size)
                    continue
                self._pending.clear()
                self._pending_bytes = 0

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise OSError(f"cannot write {self.path}: {error} (is the disk full?)") from error


class Summary:
    """What `metadata.json` and `metadata.npz` say about the samples added so far."""

    def __init__(self) -> None:
        self.columns = {name: array("q") for name in _COLUMNS}
        self.energies = {"energy": array("d"), "energy_relaxed": array("d")}
        # For all and for free atoms: sum of squares and number of components, largest norm.
        self.forces = {"all": [0.0, 0, 0.0], "free": [0.0, 0, 0.0]}
        self.elements: set[int] = set()

    def add(self, sample: Sample, num_edges: int) -> None:
        row = (sample.num_atoms, num_edges, sample.sid, sample.fid)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
        for name, values in self.energies.items():
            if (value := getattr(sample, name)) is not None:
                values.append(value)
        self.elements.update(sample.atomic_numbers.tolist())
        if sample.forces is not None:
            for which, forces in (("all", sample.forces), ("free", sample.forces[~sample.fixed])):
                total = self.forces[which]
                total[0] += float((forces**2).sum())
                total[1] += forces.size
                total[2] = max(total[2], float(np.sqrt((forces**2).sum(axis=1).max(initial=0.0))))

    def statistics(self) -> dict[str, Any]:
        """Energies in eV, forces in eV/A; None where no sample has the quantity. JSON-ready."""
        result: dict[str, Any] = {"elements": sorted(self.elements)}
        for name, column in self.energies.items():
            values = np.array(column)
            result[name] = (
                {
                    "count": len(values),
                    "mean": float(values.mean()),
                    "std": float(values.std()),
                    "min": float(values.min()),
                    "max": float(values.max()),
                }
                if len(values)
                else None
            )
        result["forces"] = (
            {
                which: {"rms": (squares / count) ** 0.5 if count else 0.0, "max": largest}
                for which, (squares, count, largest) in self.forces.items()
            }
            if self.forces["all"][1]
            else None
        )
        return result


def write_store(
    path: str | Path,
    samples: Iterable[Sample],
    *,
    shard_size: int = SHARD_SIZE,
    provenance: dict[str, Any] | None = None,
    edges: Callable[[Sample], int] = count_edges,
) -> None:
    """Write a whole store; `path` appears when it is complete, and not at all otherwise.

    Args:
        path: the directory to make; it may exist if it is empty.
        samples: consumed once, held one at a time.
        shard_size: samples in one LMDB file.
        provenance: where the data come from; anything that JSON takes.
        edges: the number of edges of a sample, where it is already known.

    Raises:
        FileExistsError: if there is something at `path`.
        ValueError: if a sample is not writable, or there is none.
        OSError: if the disk is full, or the directory cannot be made.
    """
    path = Path(path)
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; it must be at least 1")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; choose another path, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        _write_files(temporary, samples, shard_size, provenance or {}, edges)
        os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_files(
    directory: Path,
    samples: Iterable[Sample],
    shard_size: int,
    provenance: dict[str, Any],
    edges: Callable[[Sample], int],
) -> None:
    summary, shards = Summary(), list[dict[str, Any]]()
    stream = iter(samples)
    waiting = next(stream, None)
    if waiting is None:
        raise ValueError(f"{directory.name}: there are no samples to write")
    while waiting is not None:
        name = f"data.{len(shards):04d}.lmdb"
        with ShardWriter(directory / name) as writer:
            while waiting is not None and writer.num_samples < shard_size:
                writer.add(encode_sample(waiting))
                summary.add(waiting, edges(waiting))
                waiting = next(stream, None)
        file = directory / name
        shards.append(
            {
                "name": name,
                "num_samples": writer.num_samples,
                "bytes": file.stat().st_size,
                "sha256": _digest(file),
            }
        )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "shards": shards,
        "statistics": summary.statistics(),
        "provenance": provenance,
    }
    columns = {name: np.array(summary.columns[name], dtype=dtype) for name, dtype in _COLUMNS.items()}
    np.savez(directory / "metadata.npz", **columns)  # type: ignore[arg-type]
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    for name in ("metadata.npz", "metadata.json"):
        _sync(directory / name)
    _sync(directory)


def _sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------- reading


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

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = _read_metadata(self.path)
        shards = self.metadata["shards"]
        self._files = [self.path / shard["name"] for shard in shards]
        self._ends = np.cumsum([shard["num_samples"] for shard in shards])
        columns = _read_columns(self.path / "metadata.npz", self.metadata["num_samples"])
        self.num_atoms, self.num_edges, self.sid, self.fid = (columns[name] for name in _COLUMNS)
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
                record = transaction.get(_key(within))
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
            if _digest(file) != shard["sha256"]:
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


#: LMDB refuses to open a file twice in one process, so the stores of a process share their environments.
_ENVIRONMENTS: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_OPENED_AS: dict[str, tuple[int, int, int]] = {}  # process, device, inode


def _open_shard(path: Path) -> lmdb.Environment:
    """The environment of one shard, opened at most once in a process."""
    name = str(path.resolve())
    status = path.stat()
    identity = (os.getpid(), status.st_dev, status.st_ino)
    environment = _ENVIRONMENTS.get(name)
    if environment is not None:
        if _OPENED_AS[name] == identity:
            return environment
        # Inherited by fork, or of a file that is no longer there. Closing it here leaves the parent's as it is.
        environment.close()
    try:
        environment = lmdb.open(
            name,
            subdir=False,
            readonly=True,
            lock=False,
            create=False,
            readahead=False,
            meminit=False,
            max_spare_txns=1,
        )
        with environment.begin() as transaction:
            marker = transaction.get(_FORMAT_KEY)
    except lmdb.Error as error:
        raise ValueError(f"{path} is not an LMDB file, or is damaged ({error}); copy or make it again") from error
    if marker is None:
        environment.close()
        raise ValueError(
            f"{path} is an LMDB file, but not of an egnscale store; `egnscale data convert` converts OC20's"
        )
    _ENVIRONMENTS[name], _OPENED_AS[name] = environment, identity
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
            columns = {name: archive[name] for name in _COLUMNS}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); copy or make the store again") from error
    if any(column.shape != (length,) for column in columns.values()):
        raise ValueError(f"{file} does not have {length} entries in each column; copy or make the store again")
    return columns
