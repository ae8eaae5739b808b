"""Where relaxations are written: each as soon as it is done, so that whatever kills the process, the next one goes on.

    OUT/relaxed.extxyz           the relaxed structures, in the order of the input, for any tool
    OUT/relaxed_positions.npz    the same in full precision: OC20's is2rs file, and energy, forces, steps, status
    OUT/trajectories/SID.traj    every step of each, as ASE's optimizers write it
    OUT/relax.json               settings and counts; there when all is done
    OUT/.relax/                  finished structures, while it is not

Every file is written beside its place and renamed: whole or not there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egnscale.data.building import claim, compare, lock
from egnscale.data.files import leftovers, replacing
from egnscale.data.sample import Sample
from egnscale.launch.relaxation import Relaxed, Samples
from egnscale.launch.submission import is2rs_predictions

REPORT = "relax.json"
POSITIONS = "relaxed_positions.npz"
STRUCTURES = "relaxed.extxyz"
TRAJECTORIES = "trajectories"


class RelaxationFolder:
    """A directory of relaxations, begun, going on or finished.

    Args:
        path: the directory.
        names: of the structures, each different: what their files are called.
        settings: what decides the results; another run may go on here only with the same.
    """

    def __init__(self, path: Path, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.path, self.names = path, names
        self.settings = json.loads(json.dumps({**settings, "structures": len(names)}))
        self._work = path / ".relax"
        self._held = contextlib.ExitStack()

    @property
    def finished(self) -> bool:
        return (self.path / REPORT).is_file()

    def claim(self) -> None:
        """Begin here, or go on, and keep others out until `release` or the end of the process. By one process.

        Raises:
            ValueError: if what is here was made or begun with other settings.
            FileExistsError: if here is something else.
            OSError: if another process is at work here.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; choose another path")
        if not self.finished:
            if self.path.exists() and not self._work.exists() and any(self.path.iterdir()):
                raise FileExistsError(f"{self.path} exists and holds no relaxations; choose another path")
            self._enter()
            return
        report = json.loads((self.path / REPORT).read_text())
        compare(report["settings"], self.settings, f"{self.path} was made", "choose another path, or remove it")

    def _enter(self) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self._work, self.path, "relaxing into"))
            claim(self._work, self.settings, self.path)
            self._held = stack.pop_all()

    def reopen(self, samples: Samples) -> None:
        """Let what failed in a finished directory be tried again; the others are kept. By one process, after `claim`.

        Raises:
            ValueError: as `read`.
            OSError: if another process is at work here.
        """
        if not self.finished or not json.loads((self.path / REPORT).read_text())["failed"]:
            return
        self._enter()
        for relaxed in self.read(samples):
            if relaxed.status != "failed":
                self.save(relaxed)
        # Until here it was finished, from here on it is begun: killed in between, the next one finds the one or other.
        (self.path / REPORT).unlink()

    def release(self) -> None:
        """Let others in."""
        self._held.close()

    def save(self, relaxed: Relaxed) -> None:
        """Keep a finished structure, and its trajectory if it has one."""
        if relaxed.frames:
            write_trajectory(self.path / TRAJECTORIES / f"{self.names[relaxed.index]}.traj", relaxed)
        with replacing(self._file(relaxed.index)) as temporary:
            arrays: dict[str, Any] = {**_arrays(relaxed), "start": _fingerprint(relaxed.sample)}
            np.savez(temporary, **arrays)

    def load(self, index: int, sample: Sample, *, failures: bool = False) -> Relaxed | None:
        """A structure that was relaxed here before; None if there is none, or it failed: that is tried again.

        Args:
            failures: return those too.
        """
        try:
            with np.load(self._file(index), allow_pickle=False) as archive:
                arrays = dict(archive)
        except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        if arrays.pop("start") != _fingerprint(sample) or (str(arrays["status"]) == "failed" and not failures):
            return None
        return _relaxed(index, sample, arrays)

    def _file(self, index: int) -> Path:
        return self._work / "structures" / f"{self.names[index]}.npz"

    def finish(self, samples: Samples) -> None:
        """Write everything down in the order of the input. By one process, when all structures were saved.

        Raises:
            OSError: if one is missing or damaged.
        """
        import ase.io

        ordered = []
        for index, name in enumerate(self.names):
            relaxed = self.load(index, samples[index], failures=True)
            if relaxed is None:
                raise OSError(f"{self._file(index)} of structure {name} is damaged; run the same command again")
            ordered.append(relaxed)
        columns = [_arrays(relaxed) for relaxed in ordered]
        arrays = is2rs_predictions(
            [relaxed.sample.sid for relaxed in ordered], [relaxed.positions for relaxed in ordered]
        )
        arrays |= {
            "start": np.array([_fingerprint(relaxed.sample) for relaxed in ordered], dtype=np.int64),
            "fids": np.array([relaxed.sample.fid for relaxed in ordered], dtype=np.int64),
            "forces": np.concatenate([np.zeros((0, 3)), *(column["forces"] for column in columns)]),
            **{
                name: np.array([column[name] for column in columns]) for name in ("energy", "steps", "status", "reason")
            },
        }
        with replacing(self.path / POSITIONS) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        with replacing(self.path / STRUCTURES) as temporary:
            ase.io.write(temporary, [to_atoms(relaxed) for relaxed in ordered], format="extxyz")
        for left in (*leftovers(self.path / TRAJECTORIES), *leftovers(self.path)):  # by processes that were killed
            left.unlink()
        report = {"settings": self.settings, **summary(ordered, self.names)}
        with replacing(self.path / REPORT) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        shutil.rmtree(self._work, ignore_errors=True)

    def read(self, samples: Samples) -> list[Relaxed]:
        """What a finished directory holds, given the structures that it was made from.

        Raises:
            ValueError: if a file is damaged, or the structures are others.
        """
        file = self.path / POSITIONS
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} cannot be read: {error}; remove {self.path} and relax again") from None
        positions = np.split(arrays["pos"], arrays["chunk_idx"])
        forces = np.split(arrays["forces"], arrays["chunk_idx"])
        results = []
        for index, name in enumerate(arrays["ids"].tolist()):
            sample = samples[index]
            if str(sample.sid) != name or arrays["start"][index] != _fingerprint(sample):
                raise ValueError(f"{self.path} was made from other structures than these; choose another path")
            own = {column: arrays[column][index] for column in ("energy", "steps", "status", "reason")}
            results.append(_relaxed(index, sample, {**own, "pos": positions[index], "forces": forces[index]}))
        return results


