"""LMDB files opened for reading: without locks, once in a process, and again after a fork."""

from __future__ import annotations

import os
from pathlib import Path
from weakref import WeakValueDictionary

import lmdb

#: LMDB refuses to open a file twice in one process, so all readers of a process share its environment.
_ENVIRONMENTS: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_OPENED_AS: dict[str, tuple[int, int, int]] = {}  # process, device, inode
#: Bytes 16 to 19 of the first page, little-endian.
_MAGIC = 0xBEEFC0DE


def is_lmdb(path: Path) -> bool:
    """Whether a file begins as LMDB files do."""
    with open(path, "rb") as file:
        return int.from_bytes(file.read(20)[16:], "little") == _MAGIC


def open_environment(path: Path) -> lmdb.Environment:
    """The environment of one LMDB file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no LMDB file, or is cut short.
    """
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
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise ValueError(f"{path} is not an LMDB file, or is damaged ({error}); copy or make it again") from error
    if status.st_size < needed:
        # Reading a page that is mapped but not in the file would end the process.
        environment.close()
        raise ValueError(f"{path} has {status.st_size} bytes, its pages need {needed}: it is cut short; copy it again")
    _ENVIRONMENTS[name], _OPENED_AS[name] = environment, identity
    return environment


class LmdbFiles:
    """The environments of some files, opened where they are first used, once for each process.

    Cheap to pickle and safe to fork.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._opened: dict[int, lmdb.Environment] = {}
        self._pid = -1

    def __getitem__(self, i: int) -> lmdb.Environment:
        if self._pid != os.getpid():
            self._opened, self._pid = {}, os.getpid()
        environment = self._opened.get(i)
        if environment is None:
            environment = self._opened[i] = open_environment(self.files[i])
        return environment

    def get(self, i: int, key: bytes) -> bytes | None:
        """A copy of one value; None where there is none.

        Raises:
            ValueError: if the file cannot be read.
        """
        try:
            with self[i].begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise ValueError(f"{self.files[i]} is damaged ({error}); copy it again") from error

    def __getstate__(self) -> dict[str, object]:
        return {"files": self.files, "_opened": {}, "_pid": -1}
