"""Many relaxations at once give what one after the other gives, and survive what can happen to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixedPlane
from ase.optimize import LBFGS as AseLBFGS
from toy import energies_only, make_dataset, make_relaxed_dataset, slab, write_config

from egnscale.data.sample import Sample
from egnscale.launch import Calculator
from egnscale.launch.cli import main
from egnscale.launch.relax_work import share_of
from egnscale.launch.relaxation import LBFGSOptions, Potential, Relaxed, RelaxOptions, relax
from egnscale.launch.relaxation_folder import RelaxationFolder, names_of
from egnscale.launch.run_files import load_trained
from egnscale.launch.structures import First, Listed


def structures(count: int) -> list[Sample]:
    made = []
    for index in range(count):
        size = ((2, 2, 3), (2, 2, 4), (3, 2, 3))[index % 3]
        atoms = slab(("Cu", "Pt", "Ag", "Ni")[index % 4], size, seed=index)
        made.append(Sample.from_atoms(atoms, sid=100 + index))
    return made


class Emt:
    """ASE's EMT as a model; counts, and fails where it is told to."""

    def __init__(self, *, memory: int = 10**9, bad: dict[int, int] | None = None) -> None:
        self.memory, self.bad = memory, bad or {}
        self.batches: list[int] = []
        self.evaluations: dict[int, int] = {}
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        if sum(sample.num_atoms for sample in samples) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        energies, forces = [], []
        for sample in samples:
            atoms = Atoms(sample.atomic_numbers, sample.positions, cell=sample.cell, pbc=sample.pbc, calculator=EMT())
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
            with self._lock:
                step = self.evaluations[sample.sid] = self.evaluations.get(sample.sid, -1) + 1
            if step >= self.bad.get(sample.sid, 10**9):
                forces[-1][0, 0] = np.nan
        with self._lock:
            self.batches.append(len(samples))
            self.threads.add(threading.current_thread().name)
        return torch.tensor(energies, dtype=torch.float64), torch.from_numpy(np.concatenate(forces))


def one_by_one(sample: Sample, options: RelaxOptions) -> tuple[Atoms, int, bool]:
    atoms = sample.to_atoms()
    atoms.calc = EMT()
    optimizer = AseLBFGS(atoms, logfile=None, **asdict(options.optimizer))
    converged = optimizer.run(fmax=options.fmax, steps=options.steps)
    return atoms, optimizer.nsteps, bool(converged)


OPTIONS = RelaxOptions(fmax=0.1, steps=40, optimizer=LBFGSOptions(maxstep=0.2))


def by_index(results: Sequence[Relaxed]) -> list[Relaxed]:
    return sorted(results, key=lambda relaxed: relaxed.index)


@pytest.mark.parametrize(
    "how",
    [{}, {"batch_size": 3}, {"max_atoms": 30}, {"lanes": 3, "batch_size": 6}, {"order": [7, 2, 5, 0, 1, 3, 4, 6]}],
    ids=["all", "streaming", "few atoms", "lanes", "order"],
)
def test_agrees_with_ase_one_by_one(how: dict) -> None:
    samples = structures(8)
    results = by_index(list(relax(samples, Emt(), OPTIONS, keep_frames=True, **how)))
    assert [relaxed.index for relaxed in results] == list(range(8))
    assert {relaxed.status for relaxed in results} == {"converged", "step limit"}, "the case must have both"
    for sample, relaxed in zip(samples, results, strict=True):
        atoms, steps, converged = one_by_one(sample, OPTIONS)
        assert (relaxed.steps, relaxed.status == "converged") == (steps, converged)
        assert np.abs(relaxed.positions - atoms.positions).max() < 1e-6
        assert relaxed.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        assert np.array_equal(relaxed.positions[sample.fixed], sample.positions[sample.fixed])
        # Every step is there, the first and the last included, with the forces of fixed atoms.
        assert len(relaxed.frames) == steps + 1
        assert np.array_equal(relaxed.frames[0].positions, sample.positions)
        assert np.array_equal(relaxed.frames[-1].positions, relaxed.positions)
        assert np.array_equal(relaxed.frames[-1].forces, relaxed.forces)
        assert relaxed.largest_force == pytest.approx(np.linalg.norm(atoms.get_forces(), axis=1).max(), abs=1e-6)