def names_of(where: Path, sids: np.ndarray, fids: np.ndarray) -> list[str]:
    """What structures are called in files: their sid, or sid_fid where a system has several frames.

    Args:
        where: what an error message begins with.

    Raises:
        ValueError: if two structures have the same of both.
    """
    names = [str(sid) for sid in sids.tolist()]
    if len(set(names)) < len(names):
        names = [f"{sid}_{fid}" for sid, fid in zip(sids.tolist(), fids.tolist(), strict=True)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: two structures are called {twice[0]} (sid_fid); give each ids of its own")
    return names


def summary(results: Sequence[Relaxed], names: Sequence[str]) -> dict[str, Any]:
    """Counts, and who failed."""
    status = Counter(relaxed.status for relaxed in results)
    return {
        "structures": len(results),
        "converged": status["converged"],
        "step_limit": status["step limit"],
        "failed": {names[relaxed.index]: relaxed.reason for relaxed in results if relaxed.status == "failed"},
        "steps": sum(relaxed.steps for relaxed in results),
    }


def to_atoms(relaxed: Relaxed) -> Any:
    """The relaxed structure as `ase.Atoms`, with what is known of it in its info."""
    from dataclasses import replace

    # ASE keeps no results of which a part is missing, and its writers none that are not finite.
    atoms = replace(
        relaxed.sample, positions=relaxed.positions, energy=relaxed.energy, forces=relaxed.forces
    ).to_atoms()
    atoms.info |= {
        "sid": relaxed.sample.sid,
        "fid": relaxed.sample.fid,
        "converged": relaxed.status == "converged",
        "steps": relaxed.steps,
        "status": relaxed.status,
    }
    if relaxed.reason:
        atoms.info["reason"] = relaxed.reason
    return atoms


def write_trajectory(path: Path, relaxed: Relaxed) -> None:
    """Every step as ASE's optimizers write it: positions, energy and unconstrained forces."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io.trajectory import TrajectoryWriter

    with replacing(path) as temporary:
        atoms = to_atoms(relaxed)
        atoms.info = {"sid": relaxed.sample.sid}
        writer = TrajectoryWriter(str(temporary), "w")
        try:
            for frame in relaxed.frames:
                atoms.set_positions(frame.positions, apply_constraint=False)
                atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=frame.forces)
                writer.write(atoms)
        finally:
            writer.close()


def _arrays(relaxed: Relaxed) -> dict[str, np.ndarray]:
    nothing = np.full_like(relaxed.positions, np.nan)
    return {
        "pos": relaxed.positions,
        "energy": np.array(np.nan if relaxed.energy is None else relaxed.energy),
        "forces": nothing if relaxed.forces is None else relaxed.forces,
        "steps": np.array(relaxed.steps),
        "status": np.array(relaxed.status),
        "reason": np.array(relaxed.reason),
    }


def _relaxed(index: int, sample: Sample, arrays: Mapping[str, np.ndarray]) -> Relaxed:
    known = bool(np.isfinite(arrays["energy"]))
    return Relaxed(
        index=index,
        sample=sample,
        positions=arrays["pos"],
        energy=float(arrays["energy"]) if known else None,
        forces=arrays["forces"] if known else None,
        steps=int(arrays["steps"]),
        status=str(arrays["status"]),  # type: ignore[arg-type]
        reason=str(arrays["reason"]),
    )


def _fingerprint(sample: Sample) -> int:
    """Of where a relaxation begins: CRC-32."""
    content = (sample.atomic_numbers, sample.positions, sample.cell, sample.pbc, sample.fixed)
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in content))
