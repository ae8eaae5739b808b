"""Build an EMT data set: relax every system, in parallel and restartable, then write the stores.

    OUT/s2ef/{train,val_id,val_ood_ads,val_ood_cat,val_ood_both}/    every frame of every relaxation
    OUT/is2re/{the same}/                                            one structure for each relaxation
    OUT/build.json                                                   options and counts; there when the build is done
    OUT/.build/                                                      finished systems, while it is not

A system is written to OUT/.build as soon as it is relaxed, by rename; whatever kills the build, the next one with
the same options goes on from there and ends with the same bytes, for any number of workers.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.building import claim, compare, lock, run_in_pool
from egnscale.data.emt_relax import MAX_ENERGY, MAX_FORCE, relax_system
from egnscale.data.emt_systems import SPLITS, EmtOptions, Plan, System, plan_systems
from egnscale.data.files import leftovers, replacing
from egnscale.data.neighbors import count_edges
from egnscale.data.record import decode_sample, encode_sample
from egnscale.data.sample import Sample
from egnscale.data.store import write_store

TASKS = ("s2ef", "is2re")


def make_emt(
    out: str | Path,
    options: EmtOptions,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Build the data set at `out`, or finish it, or find it finished.

    Args:
        progress: called with (finished systems, all systems).

    Returns:
        What build.json holds, and `status`: "made" or "already there".

    Raises:
        ValueError: if `out` was begun or made with other options, or a system cannot be relaxed.
        FileExistsError: if `out` holds something else.
        OSError: if another build is at work there, or the disk is full.
    """
    out = Path(out)
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    plan = plan_systems(options)
    finished = out / "build.json"
    if finished.exists():
        report = json.loads(finished.read_text())
        compare(report["options"], _options(options), f"{out} was made", "choose another path, or remove it")
        return report | {"status": "already there"}
    folder = out / ".build"
    if out.exists() and not folder.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not an EMT data set; choose another path")
    (folder / "systems").mkdir(parents=True, exist_ok=True)
    with lock(folder, out):
        claim(folder, _options(options) | {"versions": _versions()}, out)
        _relax_all(folder, plan, options, workers, progress)
        # Stores of a build that was killed here are complete, and cheap to write again.
        for task in TASKS:
            shutil.rmtree(out / task, ignore_errors=True)
        report = _write_stores(out, folder, plan, options)
        for left in leftovers(out):
            left.unlink()
        with replacing(finished) as temporary:
            temporary.write_text(json.dumps(report, indent=1))
        shutil.rmtree(folder)
    return report | {"status": "made"}


def _options(options: EmtOptions) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options)))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("egnscale", "ase", "numpy")}


# ------------------------------------------------------------------------------------------------- relaxing systems


def _relax_all(
    folder: Path, plan: Plan, options: EmtOptions, workers: int, progress: Callable[[int, int], None]
) -> None:
    """Relax the systems that are not in `folder` yet."""
    missing = [system for system in plan.systems if _load(folder, system.sid) is None]
    total = len(plan.systems)
    before = total - len(missing)
    progress(before, total)
    jobs = [(folder, system, options) for system in missing]
    for done, _ in enumerate(run_in_pool(_relax_one, jobs, workers, lambda job: str(job[1])), start=before + 1):
        progress(done, total)


def _relax_one(folder: Path, system: System, options: EmtOptions) -> None:
    """Relax one system and keep the result: records one after the other, the relaxed structure's last."""
    result = relax_system(system, options)
    samples = [*result.frames, result.relaxed]
    records = [encode_sample(sample) for sample in samples]
    with replacing(_system_file(folder, system.sid)) as temporary:
        np.savez(
            temporary,
            records=np.frombuffer(b"".join(records), dtype=np.uint8),
            ends=np.cumsum([len(record) for record in records]),
            edges=np.array([count_edges(sample) for sample in samples]),
            dropped=result.dropped,
            attempts=result.attempts,
            converged=result.converged,
        )


def _system_file(folder: Path, sid: int) -> Path:
    return folder / "systems" / f"{sid:06d}.npz"


def _load(folder: Path, sid: int) -> dict[str, np.ndarray] | None:
    """The arrays of a finished system; None where there is none, or a damaged one (the zip's checksums tell)."""
    try:
        with np.load(_system_file(folder, sid), allow_pickle=False) as archive:
            return dict(archive)
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None


# --------------------------------------------------------------------------------------------------- writing stores


def _write_stores(out: Path, folder: Path, plan: Plan, options: EmtOptions) -> dict[str, Any]:
    """Write OUT/s2ef and OUT/is2re; returns the report of the build."""
    provenance = {
        "made_by": "egnscale data make",
        "calculator": "ase.calculators.emt.EMT",
        "options": _options(options),
        "versions": _versions(),
        "energy_reference": "relaxed clean slab + relaxed gas-phase adsorbate",
        "filters": {"max_energy": MAX_ENERGY, "max_force": MAX_FORCE},
        "held_out_metals": plan.held_out_metals,
        "held_out_adsorbates": plan.held_out_adsorbates,
    }
    report: dict[str, Any] = {
        "options": _options(options),
        "versions": _versions(),
        "held_out_metals": plan.held_out_metals,
        "held_out_adsorbates": plan.held_out_adsorbates,
        "systems": len(plan.systems),
        "frames": 0,
        "dropped_frames": 0,
        "replaced": 0,
        "converged": 0,
        "splits": {},
    }
    for split in SPLITS:
        sids = [system.sid for system in plan.systems if system.split == split]
        if not sids:
            continue
        frames = 0
        for task in TASKS:
            edges: dict[tuple[int, int], int] = {}
            write_store(
                out / task / split,
                _samples(folder, sids, task, edges),
                provenance=provenance | {"split": split, "task": task},
                edges=lambda sample, edges=edges: edges.pop((sample.sid, sample.fid)),  # type: ignore[misc]
            )
        for sid in sids:
            arrays = _load(folder, sid)
            assert arrays is not None
            frames += len(arrays["ends"]) - 1
            report["dropped_frames"] += int(arrays["dropped"])
            report["replaced"] += int(arrays["attempts"]) - 1
            report["converged"] += int(arrays["converged"])
        report["frames"] += frames
        report["splits"][split] = {"systems": len(sids), "frames": frames}
    return report


def _samples(folder: Path, sids: list[int], task: str, edges: dict[tuple[int, int], int]) -> Iterator[Sample]:
    """The samples of some systems, by sid and fid; `edges` learns each one's count before it is yielded."""
    for sid in sids:
        arrays = _load(folder, sid)
        if arrays is None:
            raise OSError(f"{_system_file(folder, sid)} was damaged while building; run the same command again")
        records = np.split(arrays["records"], arrays["ends"][:-1])
        wanted = range(len(records) - 1) if task == "s2ef" else [len(records) - 1]
        for i in wanted:
            sample = decode_sample(records[i].tobytes())
            edges[sample.sid, sample.fid] = int(arrays["edges"][i])
            yield sample
