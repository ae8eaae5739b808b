"""`open_source`: recognises what a path is, and opens it for reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from egnscale.data.ase_files import AseDatabase, AseFiles
from egnscale.data.aselmdb import AseLmdb
from egnscale.data.lmdb_files import is_lmdb
from egnscale.data.oc20 import OC20Lmdb
from egnscale.data.oc20_raw import SUFFIXES, OC20Raw, labels_of
from egnscale.data.source import Source

#: What a directory can hold, by the ends of the names. Of several kinds in one directory, none is chosen.
_IN_DIRECTORIES: dict[str, tuple[str, ...]] = {
    "lmdb": (".lmdb",),
    "aselmdb": (".aselmdb",),
    "extxyz": (*SUFFIXES, ".xyz", ".xyz.xz"),
    "traj": (".traj",),
}


def open_source(path: str | Path, *, total_energies: bool = False) -> Source:
    """Open data of another program.

    Args:
        path: an LMDB file of OC20's or a directory of them; `.aselmdb`, likewise; OC20's extxyz + txt pairs, likewise;
            an ASE database; a file that ASE reads, or a directory of `.traj` or `.extxyz`.
        total_energies: leave total energies as they are, where a reference is known that would be subtracted.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it is of no known kind, damaged, or `total_energies` means nothing for it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    source = _open_directory(path, total_energies) if path.is_dir() else _open_file(path, total_energies)
    if total_energies and source.total_energies is None:
        raise ValueError(f"{path} ({source.kind}) holds no reference energies: --total-energies means nothing for it")
    if not source.num_units:
        raise ValueError(f"{path} ({source.kind}) holds no structures")
    return source


def holds_sources(directory: Path) -> bool:
    """Whether `open_source` finds files of a known kind in a directory."""
    return any(file.name.endswith(_ALL_ENDS) and not file.name.startswith(".") for file in directory.iterdir())


def _open_file(path: Path, total_energies: bool) -> Source:
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    if path.name.endswith(".aselmdb"):
        return AseLmdb(path, [path])
    if path.name.endswith(".lmdb") or is_lmdb(path):
        return OC20Lmdb(path, [path])
    if path.name.endswith(SUFFIXES) and labels_of(path) is not None:
        return OC20Raw(path, [path], total_energies)
    if path.suffix in (".db", ".json"):
        return AseDatabase(path)
    return AseFiles(path, [path])


def _open_directory(path: Path, total_energies: bool) -> Source:
    if (path / "metadata.json").exists():
        raise ValueError(f"{path} is a store of egnscale already")
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    found = {
        kind: some for kind, ends in _IN_DIRECTORIES.items() if (some := [f for f in files if f.name.endswith(ends)])
    }
    if len(found) > 1:
        names = ", ".join(some[0].name for some in found.values())
        raise ValueError(
            f"{path} holds files of several kinds ({names}); name one file, or make one directory for each"
        )
    if not found:
        below = sorted(
            folder.name
            for folder in path.iterdir()
            if folder.is_dir() and any(file.name.endswith(_ALL_ENDS) for file in folder.iterdir())
        )
        hint = f"; name one of the directories in it: {', '.join(below[:8])}" if below else ""
        raise ValueError(f"{path} holds no structures in files ({', '.join(_ALL_ENDS)}){hint}")
    ((kind, some),) = found.items()
    if kind == "extxyz":
        pairs = [file for file in some if file.name.endswith(SUFFIXES) and labels_of(file) is not None]
        if pairs and len(pairs) < len(some):
            alone = next(file for file in some if file not in pairs)
            raise ValueError(f"{alone} has no .txt beside it, unlike {pairs[0].name}; copy it, or name one file")
        return OC20Raw(path, pairs, total_energies) if pairs else AseFiles(path, some)
    opened: dict[str, Callable[[Path, list[Path]], Source]] = {"lmdb": OC20Lmdb, "aselmdb": AseLmdb, "traj": AseFiles}
    return opened[kind](path, some)


_ALL_ENDS = tuple(end for ends in _IN_DIRECTORIES.values() for end in ends)
