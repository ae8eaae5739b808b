"""`open_dataset`: a store, or data of another program read where they are, as one map-style data set.

Reading OC20's LMDB files directly saves the conversion and its disk space. What training wants to know beforehand, the
size of every structure and the spread of energies and forces, is in no file of OC20's; only the sizes may be in a
metadata.npz beside them. What is missing is found by reading structures once, and kept: beside the data, or where that
cannot be written to, in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from egnscale.data.files import replacing
from egnscale.data.neighbors import count_edges
from egnscale.data.readers import holds_sources, open_source
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource
from egnscale.data.store import Store
from egnscale.data.store_writer import COLUMNS, Summary

#: Structures that statistics are made of where metadata.npz has the sizes: enough for a mean within 1 % of the spread.
SAMPLED = 10_000
#: What is kept: columns and sums of the structures that were read, and the ids of all.
_SIZES, _IDS = "egnscale-sizes.npz", "egnscale-ids.npz"

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    pass


class Dataset(Protocol):
    """What training, evaluation and `egnscale data info` use of a data set."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> dict[str, Any]: ...

    @property
    def num_atoms(self) -> np.ndarray: ...

    @property
    def num_edges(self) -> np.ndarray: ...

    @property
    def ids_known(self) -> bool: ...  #: whether `sid` and `fid` are there without reading every structure

    @property
    def sid(self) -> np.ndarray: ...

    @property
    def fid(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample: ...

    def verify(self) -> None: ...


def open_dataset(path: str | Path, *, progress: Progress = _silent) -> Dataset:
    """Open a store, OC20's LMDB files, `.aselmdb` files or an ASE database.

    Args:
        progress: called with (structures read, structures to read) where the structures have to be read once.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if what is there is damaged, or cannot be read in any order.
    """
    path = Path(path)
    if path.is_dir() and ((path / "metadata.json").exists() or not holds_sources(path)):
        return Store(path)
    source = open_source(path)
    if not isinstance(source, IndexedSource):
        raise ValueError(
            f"{path} ({source.kind}) can only be read from start to end; "
            f"`egnscale data convert {path} OUT` makes a store of it"
        )
    return ForeignDataset(source, progress)


class First:
    """The first structures of a data set, as one; statistics stay those of the whole."""

    def __init__(self, whole: Dataset, count: int) -> None:
        self.whole, self.count = whole, min(count, len(whole))
        self.path, self.metadata, self.ids_known = whole.path, whole.metadata, whole.ids_known

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Sample:
        if not -self.count <= i < self.count:
            raise IndexError(f"structure {i} of {self.count}")
        return self.whole[i % self.count]

    @property
    def num_atoms(self) -> np.ndarray:
        return self.whole.num_atoms[: self.count]

    @property
    def num_edges(self) -> np.ndarray:
        return self.whole.num_edges[: self.count]

    @property
    def sid(self) -> np.ndarray:
        return self.whole.sid[: self.count]

    @property
    def fid(self) -> np.ndarray:
        return self.whole.fid[: self.count]

    def verify(self) -> None:
        self.whole.verify()


class ForeignDataset:
    """Data of another program with what a `Store` knows: sizes and statistics.

    Cheap to pickle and safe to fork.

    Args:
        source: where the structures are.
        progress: called with (structures read, structures to read).

    Raises:
        ValueError: if a structure that has to be read cannot be used.
    """

    num_atoms: np.ndarray  #: (S,) int32, atoms of each structure
    num_edges: np.ndarray  #: (S,) int32, edges of each structure's OC20 graph

    def __init__(self, source: IndexedSource, progress: Progress = _silent) -> None:
        self._source = source
        self.path = source.path
        sizes = _given_sizes(source)
        numbers = range(len(source)) if sizes is None else _spread(len(source))
        with _one_at_a_time(source.path):
            known = _kept(source, _SIZES, len(numbers))
            if known is None:
                known = _scan(source, numbers, progress)
                _keep(source, _SIZES, known)
        summary = Summary()
        summary.extend(known)
        read = _columns(known)
        if sizes is None:
            self.num_atoms, self.num_edges = read["natoms"], read["neighbors"]
        else:
            self.num_atoms, edges = sizes
            if edges is None:
                edges = np.rint(self.num_atoms * (read["neighbors"].sum() / read["natoms"].sum())).astype(np.int32)
            self.num_edges = edges
        all_read = known if len(read["sid"]) == len(source) else _kept(source, _IDS, len(source))
        self._ids = None if all_read is None else _ids_of(all_read)
        self._progress = progress
        self.metadata: dict[str, Any] = {
            "num_samples": len(source),
            "shards": [{"name": file.name, "bytes": file.stat().st_size} for file in source.files],
            "statistics": summary.statistics(),
            "provenance": {"kind": source.kind, "statistics_of": len(known["column_natoms"])},
        }

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> Sample:
        return self._source[i]

    @property
    def ids_known(self) -> bool:
        """Whether `sid` and `fid` are there without reading every structure."""
        return self._ids is not None

    @property
    def sid(self) -> np.ndarray:
        """(S,) int64; reads every structure where ids are not known."""
        return self._read_ids()["sid"]

    @property
    def fid(self) -> np.ndarray:
        """(S,) int64; reads every structure where ids are not known."""
        return self._read_ids()["fid"]

    def verify(self) -> None:
        """Read every structure; ids are known then.

        Raises:
            ValueError: naming the first that cannot be used.
        """
        read = _scan(self._source, range(len(self)), self._progress, edges=_not_counted)
        if self._ids is None:
            self._ids = _ids_of(read)
            _keep(self._source, _IDS, {f"column_{name}": ids for name, ids in self._ids.items()})

    def _read_ids(self) -> dict[str, np.ndarray]:
        if self._ids is None:
            with _one_at_a_time(self.path):
                kept = _kept(self._source, _IDS, len(self))
                if kept is None:
                    self.verify()
                else:
                    self._ids = _ids_of(kept)
        assert self._ids is not None
        return self._ids

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_progress": _silent}  # what shows progress may hold a terminal


def _ids_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: arrays[f"column_{name}"].astype(COLUMNS[name]) for name in ("sid", "fid")}


