"""Convert data of other programs to a native store: in parallel, restartable, holding one structure at a time.

    .OUT.converting/store/data.NNNN.lmdb    shards; one for each part of the source
    .OUT.converting/parts/NNNN.npz          what metadata.json and metadata.npz will say about a shard; written after it
    OUT                                     the finished store, which `store` is renamed to

The source is cut into parts that depend on nothing but the source. A part is converted by one process and kept when it
is complete; whatever kills the conversion, the same command goes on from there and ends with the same bytes, for any
number of workers and ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.building import claim, compare, lock, run_in_pool
from egnscale.data.files import sync
from egnscale.data.neighbors import count_edges
from egnscale.data.ranks import Alone
from egnscale.data.readers import open_source
from egnscale.data.record import encode_sample
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource, Source
from egnscale.data.store_writer import COLUMNS, ShardWriter, Summary, describe_shard, write_metadata

MADE_BY = "egnscale data convert"
#: Parts of a source: hundreds, so that workers share them evenly and a store has not too many files; but not small.
_PARTS = 512
_SMALLEST_PART = 2_000  # structures
#: Messages about structures that were left out which the report repeats.
_EXAMPLES = 5


def convert(
    path: str | Path,
    out: str | Path,
    *,
    workers: int = 1,
    total_energies: bool = False,
    skip_bad: bool = False,
    part_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Alone | None = None,
) -> dict[str, Any]:
    """Make a store of what `open_source` reads, or finish it, or find it finished.

    Args:
        path: the source.
        out: the store to make.
        workers: processes; on each rank.
        total_energies: leave total energies as they are, where a reference is known that would be subtracted.
        skip_bad: leave out structures that cannot be used, and count them; otherwise the first one ends the conversion.
        part_size: structures (files, where structures cannot be reached by number) in one part; chosen by default.
        progress: called with (finished parts, all parts), of this rank.
        ranks: the processes that convert together, on a common file system.

    Returns:
        `path`, `source`, `kind`, `structures`, `skipped` with `count`, `reasons` and `examples`, and `status`: "made"
        or "already there". The same on every rank.

    Raises:
        ValueError: if the source is of no known kind, a structure cannot be used, or `out` was begun with other
            options.
        FileExistsError: if `out` holds something else.
        OSError: if another process converts to `out`, a worker was killed, or the disk is full.
    """
    out, ranks = Path(out), ranks or Alone()
    for name, value in (("workers", workers), ("part_size", part_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    work = out.absolute().with_name(f".{out.absolute().name}.converting")
    with contextlib.ExitStack() as stack:
        there, source = ranks.on_first(
            lambda: _begin(Path(path), out, work, total_energies, skip_bad, part_size, stack)
        )
        if there is not None:
            return there | {"status": "already there"}
        assert source is not None
        parts = _divide(source, part_size)
        try:
            ranks.on_each(lambda: _convert_parts(source, work, parts, workers, skip_bad, progress, ranks))
            report = ranks.on_first(lambda: _finish(source, out, work, len(parts), skip_bad))
        except BaseException:
            if ranks.rank == 0 and not any(work.glob("parts/*.npz")):
                shutil.rmtree(work, ignore_errors=True)
            raise
    return report | {"status": "made"}


def _options(source: Source) -> dict[str, Any]:
    """What the bytes of the store depend on."""
    sizes = [(file.name, file.stat().st_size) for file in source.files]
    return {
        "source": str(source.path.resolve()),
        "kind": source.kind,
        "files": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "names_and_sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16],
        "total_energies": source.total_energies,
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("egnscale", "ase", "numpy")}


def _begin(
    path: Path,
    out: Path,
    work: Path,
    total_energies: bool,
    skip_bad: bool,
    part_size: int | None,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, Any] | None, Source | None]:
    """The report of a finished conversion; or the source, with the lock held and the work folder ready."""
    source = open_source(path, total_energies=total_energies)
    options = _options(source)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        made = _provenance(out)
        if made is None:
            raise FileExistsError(
                f"{out} exists, and is not a converted store; choose another path, or remove it first"
            )
        compare(made, options, f"{out} was made", "choose another path, or remove it")
        if made["skipped"]["count"] and not skip_bad:
            raise ValueError(f"{out} was made with --skip-bad; add it, or choose another path")
        shutil.rmtree(work, ignore_errors=True)  # of a conversion that was killed as it ended
        return _report(out, source, made["structures"], made["skipped"]), None
    work.parent.mkdir(parents=True, exist_ok=True)
    for folder in ("store", "parts"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock(work, out))
    claim(work, options | {"part_size": part_size, "versions": _versions()}, work)
    for stale in [work / "stopped", *work.glob("*.tmp"), *work.glob("*/*.tmp")]:
        stale.unlink(missing_ok=True)
    return None, source


def _provenance(out: Path) -> dict[str, Any] | None:
    """What a converted store at `out` says of its making."""
    try:
        made = json.loads((out / "metadata.json").read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made if isinstance(made, dict) and made.get("made_by") == MADE_BY else None


def _divide(source: Source, part_size: int | None) -> list[tuple[int, int]]:
    """Ranges of units."""
    units = source.num_units
    size = part_size or max(-(-units // _PARTS), _SMALLEST_PART if isinstance(source, IndexedSource) else 1)
    return [(start, min(start + size, units)) for start in range(0, units, size)]


# ---------------------------------------------------------------------------------------------------- converting parts


def _convert_parts(
    source: Source,
    work: Path,
    parts: list[tuple[int, int]],
    workers: int,
    skip_bad: bool,
    progress: Callable[[int, int], None],
    ranks: Alone,
) -> None:
    """Convert this rank's share of the parts that are missing."""
    own = range(ranks.rank, len(parts), ranks.size)
    missing = [i for i in own if not _is_done(work, i, skip_bad)]
    before = len(own) - len(missing)
    progress(before, len(own))
    jobs = [(source, work, i, *parts[i], skip_bad) for i in missing]
    with contextlib.closing(run_in_pool(_convert_part, jobs, workers, lambda job: f"part {job[2]}")) as results:
        try:
            for done, _ in enumerate(results, start=before + 1):
                progress(done, len(own))
                if (work / "stopped").exists():  # another rank failed, and waits for this one
                    return
        except BadSample as error:
            (work / "stopped").touch()
            raise BadSample(f"{error}; --skip-bad leaves such structures out and counts them", error.kind) from error
        except BaseException:
            (work / "stopped").touch()
            raise


