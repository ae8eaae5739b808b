"""OC20's LMDB files: S2EF directories of shards, IS2RE and IS2RS files.

Keys are "0" .. "n-1", and for some files "length"; values are pickles of `torch_geometric.data.Data`, which
`egnscale.data.restricted_pickle` reads without running them. Edges in the files are ignored: graphs are built anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.lmdb_files import LmdbFiles
from egnscale.data.restricted_pickle import DamagedPickle, RefusedName, load, load_attributes
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource, checked, is_id
from egnscale.data.store_writer import FORMAT_KEY


class OC20Lmdb(IndexedSource):
    """One LMDB file of OC20's, or the shards of a directory in the order of their names.

    Raises:
        ValueError: if a file is no LMDB file, or not one of OC20's.
    """

    kind = "OC20 LMDB"

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self._lmdb = LmdbFiles(files)
        self._ends = np.cumsum([self._count(i) for i in range(len(files))])
        self.num_units = int(self._ends[-1])

    def _count(self, i: int) -> int:
        """Structures in file `i`."""
        file = self.files[i]
        entries = self._lmdb[i].stat()["entries"]
        written = self._lmdb.get(i, b"length")
        count = entries
        if written is not None:
            try:
                count = load(written)
            except ValueError as error:
                raise ValueError(f"{file}: the key `length` is damaged: {error}") from error
            if type(count) is not int:
                raise ValueError(f"{file}: the key `length` holds no number")
            if not 0 <= count <= entries - 1:
                raise ValueError(
                    f"{file}: the key `length` says {count}, but there are {entries} entries; copy or make it again"
                )
        if count and self._lmdb.get(i, b"%d" % (count - 1)) is None:
            if self._lmdb.get(i, FORMAT_KEY) is not None:
                raise ValueError(
                    f"{file} belongs to a store of egnscale; name its directory, which has a metadata.json"
                )
            if self._lmdb.get(i, b"nextid") is not None:
                raise ValueError(f"{file} is an ASE database; rename it to end in .aselmdb")
            raise ValueError(f"{file} is an LMDB file, but not of OC20's: there are no keys 0 to {count - 1}")
        return count

    def _read_one(self, i: int) -> Sample:
        file = int(np.searchsorted(self._ends, i, side="right"))
        within = i - (int(self._ends[file - 1]) if file else 0)
        where = f"{self.files[file]}: structure {within}"
        record = self._lmdb.get(file, b"%d" % within)
        if record is None:
            raise BadSample(f"{where} is missing", "missing record")
        try:
            attributes = load_attributes(record)
        except RefusedName as error:
            raise BadSample(f"{where} was refused: {error}", "refused name") from error
        except DamagedPickle as error:
            raise BadSample(f"{where} cannot be read: {error}", "damaged record") from error
        return sample_of(attributes, where, i)


def sample_of(attributes: dict[str, Any], where: str, index: int) -> Sample:
    """The sample that OC20's attributes describe.

    Args:
        attributes: names and units as in OC20, old (`y`, `force`, `y_relaxed`) or new (`energy`, `forces`,
            `energy_relaxed`). Without `pbc`, the structure is periodic in all directions; without `tags` and `fixed`,
            they are zero.
        where: what error messages call it.
        index: the sid if there is none.

    Raises:
        BadSample: if an attribute is missing, has another shape, or makes no sense.
    """
    read = _Reader(attributes, where)
    numbers = read.integers("atomic_numbers", (-1,), required=True)
    assert numbers is not None
    n = len(numbers)
    stated = read.identity("natoms", n)
    if stated != n:
        raise BadSample(f"{where}: natoms is {stated}, but there are {n} atomic numbers", "wrong shape")
    positions, cell = read.floats("pos", (n, 3), required=True), read.floats("cell", (3, 3), required=True)
    pbc, tags, fixed = (read.integers(*field) for field in (("pbc", (3,)), ("tags", (n,)), ("fixed", (n,))))
    for name, flags in (("pbc", pbc), ("fixed", fixed)):
        if flags is not None and not np.isin(flags, (0, 1)).all():
            raise BadSample(f"{where}: {name} is something else than 0 and 1", "wrong values")
    assert positions is not None
    assert cell is not None
    sample = Sample(
        atomic_numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=np.ones(3, dtype=bool) if pbc is None else pbc.astype(bool),
        tags=np.zeros(n, dtype=np.int64) if tags is None else tags,
        fixed=np.zeros(n, dtype=bool) if fixed is None else fixed.astype(bool),
        sid=read.identity("sid", index),
        fid=read.identity("fid", 0),
        # IS2RE's structures are initial ones: their energy is y_init.
        energy=read.number("energy", "y", "y_init"),
        forces=read.floats("forces", (n, 3), "force"),
        energy_relaxed=read.number("energy_relaxed", "y_relaxed"),
        positions_relaxed=read.floats("pos_relaxed", (n, 3)),
    )
    return checked(sample, where)


class _Reader:
    """Takes attributes out, in the types that a `Sample` has."""

    def __init__(self, attributes: dict[str, Any], where: str) -> None:
        self.attributes = attributes
        self.where = where

    def floats(self, name: str, shape: tuple[int, ...], *others: str, required: bool = False) -> np.ndarray | None:
        """float64 of the given shape; leading axes of length 1, as OC20's cells have, are dropped."""
        array = self._array(name, shape, *others, required=required)
        with np.errstate(invalid="ignore"):  # NaNs of any kind are reported later
            return None if array is None else array.astype(np.float64)

    def integers(self, name: str, shape: tuple[int, ...], required: bool = False) -> np.ndarray | None:
        """int64 of the given shape; OC20 stores atomic numbers and flags as float32."""
        array = self._array(name, shape, required=required)
        if array is None:
            return None
        if array.dtype.kind == "f" and not (np.isfinite(array) & (np.abs(array) < 2**53) & (array % 1 == 0)).all():
            raise BadSample(f"{self.where}: {name} is not made of integers", "wrong values")
        return array.astype(np.int64)

    def number(self, *names: str) -> float | None:
        """The first of the attributes that is there; a number or an array of one."""
        for name in names:
            value = self.attributes.get(name)
            if value is not None:
                array = self._plain(name, value)
                if array.size != 1:
                    raise BadSample(f"{self.where}: {name} has {array.size} values, not one", "wrong shape")
                return float(array.reshape(()))
        return None

    def identity(self, name: str, default: int) -> int:
        """An integer or an array of one; what is something else, such as text, gives the default."""
        value = self.attributes.get(name)
        if isinstance(value, np.ndarray):
            value = value.reshape(-1)[0].item() if value.size == 1 else None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return int(value) if value is not None and is_id(value) else default

    def _array(self, name: str, shape: tuple[int, ...], *others: str, required: bool = False) -> np.ndarray | None:
        found = next((known for known in (name, *others) if self.attributes.get(known) is not None), None)
        if found is None:
            if required:
                raise BadSample(f"{self.where} has no {name}", "missing attribute")
            return None
        array = self._plain(found, self.attributes[found])
        while array.ndim > len(shape) and array.shape[0] == 1:
            array = array[0]
        if array.ndim != len(shape) or any(
            want not in (-1, have) for want, have in zip(shape, array.shape, strict=True)
        ):
            expected = ", ".join("any" if want < 0 else str(want) for want in shape)
            raise BadSample(f"{self.where}: {found} has shape {array.shape}, expected ({expected})", "wrong shape")
        return array

    def _plain(self, name: str, value: Any) -> np.ndarray:
        if isinstance(value, list | tuple):
            # Flat only: lists that hold each other many times would be written out.
            value = np.array(value) if all(type(item) in (int, float, bool) for item in value) else None
        elif isinstance(value, int | float):
            value = np.array(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise BadSample(f"{self.where}: {name} is not made of numbers", "wrong values")
        return value
