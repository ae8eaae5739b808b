"""Read files of `torch.save` as data: nothing in them can run, and nothing is allocated that the file does not hold.

Both formats are read: the zip archive (torch 1.6 and later) and the sequence of pickles before it. What their pickles
may say is in `torch_pickle.py`; what they say of storages is compared with the file. Zip entries must be stored
plainly, lie within the file, not overlap, and have the checksum that the archive says. Tensors are views of the file
mapped into memory, copied on write, so that what is not used is hardly read.
"""

from __future__ import annotations

import mmap
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from egnscale.data.pickle_machine import PickleError, shown
from egnscale.launch.torch_pickle import Storage, plain_reader, reader

#: First pickles of a file in the older format.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: Beyond this many entries an archive is no checkpoint.
_MAX_ENTRIES = 1_000_000


def read_torch_file(path: Path) -> Any:
    """The object in a file of torch.save: dicts, lists, tuples, sets, numbers, strings and tensors.

    OrderedDict, defaultdict and Counter come as dict, devices and paths as str, numpy's scalars as numbers, its arrays
    as tensors, and dtypes and other types as names without further meaning.

    Raises:
        ValueError: one line that says what is wrong with the file, or which name in it is refused.
        OSError: if it cannot be opened.
    """
    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "no ordinary file"
        raise ValueError(f"{path} is {kind}; expected a file of torch.save, such as checkpoint.pt")
    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zipfile, about names that stand twice
            return _read_archive(path, memory) if memory[:2] == b"PK" else _read_legacy(memory)
    except PickleError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:
        # Whatever a damaged file made one of the parsers below trip over.
        detail = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} is damaged, or no file of torch.save ({detail})") from None


# ----------------------------------------------------------------------------------------------------------- archive


def _read_archive(path: Path, memory: mmap.mmap) -> Any:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise PickleError("an entry of the archive stands twice")
    if len(entries) > _MAX_ENTRIES:
        raise PickleError(f"the archive has {len(entries)} entries")
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise PickleError("a zip archive, but not one of torch.save (it has no data.pkl)")
    root = roots[0]
    if f"{root}constants.pkl" in entries:
        raise PickleError("a TorchScript program, which is no checkpoint")
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(_content(memory, order)) != b"little":
        raise PickleError("written on a big-endian machine; save it again on a little-endian one")

    storages: dict[str, Storage] = {}
    total = 0

    def load(dtype: torch.dtype, key: str, numel: int) -> Storage:
        nonlocal total
        if key not in storages:
            entry = entries.get(f"{root}data/{key}")
            if entry is None:
                raise PickleError(f"the archive lacks the storage {shown(key)}")
            if entry.file_size != numel * dtype.itemsize:
                raise PickleError(
                    f"storage {shown(key)} has {entry.file_size} bytes, but {numel} elements of {dtype} were said"
                )
            total += entry.file_size
            if total > len(memory):
                raise PickleError("its storages overlap")
            content = _content(memory, entry)
            storages[key] = Storage(dtype, numel, memory, _start(memory, entry))
            content.release()
        storage = storages[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise PickleError(f"storage {shown(key)} has two types")
        return storage

    content = _content(memory, entries[f"{root}data.pkl"])
    data = bytes(content)
    content.release()
    return reader(data, load).run()


def _start(memory: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """First byte of an entry's content, behind its local header."""
    at = entry.header_offset
    if at < 0 or at + 30 > len(memory) or memory[at : at + 4] != b"PK\3\4":
        raise PickleError(f"entry {shown(entry.filename)} is not where the archive says")
    name, extra = struct.unpack("<HH", memory[at + 26 : at + 30])
    return at + 30 + name + extra


def _content(memory: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry, checked."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise PickleError(f"entry {shown(entry.filename)} is compressed or encrypted, as torch.save never does")
    start = _start(memory, entry)
    if start + entry.file_size > len(memory):
        raise PickleError(f"entry {shown(entry.filename)} reaches beyond the end: the file was cut short")
    content = memoryview(memory)[start : start + entry.file_size]
    if zlib.crc32(content) != entry.CRC:
        content.release()
        raise PickleError(f"entry {shown(entry.filename)} is damaged: its checksum differs from the archive's")
    return content


# ------------------------------------------------------------------------------------------------------ older format


def _read_legacy(memory: mmap.mmap) -> Any:
    """Pickles one after the other: magic, protocol, machine, the object, keys of storages; then the storages."""

    if memory[257:262] == b"ustar":
        raise PickleError("a tar archive; unpack it if it holds a checkpoint (torch.save's tar format is not read)")
    if memory[:1] != b"\x80":
        raise PickleError("not a file of torch.save")
    plain = plain_reader(memory)
    if plain.run() != _LEGACY_MAGIC:
        raise PickleError("a pickle, but not one of torch.save")
    if plain.run() != _LEGACY_PROTOCOL:
        raise PickleError("an unknown version of torch.save's format")
    machine = plain.run()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise PickleError("written on a big-endian machine; save it again on a little-endian one")

    said: dict[str, tuple[torch.dtype, int]] = {}

    def declare(dtype: torch.dtype, key: str, numel: int) -> Storage:
        if said.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise PickleError(f"storage {shown(key)} has two types")
        return Storage(dtype, numel, None)

    # The storages lie behind the object that refers to them: it is stepped through twice.
    first = reader(memory, declare, plain.at)
    first.run()
    rest = plain_reader(memory, first.at)
    keys = rest.run()
    # Not looked up before they are known to be text: hashing a deep tuple overflows the stack.
    if type(keys) is not list or len(keys) != len(said) or any(type(key) is not str or key not in said for key in keys):
        raise PickleError("its list of storages is damaged")
    places: dict[str, Storage] = {}
    end = rest.at
    for key in keys:
        dtype, numel = said[key]
        if end + 8 + numel * dtype.itemsize > len(memory):
            raise PickleError("it was cut short: storages are missing at its end")
        if struct.unpack("<q", memory[end : end + 8])[0] != numel:
            raise PickleError(f"storage {shown(key)} has another length than was said")
        places[key] = Storage(dtype, numel, memory, end + 8)
        end += 8 + numel * dtype.itemsize
    return reader(memory, lambda dtype, key, numel: places[key], plain.at).run()
