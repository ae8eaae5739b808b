"""Whatever ASE reads: databases (`.db`, `.json`), trajectories, extxyz and the other formats of `ase.io.iread`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from egnscale.data.extxyz import frames, parse
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource, Source, from_ase, identity


class AseDatabase(IndexedSource):
    """An ASE database in a file. sid and fid are those of the row's key-value pairs, or its running number and 0.

    Raises:
        ValueError: if the file is not an ASE database.
    """

    kind = "ASE database"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        try:
            database = _connect(path)
            self._ids = [row.id for row in database.select(columns=["id"], include_data=False)]
        except Exception as error:  # sqlite's errors, and whatever a damaged file leads ASE to
            raise ValueError(f"{path} is not an ASE database ({type(error).__name__}: {error})") from error
        self.num_units = len(self._ids)
        self._database: Any = None

    def _read_one(self, i: int) -> Sample:
        where = f"{self.path}: row {self._ids[i]}"
        try:
            if self._database is None:
                self._database = _connect(self.path)
            row = self._database.get(id=self._ids[i])
            atoms = row.toatoms()
            sid, fid = identity(row.key_value_pairs, i, 0)
        except Exception as error:
            raise BadSample(f"{where} cannot be read: {error}", "damaged record") from error
        return from_ase(atoms, where, sid, fid)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_database": None}


def _connect(path: Path) -> Any:
    from ase.db import connect

    return connect(str(path), use_lock_file=False)


class AseFiles(Source):
    """Files that `ase.io.iread` reads; a unit is a file.

    sid and fid are those of `atoms.info`. Without them, the frames of one file have sid 0, 1, ...; of several files,
    sid is the file's number and fid the frame's.

    Raises:
        ValueError: if ASE does not know the format of a file.
    """

    kind = "ASE files"

    def __init__(self, path: Path, files: list[Path]) -> None:
        from ase.io.formats import UnknownFileTypeError, filetype

        self.path = path
        self.files = files
        self.num_units = len(files)
        self._formats = []
        for file in files:
            try:
                self._formats.append(filetype(str(file), guess=False))
            except UnknownFileTypeError:
                raise ValueError(
                    f"{file} is of no known kind: neither a store, an LMDB file of OC20's, an ASE database, nor a file "
                    "that ase.io reads"
                ) from None
            except (OSError, EOFError, ValueError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        for number in range(start, stop):
            file, several = self.files[number], self.num_units > 1
            for frame, atoms in enumerate(self._images(number)):
                where = f"{file}: frame {frame}"
                if isinstance(atoms, BadSample):
                    yield atoms
                    continue
                try:
                    yield from_ase(atoms, where, *((number, frame) if several else (frame, 0)))
                except BadSample as error:
                    yield error

    def _images(self, number: int) -> Iterator[Any]:
        """`ase.Atoms` or BadSample for each frame of a file. Damage between frames ends it."""
        from ase.io import iread

        file, frame = self.files[number], 0
        by_frame = self._formats[number] == "extxyz"
        images: Iterator[Any] = frames(file) if by_frame else iread(str(file), index=":", format=self._formats[number])
        while True:
            try:
                image = next(images, None)
            except Exception as error:  # parsers let anything out that damaged text makes them do
                yield _unreadable(f"{file}: frame {frame} and what follows", error, "damaged file")
                return
            if image is None:
                return
            if by_frame:
                try:
                    image = parse(image)
                except Exception as error:
                    image = _unreadable(f"{file}: frame {frame}", error, "damaged record")
            yield image
            frame += 1


def _unreadable(what: str, error: Exception, kind: str) -> BadSample:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return BadSample(f"{what} cannot be read: {reason}", kind)
