"""Writing the native store; `egnscale.data.store` reads it, docs/data-format.md has the layout.

A store is written into a temporary directory, synchronised and renamed: it is complete or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from egnscale.data.files import sync
from egnscale.data.neighbors import count_edges
from egnscale.data.record import encode_sample
from egnscale.data.sample import Sample

FORMAT = "egnscale-store"
VERSION = 1
#: About 3 GB for OC20's structures. Each open shard is an open file, so there should be hundreds, not thousands.
SHARD_SIZE = 500_000
FORMAT_KEY = b"format"
#: Columns of metadata.npz.
COLUMNS = {"natoms": "int32", "neighbors": "int32", "sid": "int64", "fid": "int64"}
_FIRST_MAP_SIZE = 16 << 20  # bytes; doubled when full
_BATCH_BYTES = 4 << 20  # bytes written in one transaction


def key(i: int) -> bytes:
    """The LMDB key of a shard's i-th record."""
    return b"%08d" % i


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
        self._put(key(self.num_samples), record)
        self.num_samples += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        complete = False
        try:
            if kind is None:
                marker = {"format": FORMAT, "version": VERSION, "num_samples": self.num_samples}
                self._put(FORMAT_KEY, json.dumps(marker).encode())
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
        self.columns = {name: array("q") for name in COLUMNS}
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

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for `extend`."""
        lists = {f"column_{name}": values for name, values in self.columns.items()} | self.energies
        return {name: np.array(values) for name, values in lists.items()} | {
            "forces": np.array(list(self.forces.values()), dtype=np.float64),
            "elements": np.array(sorted(self.elements), dtype=np.int64),
        }

    def extend(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add what another summary's `arrays` hold, as if its samples were added here."""
        for name, column in self.columns.items():
            column.frombytes(arrays[f"column_{name}"].astype(np.int64).tobytes())
        for name, values in self.energies.items():
            values.frombytes(arrays[name].astype(np.float64).tobytes())
        for total, (squares, count, largest) in zip(self.forces.values(), arrays["forces"].tolist(), strict=True):
            total[:] = [total[0] + squares, total[1] + int(count), max(total[2], largest)]
        self.elements.update(arrays["elements"].tolist())

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
        sync(path.parent)
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
        shards.append(describe_shard(directory / name, writer.num_samples))
    write_metadata(directory, shards, summary, provenance)


def describe_shard(file: Path, num_samples: int) -> dict[str, Any]:
    """What `metadata.json` says about a shard."""
    return {"name": file.name, "num_samples": num_samples, "bytes": file.stat().st_size, "sha256": digest(file)}


def write_metadata(directory: Path, shards: list[dict[str, Any]], summary: Summary, provenance: dict[str, Any]) -> None:
    """Make a directory of shards a store: write `metadata.json` and `metadata.npz`, and force them to disk.

    Args:
        shards: from `describe_shard`, in the order of their samples in `summary`.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "shards": shards,
        "statistics": summary.statistics(),
        "provenance": provenance,
    }
    columns = {name: np.array(summary.columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    np.savez(directory / "metadata.npz", **columns)  # type: ignore[arg-type]
    (directory / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    for name in ("metadata.npz", "metadata.json"):
        sync(directory / name)
    sync(directory)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
