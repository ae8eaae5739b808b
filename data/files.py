"""Files that are whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.[^.]+)?")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there is synchronised and takes its place at the end.

        with replacing(out) as temporary:
            temporary.write_text("...")

    Several processes may write the same path: the last one wins. Where the block raises, nothing is left; of a process
    that is killed in it, `leftovers` finds what is left.

    Raises:
        OSError: where the directory cannot be made, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose their format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def leftovers(directory: Path) -> list[Path]:
    """Temporary files that processes were writing in a directory, or had been when they were killed."""
    if not directory.is_dir():
        return []
    return sorted(file for file in directory.iterdir() if _TEMPORARY.fullmatch(file.name))


def sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
