"""What data of other programs look like to the rest of egnscale: structures, or errors that name them.

A source has units: structures where they can be reached by number (`IndexedSource`), files where they cannot. A range
of units is read at once, by whichever process; what comes out does not depend on how the units were divided.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.sample import Sample

#: What no structure has; beyond, a value is taken for damage. Diamond has 0.18 atoms/A^3.
MAX_LENGTH = 1e5  # A
MIN_HEIGHT = 0.5  # A, of a periodic cell
MAX_DENSITY = 2.0  # atoms/A^3
#: What the store's types hold, int8 and float32.
_LARGEST = {"tags": 127, "forces": 3e38}


class BadSample(ValueError):
    """A structure that cannot be used.

    Args:
        message: names the file and the structure; made one line.
        kind: what is wrong, in two or three words; the same for all that fail for the same reason.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(" ".join(message.split()))
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return BadSample, (str(self), self.kind)


class Source(ABC):
    """Structures of another program. Can be pickled; processes open the files for themselves."""

    kind: str  #: what it is, for people
    path: Path
    files: list[Path]
    num_units: int

    @property
    def total_energies(self) -> bool | None:
        """Whether energies are left as they are, although references are known; None where none are known."""
        return None

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        """The structures of the units `start` to `stop`, in order; in place of one that cannot be used, why."""


class IndexedSource(Source):
    """A source that is a map-style data set: `len(source)`, `source[i] -> Sample`."""

    @abstractmethod
    def _read_one(self, i: int) -> Sample:
        """Structure `i`, not validated; raises BadSample."""

    def __len__(self) -> int:
        return self.num_units

    def __getitem__(self, i: int) -> Sample:
        """Structure `i`.

        Raises:
            BadSample: naming the file and the structure, if it cannot be used.
            IndexError: if there is no such structure.
        """
        where = operator.index(i) + (len(self) if i < 0 else 0)
        if not 0 <= where < len(self):
            raise IndexError(f"{self.path} holds {len(self)} structures; there is no number {i}")
        return self._read_one(where)

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        for i in range(start, stop):
            try:
                yield self._read_one(i)
            except BadSample as error:
                yield error


def checked(sample: Sample, where: str) -> Sample:
    """The sample, if it makes physical sense, and if its graph can be built at a reasonable cost.

    Raises:
        BadSample: naming `where` it is from.
    """
    try:
        sample.validate()
    except ValueError as error:
        reason = str(error).removeprefix(f"{sample.name}: ")
        raise BadSample(f"{where}: {reason}", _kind_of(reason)) from None
    for name, value in (("tags", sample.tags), ("forces", sample.forces)):
        if value is not None and value.size and np.abs(value).max() > _LARGEST[name]:
            raise BadSample(
                f"{where}: {name} reach {np.abs(value).max():.3g}, which a store cannot hold", "does not fit"
            )
    # One damaged bit can make an exponent: a cell of 1e-12 A is finite, and has 1e30 images within the cutoff.
    if not sample.num_atoms:
        raise BadSample(f"{where} has no atoms", "no atoms")
    largest = max(np.abs(sample.positions).max(), np.abs(sample.cell).max())
    if largest > MAX_LENGTH:
        raise BadSample(f"{where}: a position or cell vector of {largest:.3g} A", "implausible geometry")
    lengths = np.linalg.norm(sample.cell[sample.pbc], axis=1)
    if sample.pbc.all():
        volume = abs(float(np.linalg.det(sample.cell)))
        sides = np.linalg.norm(np.cross(sample.cell[[1, 2, 0]], sample.cell[[2, 0, 1]]), axis=1)
        lengths = volume / sides
        if sample.num_atoms > MAX_DENSITY * volume:
            raise BadSample(f"{where}: {sample.num_atoms} atoms in a cell of {volume:.3g} A^3", "implausible geometry")
    if len(lengths) and lengths.min() < MIN_HEIGHT:
        raise BadSample(f"{where}: a cell {lengths.min():.3g} A high", "implausible geometry")
    return sample


def _kind_of(reason: str) -> str:
    for words, kind in (("not finite", "values not finite"), (" shape ", "wrong shape"), ("element", "no element")):
        if words in reason:
            return kind
    return "energy not finite" if reason.startswith("energy") else "cell without volume"


def identity(info: dict[str, Any], sid: int, fid: int) -> tuple[int, int]:
    """`sid` and `fid` where `info` has them as integers, the given ones otherwise."""
    found = {name: info[name] for name in ("sid", "fid") if is_id(info.get(name))}
    return int(found.get("sid", sid)), int(found.get("fid", fid))


def is_id(value: Any) -> bool:
    """Whether a value can be a sid or fid: an integer of 64 bits."""
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except TypeError:
        return False


def from_ase(atoms: Any, where: str, sid: int, fid: int) -> Sample:
    """`Sample.from_atoms`, with ids from `atoms.info` if they are there.

    Raises:
        BadSample: if the structure makes no sense.
    """
    try:
        sample = Sample.from_atoms(atoms)
        sid, fid = identity(atoms.info, sid, fid)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadSample(f"{where}: {error}", "damaged record") from error
    return checked(replace(sample, sid=sid, fid=fid), where)
