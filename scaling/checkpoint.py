"""Checkpoint directories that are whole or absent.

    checkpoints/
        latest                      name of the newest whole checkpoint, replaced by rename
        step_00000200/
            manifest.json           every file with its size and CRC-32; written last
            run.json                configuration, normaliser, position in the data, metrics
            model.safetensors       weights for use (averaged where the run averages), by parameter name, fp32
            training/...            masters and optimizer state, for resuming (`training_state.py`)

A checkpoint is written in a hidden directory beside its place, synced, and renamed; then `latest` is replaced.
Killed anywhere in between, `latest` still names a whole checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

#: 1 held DeepSpeed's own files.
FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def save_checkpoint(
    root: Path,
    name: str,
    write: Callable[[Path], None],
    *,
    is_main: bool,
    agree: Callable[[str], list[str]],
    keep_last: int | None = None,
    keep: Collection[str] = (),
) -> Path:
    """Write one checkpoint. Collective.

    Args:
        root: the `checkpoints` directory.
        name: of the new checkpoint.
        write: called on every rank with the directory to fill.
        is_main: whether this rank does what is done once.
        agree: shares a short text with all ranks and returns everybody's; it also keeps ranks in step.
        keep_last: how many checkpoints to leave (None: all).
        keep: names that are left besides.

    Raises:
        OSError: on every rank, if any rank could not write; the previous checkpoint and `latest` are untouched.
    """
    final, temporary = root / name, root / f".{name}.tmp"

    def attempt(action: Callable[[], Any]) -> None:
        problem = ""
        try:
            action()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = [text for text in agree(problem) if text]
        if problems:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"checkpoint {final} was not written ({problems[0]}); the previous one is untouched")

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob(".*.tmp"):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        temporary.mkdir()

    def publish() -> None:
        _seal(temporary)
        if final.exists():
            _remove(final)
        os.replace(temporary, final)
        _sync(root)
        write_text(root / LATEST, name)
        if keep_last is not None:
            for old in sorted(path for path in root.glob("step_*") if path.is_dir())[:-keep_last]:
                if old.name not in keep:
                    _remove(old)

    attempt(prepare if is_main else lambda: None)
    attempt(lambda: write(temporary))
    attempt(publish if is_main else lambda: None)
    return final


def write_checkpoint(path: Path, write: Callable[[Path], None]) -> None:
    """Write one checkpoint that belongs to no run, by one process: `path` is the checkpoint's own directory.

    Args:
        path: where nothing is yet; its parents are made.
        write: called with the directory to fill.

    Raises:
        ValueError: if something is there.
        OSError: if it could not be written; nothing is left then.
    """
    if path.is_symlink() or path.exists():
        raise ValueError(f"{path} exists already; choose another place, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.is_dir():  # of an attempt that was killed
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        write(temporary)
        _seal(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def whole_checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run up to the latest one, oldest first; none where there is no latest one."""
    if not (root / LATEST).is_file():
        return []
    latest = (root / LATEST).read_text().strip()
    return sorted(path for path in root.glob("step_*") if path.name <= latest and (path / MANIFEST).is_file())


def forget_newer(root: Path, name: str) -> None:
    """Make a checkpoint the latest one, and remove those that are newer. By one process."""
    if (root / LATEST).read_text().strip() != name:
        write_text(root / LATEST, name)
    for path in root.glob("step_*"):
        if path.is_dir() and path.name > name:
            _remove(path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint itself, a `checkpoints` directory, or a run directory.

    Raises:
        ValueError: if there is none there; one line that says what was looked for.
    """
    if (path / MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / LATEST).is_file():
            name = (root / LATEST).read_text().strip()
            if not (root / name / MANIFEST).is_file():
                raise ValueError(f"{root / LATEST} names {name!r}, which is not a whole checkpoint of egnscale")
            return root / name
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: there is no such path")
    raise ValueError(f"{path} is no checkpoint of egnscale, and holds none (no {MANIFEST}, no {LATEST})")


def verify_checkpoint(path: Path, *, checksums: bool = True) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        ValueError: naming the first file that is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, version = manifest["files"], manifest["format"]
    except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path / MANIFEST} cannot be read: {error}") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {version}; this version of egnscale reads format {FORMAT}: "
            "use the version that wrote it, or train anew"
        )
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"checkpoint {path} lacks {name}")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"checkpoint file {file} is damaged: {file.stat().st_size} bytes, expected {expected['bytes']}"
            )
        if checksums and _crc32(file) != expected["crc32"]:
            raise ValueError(f"checkpoint file {file} is damaged: its checksum differs from the manifest")


def _seal(directory: Path) -> None:
    """Write the manifest of what a directory holds, and all of it to disk."""
    contents = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            contents[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
            _sync(path)
    write_text(directory / MANIFEST, json.dumps({"format": FORMAT, "files": contents}, indent=1))
    for path in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        _sync(path)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; killed in between, what is left is hidden and goes with the next one written."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