def _convert_part(source: Source, work: Path, part: int, start: int, stop: int, skip_bad: bool) -> None:
    """Write one shard, and then what is known of it."""
    file = work / "store" / f"data.{part:04d}.lmdb"
    temporary = work / f"{part:04d}.{os.getpid()}.tmp"
    summary, reasons, examples = Summary(), Counter[str](), list[str]()
    with ShardWriter(temporary) as writer:
        for sample in source.read(start, stop):
            try:
                record, edges = _record(sample)
            except BadSample as error:
                if not skip_bad:
                    raise
                reasons[error.kind] += 1
                if len(examples) < _EXAMPLES:
                    examples.append(str(error))
                continue
            writer.add(record)
            summary.add(sample, edges)  # type: ignore[arg-type]
    os.rename(temporary, file)
    sync(file.parent)
    about = {"shard": describe_shard(file, writer.num_samples), "reasons": reasons, "examples": examples}
    temporary = work / f"{part:04d}.{os.getpid()}.npz.tmp"
    with open(temporary, "wb") as opened:
        np.savez(opened, about=np.array(json.dumps(about)), **summary.arrays())  # type: ignore[arg-type]
        opened.flush()
        os.fsync(opened.fileno())
    os.rename(temporary, _part_file(work, part))


def _record(sample: Sample | BadSample) -> tuple[bytes, int]:
    """A sample's record and number of edges."""
    if isinstance(sample, BadSample):
        raise sample
    try:
        return encode_sample(sample), count_edges(sample)
    except ValueError as error:
        raise BadSample(str(error), "does not fit") from error


def _part_file(work: Path, part: int) -> Path:
    return work / "parts" / f"{part:04d}.npz"


def _load(work: Path, part: int) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """What is known of a finished part; None where it is not finished, or damaged."""
    try:
        with np.load(_part_file(work, part), allow_pickle=False) as archive:
            arrays = dict(archive)
        about = json.loads(str(arrays.pop("about")))
        size = (work / "store" / about["shard"]["name"]).stat().st_size
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (about, arrays) if size == about["shard"]["bytes"] else None


def _is_done(work: Path, part: int, skip_bad: bool) -> bool:
    found = _load(work, part)
    return found is not None and (skip_bad or not found[0]["reasons"])


# ------------------------------------------------------------------------------------------------------------ finishing


def _finish(source: Source, out: Path, work: Path, parts: int, skip_bad: bool) -> dict[str, Any]:
    """Make the shards a store, and give it its name."""
    summary, shards = Summary(), list[dict[str, Any]]()
    reasons, examples = Counter[str](), list[str]()
    for about, arrays in _loaded(work, parts):
        reasons.update(about["reasons"])
        examples += about["examples"]
        if about["shard"]["num_samples"]:
            shards.append(about["shard"])
            summary.extend(arrays)
    skipped = {"count": reasons.total(), "reasons": dict(sorted(reasons.items())), "examples": examples[:_EXAMPLES]}
    if not shards:
        shutil.rmtree(work)
        first = f"; the first: {examples[0]}" if examples else ""
        raise ValueError(f"{source.path} holds no structure that can be used ({skipped['count']} were left out){first}")
    structures = len(summary.columns[next(iter(COLUMNS))])
    store = work / "store"
    kept = {shard["name"] for shard in shards}
    for file in store.iterdir():
        if file.name not in kept:
            file.unlink()
    made_by = {"made_by": MADE_BY, "structures": structures, "skipped": skipped}
    write_metadata(store, shards, summary, made_by | _options(source) | {"versions": _versions()})
    if out.exists():
        out.rmdir()  # it was empty
    os.rename(store, out)
    sync(out.absolute().parent)
    shutil.rmtree(work)
    return _report(out, source, structures, skipped)


def _loaded(work: Path, parts: int) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    for part in range(parts):
        found = _load(work, part)
        if found is None:
            raise OSError(f"{_part_file(work, part)} was damaged while converting; run the same command again")
        yield found


def _report(out: Path, source: Source, structures: int, skipped: dict[str, Any]) -> dict[str, Any]:
    return {
        "path": str(out),
        "source": str(source.path),
        "kind": source.kind,
        "structures": structures,
        "skipped": skipped,
    }
