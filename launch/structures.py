"""Structures that are relaxed or predicted, and what is known of all of them before one is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from egnscale.data.dataset import Dataset
from egnscale.data.sample import Sample
from egnscale.launch.loading import check_elements, open_data
from egnscale.launch.reference import read_atoms


class Structures(Protocol):
    """A data set, or a part of one, or structures of a file. S structures."""

    @property
    def num_atoms(self) -> np.ndarray: ...  # (S,)

    @property
    def sid(self) -> np.ndarray: ...  # (S,)

    @property
    def fid(self) -> np.ndarray: ...  # (S,)

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Sample: ...


class First:
    """The first structures of a data set.

    Args:
        count: at most so many (None: all).
    """

    def __init__(self, store: Dataset, count: int | None) -> None:
        self.store = store
        self._length = len(store) if count is None else min(count, len(store))

    @property
    def num_atoms(self) -> np.ndarray:
        return self.store.num_atoms[: self._length]

    @property
    def sid(self) -> np.ndarray:
        return self.store.sid[: self._length]

    @property
    def fid(self) -> np.ndarray:
        return self.store.fid[: self._length]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int, /) -> Sample:
        if not 0 <= i < self._length:
            raise IndexError(f"these are the first {self._length} structures of {self.store.path}; there is no {i}")
        return self.store[i]


class Listed:
    """Structures that are in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.num_atoms, self.sid, self.fid = (
            np.array([getattr(sample, name) for sample in samples], dtype=np.int64)
            for name in ("num_atoms", "sid", "fid")
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int, /) -> Sample:
        return self._samples[i]


def read_structures(path: Path, num_elements: int) -> Structures:
    """A data set, or the structures of a file that ASE reads.

    A structure's sid is `info["sid"]` where all have different ones, else its number.

    Raises:
        ValueError: naming the first structure that makes no sense, holds an unknown element, or has constraints other
            than fixed atoms.
    """
    if path.is_dir() or path.suffix in (".lmdb", ".aselmdb"):
        store = open_data(path)
        check_elements(path, store, num_elements)
        return store
    structures = read_atoms(path)
    given = [atoms.info.get("sid") for atoms in structures]
    own = all(str(sid).isdigit() for sid in given) and len(set(map(str, given))) == len(given)
    samples = []
    for number, atoms in enumerate(structures):
        where = f"{path}: structure {number}"
        others = [type(one).__name__ for one in atoms.constraints if type(one).__name__ != "FixAtoms"]
        if others:
            raise ValueError(f"{where} has the constraint {others[0]}; only FixAtoms can be kept, remove it")
        if not len(atoms):
            raise ValueError(f"{where} has no atoms")
        sample = Sample.from_atoms(atoms, sid=int(given[number]) if own else number)
        try:
            sample.validate()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        highest = int(sample.atomic_numbers.max())
        if highest > num_elements:
            raise ValueError(f"{where} holds atomic number {highest}; the model knows 1..{num_elements}")
        samples.append(sample)
    return Listed(samples)