def _not_counted(sample: Sample) -> int:
    return 0


def _columns(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: arrays[f"column_{name}"].astype(dtype) for name, dtype in COLUMNS.items()}


def _spread(count: int) -> Sequence[int]:
    """Up to `SAMPLED` numbers of structures, evenly spread."""
    if count <= SAMPLED:
        return range(count)
    return np.linspace(0, count - 1, SAMPLED).astype(np.int64).tolist()


def _scan(
    source: IndexedSource,
    numbers: Sequence[int],
    progress: Progress,
    edges: Callable[[Sample], int] = count_edges,
) -> dict[str, np.ndarray]:
    """`Summary.arrays` of some structures."""
    summary = Summary()
    for done, i in enumerate(numbers):
        if done % 100 == 0:
            progress(done, len(numbers))
        try:
            sample = source[i]
        except BadSample as error:
            raise ValueError(
                f"{error}; `egnscale data convert --skip-bad` makes a store without such structures"
            ) from error
        summary.add(sample, edges(sample))
    progress(len(numbers), len(numbers))
    return summary.arrays()


# ------------------------------------------------------------------------------------------------ files beside the data


def _given_sizes(source: IndexedSource) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Atoms, and edges where they are there, from a metadata.npz beside the data."""
    directory = source.path.is_dir()
    file = (source.path if directory else source.path.parent) / "metadata.npz"
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as archive:
            atoms = archive["natoms"]
            edges = archive.get("neighbors")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and sizes are found anew") from error
    for column in (atoms, edges):
        if column is not None and (column.shape != (len(source),) or column.dtype.kind not in "iu"):
            if not directory:
                return None  # it describes all files of the directory, and this is one of them
            raise ValueError(f"{file} does not have {len(source)} sizes; remove it, and sizes are found anew")
    return atoms.astype(np.int32), None if edges is None else edges.astype(np.int32)


def _places(source: IndexedSource, name: str) -> list[Path]:
    """Where something of this name is kept: beside the data, else in the user's cache directory."""
    beside = source.path / name if source.path.is_dir() else source.path.with_name(f"{source.path.name}.{name}")
    try:
        key = hashlib.sha256(f"{source.path.resolve()} {_fingerprint(source)}".encode()).hexdigest()
        return [beside, _cache_directory() / f"{key[:32]}.{name}"]
    except RuntimeError:
        return [beside]


def _cache_directory() -> Path:
    """Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "egnscale"


def _fingerprint(source: IndexedSource) -> str:
    """Changes when the files do."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return hashlib.sha256(json.dumps([1, files]).encode()).hexdigest()


def _kept(source: IndexedSource, name: str, count: int) -> dict[str, np.ndarray] | None:
    """What an earlier reading of at least `count` structures has kept."""
    for file in _places(source, name):
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            if str(arrays.pop("fingerprint")) == _fingerprint(source) and len(arrays["column_sid"]) >= count:
                return arrays
    return None


def _keep(source: IndexedSource, name: str, arrays: dict[str, np.ndarray]) -> None:
    """Write it down, whole or not at all. That there is no place that can be written to is no error."""
    for file in _places(source, name):
        with contextlib.suppress(OSError):
            with replacing(file) as temporary:
                np.savez(temporary, fingerprint=np.array(_fingerprint(source)), **arrays)  # type: ignore[arg-type]
            return


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """The ranks of a run open their data at once: one reads the structures, the others wait for what it keeps."""
    with contextlib.ExitStack() as stack:
        # Some file systems have no locks, or none for those who may only read: then those of the cache directory.
        with contextlib.suppress(OSError, RuntimeError):
            try:
                _lock(stack, path if path.is_dir() else path.parent)
            except OSError:
                _cache_directory().mkdir(parents=True, exist_ok=True)
                _lock(stack, _cache_directory())
        yield


def _lock(stack: contextlib.ExitStack, directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
