"""`egnscale data convert`: the same bytes however it is divided or interrupted, and nothing half-made."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launchers import ENVIRONMENT
from oc20_records import attributes, new_graph, structures, write_lmdb, write_oc20

from egnscale.data.convert import convert
from egnscale.data.neighbors import count_edges
from egnscale.data.ranks import MpiRanks
from egnscale.data.sample import Sample
from egnscale.data.store import Store
from egnscale.launch.cli import main

COUNT = 60


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return structures(COUNT)


@pytest.fixture(scope="module")
def source(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_oc20(tmp_path_factory.mktemp("oc20") / "train", samples, shards=3)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "train"
    assert convert(source, out, part_size=7)["status"] == "made"
    return out


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def spoil(source: Path, place: Path) -> Path:
    """A copy with a damaged record (7), a hostile one (8), and two without an energy's value (20, 41)."""
    bad = place / "bad"
    shutil.copytree(source, bad)
    samples = structures(COUNT)
    for file, first in ((bad / "data.0000.lmdb", 0), (bad / "data.0001.lmdb", 20), (bad / "data.0002.lmdb", 40)):
        records = []
        for i in range(first, first + 20):
            values = attributes(samples[i])
            if i in (20, 41):
                values["y"] = float("nan")
            record = pickle.dumps(new_graph(values), protocol=-1)
            record = {7: record[:-40], 8: pickle.dumps(os.getcwd)}.get(i, record)
            records.append(record)
        file.unlink()
        write_lmdb(file, records)
    return bad


def test_a_store_like_any_other(made: Path, samples: list[Sample]) -> None:
    store = Store(made)
    store.verify()
    assert len(store) == COUNT
    for i, sample in enumerate(samples):
        read = store[i]
        for name in ("atomic_numbers", "positions", "cell", "pbc", "tags", "fixed", "forces", "positions_relaxed"):
            np.testing.assert_array_equal(getattr(read, name), getattr(sample, name), err_msg=name)
        for name in ("sid", "fid", "energy", "energy_relaxed"):
            assert getattr(read, name) == getattr(sample, name), name
    np.testing.assert_array_equal(store.num_edges, [count_edges(sample) for sample in samples])
    statistics, energies = store.metadata["statistics"], np.array([sample.energy for sample in samples])
    assert statistics["energy"]["mean"] == pytest.approx(energies.mean())
    assert statistics["energy"]["count"] == COUNT
    forces = np.concatenate([sample.forces for sample in samples])
    assert statistics["forces"]["all"]["rms"] == pytest.approx(np.sqrt((forces**2).mean()))
    assert store.metadata["provenance"]["kind"] == "OC20 LMDB"
    assert [file.name for file in made.parent.iterdir()] == ["train"]


def test_the_number_of_workers_does_not_matter(source: Path, made: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "train", part_size=7, workers=3)
    assert digests(tmp_path / "train") == digests(made)


def _start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    script = out.parent / "script.py"
    script.write_text(
        "from egnscale.data.convert import convert\n"
        f"if __name__ == '__main__': convert({str(source)!r}, {str(out)!r}, part_size=7)"
    )
    return subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)