def test_the_batch_is_kept_full() -> None:
    """Those that are done make room at once."""
    emt = Emt()
    results = list(relax(structures(9), emt, OPTIONS, batch_size=4))
    assert len(results) == 9
    # In order of finishing, not of input; and the batch shrinks only when the queue is empty.
    assert [relaxed.index for relaxed in results] != list(range(9))
    last_full = max(i for i, size in enumerate(emt.batches) if size == 4)
    assert all(size == 4 for size in emt.batches[:last_full])
    assert emt.batches[last_full:] == sorted(emt.batches[last_full:], reverse=True)
    assert sum(emt.batches) == sum(relaxed.steps + 1 for relaxed in results)


def test_lanes_share_the_work_and_leave_the_threads_alone() -> None:
    emt = Emt()
    before = torch.get_num_threads()
    list(relax(structures(9), emt, OPTIONS, lanes=3))
    assert len(emt.threads) == 3
    assert torch.get_num_threads() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


@pytest.mark.parametrize("lanes", [1, 2])
def test_out_of_memory_is_split(lanes: int) -> None:
    samples = structures(8)
    largest = max(sample.num_atoms for sample in samples)
    plenty = by_index(list(relax(samples, Emt(), OPTIONS)))
    tight = Emt(memory=2 * largest)
    results = by_index(list(relax(samples, tight, OPTIONS, lanes=lanes)))
    for expected, relaxed in zip(plenty, results, strict=True):
        assert relaxed.status == expected.status
        assert np.abs(relaxed.positions - expected.positions).max() < 1e-9
    assert max(tight.batches) <= 2


@pytest.mark.parametrize("lanes", [1, 2])
def test_one_that_does_not_fit_is_left_out(lanes: int) -> None:
    samples = structures(6)
    samples[2] = Sample.from_atoms(slab("Cu", (4, 4, 3)), sid=999)
    results = by_index(list(relax(samples, Emt(memory=40), OPTIONS, lanes=lanes)))
    assert [relaxed.status == "failed" for relaxed in results] == [False, False, True, False, False, False]
    assert results[2].reason == "50 atoms do not fit into memory"
    assert results[2].energy is None
    assert results[2].steps == 0
    assert np.array_equal(results[2].positions, samples[2].positions)


