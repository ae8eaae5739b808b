"""Frames of extxyz files, one at a time, so that a damaged one costs itself and no more.

ASE's reader parses a frame; cutting a file into frames is done here, with bounds on what a damaged number can ask for.
"""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

#: Longest line, most atoms and most text of a frame, before a file counts as damaged.
_MAX_LINE = 1 << 20
_MAX_ATOMS = 1 << 20
_MAX_FRAME = 1 << 28


def open_text(file: Path) -> TextIO:
    """Open a text file for reading; `.xz`, `.gz` and `.bz2` are decompressed."""
    from ase.io.formats import open_with_compression

    return open_with_compression(str(file), "rt")


def frames(file: Path) -> Generator[str, None, None]:
    """The text of each frame.

    Raises:
        ValueError: where it does not go on as it should; OSError, EOFError and the decompressors' errors likewise.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(open_text(file))
        while (first := stream.readline(_MAX_LINE)).strip():
            if not first.strip().isdecimal() or not 1 <= int(first.strip()[:10]) <= _MAX_ATOMS:
                raise ValueError(f"{first.strip()[:30]!r} is not a number of atoms")
            lines, size = [first], 0
            for _ in range(int(first) + 1):
                lines.append(stream.readline(_MAX_LINE))
                size += len(lines[-1])
                if not lines[-1] or size > _MAX_FRAME:
                    raise ValueError("it is cut short" if size <= _MAX_FRAME else "it is too large")
            yield "".join(lines)


def parse(frame: str) -> Any:
    """The `ase.Atoms` of one frame; whatever error damaged text leads ASE to."""
    from ase.io.extxyz import read_xyz

    (atoms,) = read_xyz(io.StringIO(frame), index=slice(None))
    return atoms