def test_a_killed_conversion_goes_on(source: Path, made: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "train", tmp_path / ".train.converting" / "parts"
    process = _start(source, out)
    try:
        deadline = time.monotonic() + 60
        while len(list(kept.glob("*.npz"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(OSError, match="another process"):
            convert(source, out, part_size=7)
    finally:
        process.kill()
        process.wait()
    if out.exists():
        pytest.skip("it had finished")
    with pytest.raises(ValueError, match="was begun with part_size 7, not 9"):
        convert(source, out, part_size=9)
    time.sleep(1.5)  # its worker notices and ends
    before = sorted(kept.glob("*.npz"))
    assert len(before) < 9
    damaged = before[0]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    inodes = {file: file.stat().st_ino for file in before[1:]}
    seen: dict[Path, int] = {}
    convert(source, out, part_size=7, progress=lambda *_: seen.update({f: f.stat().st_ino for f in inodes}))
    assert seen == inodes, "finished parts were converted again"
    assert digests(out) == digests(made)
    assert not kept.parent.exists()


def test_killed_between_any_two_steps_of_the_end(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the store gets its name, and after."""
    out = tmp_path / "train"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("write_metadata", "os.rename", "shutil.rmtree"):
        with monkeypatch.context() as patch:
            patch.setattr(f"egnscale.data.convert.{name}", stop)
            if name == "os.rename":
                work = tmp_path / ".train.converting"
                patch.setattr("egnscale.data.convert._convert_parts", lambda *_: None)
                assert len(list(work.glob("parts/*.npz"))) == 9
            with pytest.raises(KeyboardInterrupt):
                convert(source, out, part_size=7)
        assert out.exists() == (name == "shutil.rmtree")
    assert convert(source, out, part_size=7)["status"] == "already there"
    assert digests(out) == digests(made)
    assert [file.name for file in tmp_path.iterdir()] == ["train"]


# ------------------------------------------------------------------------------------------------------- bad structures


def test_the_first_bad_structure_ends_it_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    bad = spoil(source, tmp_path)
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb: structure 7 .*--skip-bad") as error:
        convert(bad, tmp_path / "out" / "train")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_structures_are_left_out_and_counted(source: Path, samples: list[Sample], tmp_path: Path) -> None:
    bad, out = spoil(source, tmp_path), tmp_path / "train"
    for part_size in (1, 7, 100):
        report = convert(bad, out, skip_bad=True, part_size=part_size)
        assert report["structures"] == COUNT - 4
        assert report["skipped"]["count"] == 4
        assert report["skipped"]["reasons"] == {"damaged record": 1, "energy not finite": 2, "refused name": 1}
        assert [example.split(": ")[1].split(" ")[1] for example in report["skipped"]["examples"]] == [
            "7",
            "8",
            "0",
            "1",
        ]
        store = Store(out)
        store.verify()
        assert store.metadata["provenance"]["skipped"] == report["skipped"]
        left = [sample for i, sample in enumerate(samples) if i not in (7, 8, 20, 41)]
        assert [store[i].energy for i in range(len(store))] == [sample.energy for sample in left]
        again = convert(bad, out, skip_bad=True, part_size=part_size)
        assert again == report | {"status": "already there"}
        with pytest.raises(ValueError, match="made with --skip-bad"):
            convert(bad, out)
        shutil.rmtree(out)


def test_parts_with_gaps_do_not_satisfy_a_strict_conversion(source: Path, tmp_path: Path) -> None:
    bad, out = spoil(source, tmp_path), tmp_path / "train"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egnscale.data.convert._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(bad, out, skip_bad=True, part_size=30)
    with pytest.raises(ValueError, match="structure 7"):
        convert(bad, out, part_size=30)
    assert not out.exists()
    assert convert(bad, out, skip_bad=True, part_size=30)["structures"] == COUNT - 4


def test_nothing_but_bad_structures(tmp_path: Path) -> None:
    bad = write_lmdb(tmp_path / "in" / "data.lmdb", [b"nonsense"] * 3)
    with pytest.raises(
        ValueError, match=r"no structure that can be used \(3 were left out\); the first: .*structure 0"
    ):
        convert(bad, tmp_path / "train", skip_bad=True)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


# -------------------------------------------------------------------------------------------------------- what is there


def test_what_exists_is_left_alone(source: Path, made: Path, samples: list[Sample], tmp_path: Path) -> None:
    before = digests(made)
    assert convert(source, made)["status"] == "already there"
    other = write_oc20(tmp_path / "other", samples[:5])
    with pytest.raises(ValueError, match="was made with source"):
        convert(other, made)
    assert digests(made) == before
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(FileExistsError, match="exists, and is not a converted store"):
        convert(source, tmp_path)
    (tmp_path / "empty").mkdir()
    assert convert(other, tmp_path / "empty")["structures"] == 5


def test_a_source_that_changed(source: Path, tmp_path: Path, samples: list[Sample]) -> None:
    copy, out = tmp_path / "source", tmp_path / "train"
    shutil.copytree(source, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("egnscale.data.convert._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(copy, out)
    shutil.rmtree(copy)
    write_oc20(copy, [replace(sample, sid=7) for sample in samples[:50]], shards=3)
    with pytest.raises(ValueError, match=r"\.train\.converting was begun with"):
        convert(copy, out)


def test_sizes_must_be_positive(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        convert(source, tmp_path / "train", workers=0)
    with pytest.raises(ValueError, match="part_size is 0"):
        convert(source, tmp_path / "train", part_size=0)


# ---------------------------------------------------------------------------------------------------------- the command


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "train")
    words = ["data", "convert", str(source), out, "--workers", "1"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["structures"], report["skipped"]["count"], report["status"]) == (COUNT, 0, "made")
    assert main(words) == 0
    assert "already there" in capsys.readouterr().out
    assert main(["data", "info", out, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stores"]["train"]["structures"] == COUNT


def test_command_with_bad_structures(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, out = spoil(source, tmp_path), tmp_path / "train"
    words = ["data", "convert", str(bad), str(out), "--workers", "1"]
    assert main([*words, "--strict"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("egnscale data: ")
    assert "structure 7" in line
    assert "--skip-bad" in line
    assert not out.exists()
    assert main([*words, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "4 left out: 1 damaged record, 2 energy not finite, 1 refused name" in printed
    assert "posix.getcwd" in printed


@pytest.mark.parametrize("words", [["nowhere"], ["empty"], ["text.lmdb"], ["train", "--total-energies"]])
def test_command_without_data(
    words: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.lmdb").write_text("text")
    shutil.copytree(source, tmp_path / "train")
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "convert", str(tmp_path / words[0]), str(tmp_path / "out"), *words[1:]]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words[0] in line
    assert "--debug" not in line
    assert sorted(tmp_path.rglob("*")) == before


class Communicator:
    """MPI's, for threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: dict[int, Any]) -> None:
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def allgather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait()
        gathered = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait()
        return gathered

    def bcast(self, value: Any) -> Any:
        return self.allgather(value)[0]


@pytest.mark.parametrize("failing", [None, 0, 1, 2])
def test_ranks_fail_together_and_one_speaks(failing: int | None) -> None:
    barrier, board = threading.Barrier(3), dict[int, Any]()

    def work(rank: int, ranks: MpiRanks) -> str:
        def own() -> int:
            if rank == failing:
                raise ValueError(f"rank {rank} failed")
            return rank

        try:
            assert ranks.on_first(lambda: "from 0") == "from 0"
            ranks.on_each(own)
            assert ranks.on_first(own) == 0
        except ValueError as error:
            return str(error)
        except SystemExit:
            return "left"
        return "done"

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(work, rank, MpiRanks(Communicator(rank, 3, barrier, board))) for rank in range(3)]
        ends = [future.result(timeout=30) for future in futures]
    spoken = [f"rank {rank} failed" if rank == failing else "left" for rank in range(3)]
    assert ends == (["done"] * 3 if failing is None else spoken)


MPI_SCRIPT = """
import sys
from egnscale.data.convert import convert
from egnscale.data.ranks import find_ranks
if __name__ == "__main__":
    try:
        report = convert(sys.argv[1], sys.argv[2], part_size=7, ranks=find_ranks())
    except ValueError as error:
        sys.exit(f"said: {error}")
    print("made", report["structures"])
"""


def test_mpirun(source: Path, made: Path, tmp_path: Path) -> None:
    """Ranks convert parts in turn; one that fails speaks for all."""
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=ENVIRONMENT["PATH"])
    if mpirun is None:
        pytest.skip("no mpirun")
    script, bad = tmp_path / "script.py", spoil(source, tmp_path)
    script.write_text(MPI_SCRIPT)

    def start(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [mpirun, "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable, *map(str, words)]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    result = start(script, source, tmp_path / "train")
    assert result.stdout.split() == ["made", str(COUNT)] * 2, result.stderr
    assert digests(tmp_path / "train") == digests(made)
    result = start("-m", "egnscale.launch.cli", "data", "convert", source, tmp_path / "again", "--json")
    assert json.loads(result.stdout)["structures"] == COUNT, result.stderr
    result = start(script, bad, tmp_path / "bad_out")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("said: ")]
    assert "--skip-bad" in line
    assert not (tmp_path / "bad_out").exists()


def test_mpirun_without_mpi4py(source: Path, tmp_path: Path) -> None:
    if shutil.which("mpirun", path=ENVIRONMENT["PATH"]):
        pytest.skip("mpi4py may be there")
    words = [sys.executable, "-m", "egnscale.launch.cli", "data", "convert", str(source), str(tmp_path / "train")]
    environment = ENVIRONMENT | {"OMPI_COMM_WORLD_SIZE": "2"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "mpi4py is not installed" in result.stderr
    assert not (tmp_path / "train").exists()