def test_memory_of_a_cpu_and_other_errors() -> None:
    """torch raises a plain RuntimeError for the CPU's memory; other errors are not taken for it."""

    def lacking(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        if len(samples) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return Emt()(samples)

    results = list(relax(structures(2), lacking, RelaxOptions(steps=1)))
    assert [relaxed.status for relaxed in results] == ["step limit"] * 2

    def broken(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for lanes in (1, 2):
        with pytest.raises(RuntimeError, match="mat1"):
            list(relax(structures(4), broken, lanes=lanes))


@pytest.mark.parametrize("lanes", [1, 2])
def test_forces_that_are_not_finite_stop_one_structure(lanes: int) -> None:
    samples = structures(5)
    expected = by_index(list(relax(samples, Emt(), OPTIONS)))
    results = by_index(list(relax(samples, Emt(bad={101: 3, 103: 0}), OPTIONS, lanes=lanes, keep_frames=True)))
    for index in (0, 2, 4):
        assert np.abs(results[index].positions - expected[index].positions).max() < 1e-9
    assert [relaxed.status for relaxed in results].count("failed") == 2
    assert results[1].reason == "the model's energy or forces are not finite after 3 steps"
    assert results[1].steps == 2
    assert len(results[1].frames) == 3
    assert np.isfinite(results[1].positions).all()
    assert results[1].energy is not None
    assert results[3].energy is None
    assert results[3].steps == 0
    assert np.array_equal(results[3].positions, samples[3].positions)


def test_structures_with_nothing_to_do() -> None:
    held = slab()
    held.set_constraint(FixAtoms(mask=[True] * len(held)))
    samples = [Sample.from_atoms(held, sid=1), *structures(2)]
    results = by_index(list(relax(samples, Emt(), OPTIONS)))
    assert (results[0].status, results[0].steps, results[0].largest_force) == ("converged", 0, 0.0)
    assert list(relax([], Emt(), OPTIONS)) == []
    limited = list(relax(structures(2), Emt(), RelaxOptions(steps=0)))
    assert {(relaxed.status, relaxed.steps) for relaxed in limited} == {("step limit", 0)}


def test_whoever_stops_listening_stops_the_lanes() -> None:
    emt = Emt()
    results = relax(structures(30), emt, OPTIONS, batch_size=4, lanes=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(emt.evaluations) < 30
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


# ------------------------------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    config = write_config(root / "config.yaml", make_dataset(root / "data", 8, 2), root / "run")
    assert main(["train", str(config), "optim.max_steps=4", "data.workers=0", "--json"]) == 0
    return root / "run"


def test_model_agrees_with_the_calculator(run: Path) -> None:
    """The same network through the batch and through ASE: float64, since rounding grows from step to step."""
    samples = structures(5)
    options = RelaxOptions(fmax=0.0, steps=8)
    potential = Potential.of(load_trained(run), "cpu", torch.float64)
    results = by_index(list(relax(samples, potential, options, batch_size=3, lanes=2)))
    for sample, relaxed in zip(samples, results, strict=True):
        atoms = sample.to_atoms()
        atoms.calc = Calculator(run, device="cpu", dtype=torch.float64)
        AseLBFGS(atoms, logfile=None, memory=50, maxstep=0.04).run(fmax=0.0, steps=8)
        assert np.abs(relaxed.positions - atoms.positions).max() < 1e-6
        assert relaxed.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)


def write_structures(path: Path, count: int = 6) -> list[Atoms]:
    made = [sample.to_atoms() for sample in structures(count)]
    ase.io.write(path, made)
    return made


def words(run: Path, file: Path, out: Path, *more: str) -> list[str]:
    return ["relax", str(run), str(file), str(out), "--steps", "6", "--fmax", "0.0", *more]


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = write_structures(tmp_path / "in.traj")
    out = tmp_path / "out"
    assert main(words(run, tmp_path / "in.traj", out, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["structures"], report["step_limit"], report["failed"]) == (6, 6, {})
    relaxed = ase.io.read(out / "relaxed.extxyz", ":")
    assert [atoms.info["sid"] for atoms in relaxed] == list(range(6))
    for before, after in zip(made, relaxed, strict=True):
        assert (after.info["converged"], after.info["steps"]) == (False, 6)
        assert np.array_equal(after.constraints[0].index, before.constraints[0].index)
        path = ase.io.read(out / "trajectories" / f"{after.info['sid']}.traj", ":")
        assert len(path) == 7
        assert np.allclose(path[0].positions, before.positions)
        assert np.allclose(path[-1].positions, after.positions, atol=1e-7)
        assert path[-1].get_potential_energy() == pytest.approx(after.get_potential_energy())
        assert np.allclose(path[-1].get_forces(apply_constraint=False), after.get_forces(apply_constraint=False))
    assert sorted(item.name for item in out.iterdir()) == [
        "relax.json",
        "relaxed.extxyz",
        "relaxed_positions.npz",
        "trajectories",
    ]
    # Again: it is all there. With other settings: refused.
    times = (out / "relaxed.extxyz").stat().st_mtime_ns
    assert main(words(run, tmp_path / "in.traj", out)) == 0
    assert "step limit" in capsys.readouterr().out
    assert (out / "relaxed.extxyz").stat().st_mtime_ns == times
    assert main(words(run, tmp_path / "in.traj", out, "--maxstep", "0.1")) == 1
    assert "was made with maxstep 0.04, not 0.1" in capsys.readouterr().err


def test_without_trajectories_and_own_sids(run: Path, tmp_path: Path) -> None:
    made = write_structures(tmp_path / "in.traj", 2)
    for number, atoms in enumerate(made):
        atoms.info["sid"] = 70 + number
    ase.io.write(tmp_path / "in.extxyz", made)
    assert main(words(run, tmp_path / "in.extxyz", tmp_path / "out", "--no-traj", "--json")) == 0
    assert not (tmp_path / "out" / "trajectories").exists()
    with np.load(tmp_path / "out" / "relaxed_positions.npz") as archive:
        assert archive["ids"].tolist() == ["70", "71"]


def test_killed_and_started_again(run: Path, tmp_path: Path) -> None:
    """It goes on where it was killed, and ends with what an uninterrupted one gives."""
    write_structures(tmp_path / "in.traj", 30)
    # One at a time: nothing depends on who is in the batch, not even the rounding.
    more = ("--batch-size", "1", "--json")
    assert main(words(run, tmp_path / "in.traj", tmp_path / "whole", *more)) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "egnscale.launch.cli", *words(run, tmp_path / "in.traj", out, *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    finished = out / ".relax" / "structures"
    while not list(finished.glob("[0-9]*.npz")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("[0-9]*.npz")}
    assert not (out / "relaxed.extxyz").exists(), "it was killed too late to say anything"
    trajectories = {path.name: path.stat().st_mtime_ns for path in (out / "trajectories").glob("[0-9]*.traj")}
    assert trajectories.keys() >= {name.replace("npz", "traj") for name in before}
    assert main(words(run, tmp_path / "in.traj", out, *more)) == 0
    for name in before:
        kept = out / "trajectories" / name.replace("npz", "traj")
        assert kept.stat().st_mtime_ns == trajectories[kept.name], "relaxed again"
    assert (out / "relaxed.extxyz").read_bytes() == (tmp_path / "whole" / "relaxed.extxyz").read_bytes()


def test_failures_of_a_finished_command_are_tried_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They alone: the others are kept, and all ends as if none had failed."""
    write_structures(tmp_path / "in.traj", 4)
    more = ("--batch-size", "1")  # nothing depends on who is in the batch, not even the rounding
    assert main(words(run, tmp_path / "in.traj", tmp_path / "whole", *more)) == 0
    predict = Potential.predict
    evaluated: set[int] = set()
    broken = {1, 2}

    def sometimes(self: Potential, batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor | None]:
        evaluated.update(sample.sid for sample in batch)
        energy, forces = predict(self, batch)
        return (energy * torch.nan if broken & {sample.sid for sample in batch} else energy), forces

    monkeypatch.setattr(Potential, "predict", sometimes)
    out = tmp_path / "out"
    for wrong in ({1, 2}, {2}):
        broken = wrong
        capsys.readouterr()
        assert main(words(run, tmp_path / "in.traj", out, *more)) == 0
        text = capsys.readouterr().out
        assert [name for name in range(4) if f"failed: {name}: " in text] == sorted(wrong)
        assert "the same command tries what failed again" in text
        assert json.loads((out / "relax.json").read_text())["failed"].keys() == {str(sid) for sid in wrong}
    evaluated.clear()
    broken = set()
    assert main([*words(run, tmp_path / "in.traj", out, *more), "--json"]) == 0
    assert evaluated == {2}
    assert json.loads(capsys.readouterr().out)["failed"] == {}
    assert (out / "relaxed.extxyz").read_bytes() == (tmp_path / "whole" / "relaxed.extxyz").read_bytes()
    assert sorted(path.name for path in (out / "trajectories").iterdir()) == [f"{sid}.traj" for sid in range(4)]
    assert not (out / ".relax").exists()


def test_killed_while_it_is_reopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = structures(3)

    def opened() -> RelaxationFolder:
        folder = RelaxationFolder(tmp_path / "out", ["100", "101", "102"], {})
        folder.claim()
        return folder

    first = opened()
    for relaxed in relax(samples, Emt(bad={101: 0}), OPTIONS):
        first.save(relaxed)
    first.finish(samples)
    first.release()

    def killed(self: RelaxationFolder, relaxed: Relaxed) -> None:
        raise KeyboardInterrupt

    second = opened()
    with monkeypatch.context() as patch:
        patch.setattr(RelaxationFolder, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            second.reopen(samples)
    second.release()
    assert [relaxed.status for relaxed in opened().read(samples)] == ["converged", "failed", "converged"]
    third = opened()
    third.reopen(samples)
    assert not third.finished
    with pytest.raises(OSError, match="another process is relaxing into"):
        opened()
    third.release()
    fourth = opened()
    assert [fourth.load(index, samples[index]) is None for index in range(3)] == [False, True, False]
    fourth.release()


def test_failures_are_tried_again(tmp_path: Path) -> None:
    samples = structures(3)
    folder = RelaxationFolder(tmp_path / "out", ["100", "101", "102"], {"fmax": 0.05})
    folder.claim()
    for relaxed in relax(samples, Emt(bad={101: 0}), OPTIONS):
        folder.save(relaxed)
    assert [folder.load(index, samples[index]) is None for index in range(3)] == [False, True, False]
    # What was relaxed from elsewhere does not count.
    assert folder.load(0, samples[1]) is None
    # What processes that were killed were writing goes; what others put there stays.
    for left in (".relaxed.17.tmp.extxyz", "trajectories/.100.17.tmp.traj", "trajectories/.mine"):
        (tmp_path / "out" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / left).touch()
    folder.finish(samples)
    assert [file.name for file in (tmp_path / "out").rglob(".*")] == [".mine"]
    folder.release()
    again = folder.read(samples)
    assert [relaxed.status for relaxed in again] == ["converged", "failed", "converged"]
    assert again[1].energy is None
    assert again[1].forces is None
    assert json.loads((tmp_path / "out" / "relax.json").read_text())["failed"].keys() == {"101"}
    assert len(ase.io.read(tmp_path / "out" / "relaxed.extxyz", ":")) == 3
    with pytest.raises(ValueError, match="made from other structures"):
        folder.read(samples[::-1])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folders = [RelaxationFolder(tmp_path / "out", ["0"], {}) for _ in range(2)]
    folders[0].claim()
    with pytest.raises(OSError, match="another process is relaxing"):
        folders[1].claim()
    folders[0].release()
    folders[1].claim()
    folders[1].release()


def test_names() -> None:
    def names(sids: list[int], fids: list[int]) -> list[str]:
        return names_of(Path("here"), np.array(sids), np.array(fids))

    assert names([1, 2], [0, 0]) == ["1", "2"]
    assert names([1, 1], [0, 3]) == ["1_0", "1_3"]
    with pytest.raises(ValueError, match="here: two structures are called 1_0"):
        names([1, 1], [0, 0])


@pytest.mark.parametrize("wrong", [{"fmax": -1.0}, {"fmax": float("nan")}, {"steps": -1}])
def test_options(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RelaxOptions(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- bad input


def nan_position(atoms: Atoms) -> None:
    atoms.positions[2, 1] = np.nan


def other_constraint(atoms: Atoms) -> None:
    atoms.set_constraint(FixedPlane([0], (0, 0, 1)))


def unknown_element(atoms: Atoms) -> None:
    atoms.numbers[0] = 92


@pytest.mark.parametrize(
    "spoil,expected",
    [
        (nan_position, "structure 1: sid 1 fid 0: positions is not finite"),
        (other_constraint, "structure 1 has the constraint FixedPlane"),
        (unknown_element, "structure 1 holds atomic number 92"),
        (lambda atoms: atoms.set_cell(np.zeros((3, 3))), "structure 1: sid 1 fid 0: periodic along"),
    ],
)
def test_structures_that_make_no_sense(
    spoil, expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = write_structures(tmp_path / "in.traj", 3)
    spoil(made[1])
    ase.io.write(tmp_path / "in.traj", made)
    assert main(words(run, tmp_path / "in.traj", tmp_path / "out")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_model_without_forces(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(energies_only(make_relaxed_dataset(tmp_path / "data", 4, 2), tmp_path / "direct")) == 0
    write_structures(tmp_path / "in.traj", 2)
    assert main(words(tmp_path / "direct", tmp_path / "in.traj", tmp_path / "out")) == 1
    assert "predicts no forces" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    potential = Potential.of(load_trained(tmp_path / "direct"), "cpu")
    assert not potential.has_forces
    with pytest.raises(ValueError, match="predicts no forces"):
        potential(structures(1))
    assert Potential.of(load_trained(run), "cpu").has_forces


class Unread:
    """A data set of which no structure may be read."""

    path = Path("here")
    metadata: dict = {}  # noqa: RUF012
    num_atoms = num_edges = np.array([3, 9, 5, 7, 1], dtype=np.int32)
    sid = np.arange(10, 15)
    fid = np.zeros(5, dtype=np.int64)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Sample:
        raise AssertionError(f"{i} was read")

    def verify(self) -> None: ...


def test_shares_and_names_read_no_structure() -> None:
    for rank, expected in enumerate(([1, 2], [3, 0])):
        mesh = SimpleNamespace(data_rank=rank, layout=SimpleNamespace(data=2))
        assert share_of(First(Unread(), 4), mesh) == expected  # type: ignore[arg-type]
    first = First(Unread(), 3)
    assert names_of(Path("here"), first.sid, first.fid) == ["10", "11", "12"]
    assert len(First(Unread(), None)) == len(First(Unread(), 9)) == 5
    with pytest.raises(IndexError, match="first 3"):
        first[3]
    made = structures(3)
    listed = Listed(made)
    assert (listed.sid.tolist(), listed.fid.tolist()) == ([100, 101, 102], [0, 0, 0])
    assert listed.num_atoms.tolist() == [sample.num_atoms for sample in made]
    assert listed[2] is made[2]


def test_interrupted(run: Path, tmp_path: Path) -> None:
    """Ctrl-C ends all lanes with one line, and what was done is kept."""
    write_structures(tmp_path / "in.traj", 30)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "egnscale.launch.cli", *words(run, tmp_path / "in.traj", out, "--batch-size", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    while not list((out / ".relax" / "structures").glob("[0-9]*.npz")):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "egnscale relax: interrupted"
    assert list((out / ".relax" / "structures").glob("[0-9]*.npz"))
    assert main(words(run, tmp_path / "in.traj", out, "--json")) == 0
