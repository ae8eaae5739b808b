"""Ranks that fail, die, freeze or disagree: who is named, on every other rank, and how soon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy import make_dataset, write_config

from egnscale.scaling import agreement
from egnscale.scaling.agreement import check_agreement, run_facts, source_facts
from egnscale.scaling.failure import watched

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()

#: What the ranks of most tests run: collectives without end, and the case's own trouble.
PROGRAM = """\
import os, sys, threading, time
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
import torch, torch.distributed as dist
from egnscale.scaling.failure import watched

case, rank, size = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")

def steps(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        dist.all_reduce(torch.ones(10))
        time.sleep(0.05)

try:
    with watched(rank, size, "program"):
        dist.barrier()
        print("ready", flush=True)
        if case == "endless":
            steps(1000)
        if case == "raises":
            if rank == 1:
                raise OSError(28, "No space left on device")
            if rank == 2:  # not in a collective, never looks
                time.sleep(1000)
            dist.recv(torch.ones(1), src=2)
        if case == "busy":
            until = time.monotonic() + (11 if rank == 1 else 0)  # 6 s of them suspended
            while time.monotonic() < until:
                sum(range(1000))
            dist.barrier()
            time.sleep(rank)  # and the ranks end one after the other; first the one with the store
            if rank == 2:
                torch.mm(torch.ones(2000, 2000), torch.ones(2000, 2000))
except Exception as error:
    print(f"program [rank {rank}]: {error}", file=sys.stderr)
    sys.exit(1)
print("done", flush=True)
"""


class Ranks:
    """Processes of one world, without a launcher that would end the others when one fails."""

    def __init__(self, size: int, command: list[str], folder: Path, words: dict[int, list[str]], **variables: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.folder = folder
        self.processes = []
        for rank in range(size):
            local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = {
                **os.environ, **{key: str(value) for key, value in local.items()}, **variables,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
            with open(folder / f"{rank}.out", "w") as out, open(folder / f"{rank}.err", "w") as err:
                self.processes.append(
                    subprocess.Popen([*command, *words.get(rank, [])], env=environment, stdout=out, stderr=err)
                )

    def out(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, [self.err(rank) for rank in range(len(self.processes))]
            time.sleep(0.1)

    def ended(self, *ranks: int) -> bool:
        return all(self.processes[rank].poll() is not None for rank in ranks)

    def ready(self) -> None:
        self.until(lambda: all("ready" in self.out(rank) for rank in range(len(self.processes))))

    def expect(self, line: str, *ranks: int, name: str = "program", seconds: float = 30) -> None:
        """These ranks end by themselves in that time, each with that one line."""
        started = time.monotonic()
        self.until(lambda: self.ended(*ranks), seconds)
        print(f"{time.monotonic() - started:.1f} s until ranks {ranks} had ended: {self.err(ranks[0])}")
        for rank in ranks:
            assert self.processes[rank].returncode == 1
            said = [text for text in self.err(rank).splitlines() if not text.startswith("[W")]
            assert said[-1] == f"{name} [rank {rank}]: {line}"
            assert sum(f"{name} [rank" in text for text in said) == 1
            assert "Traceback" not in self.err(rank)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(size: int, command: list[str], words: dict[int, list[str]] | None = None, **variables: str) -> Ranks:
        folder = tmp_path / f"world{len(started)}"
        folder.mkdir()
        started.append(Ranks(size, command, folder, words or {}, **variables))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.wait()


def program(case: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, case]


def training(tmp_path: Path) -> list[str]:
    config = write_config(tmp_path / "config.yaml", make_dataset(tmp_path / "data", train=12, val=5), tmp_path / "run")
    words = ["data.workers=0", "optim.max_steps=100000", "task.eval_every=100000", "task.checkpoint_every=100000"]
    return [sys.executable, str(ROOT / "launch" / "train.py"), str(config), *words]


def test_a_failed_rank_ends_those_that_wait_for_others(start: Callable[..., Ranks]) -> None:
    ranks = start(3, program("raises"))
    ranks.ready()
    ranks.expect(f"rank 1 ({HOST}) failed: [Errno 28] No space left on device", 0, 2, seconds=10)
    assert ranks.err(1) == "program [rank 1]: [Errno 28] No space left on device\n"


def test_a_frozen_rank_and_a_control_without_watch(start: Callable[..., Ranks]) -> None:
    """With the limit as it is. The control hangs."""
    watched, control = start(3, program("endless")), start(2, program("endless"), EGNSCALE_WATCH_SECONDS="0")
    for ranks in (control, watched):
        ranks.ready()
        ranks.processes[1].send_signal(signal.SIGSTOP)
    watched.expect(f"rank 1 ({HOST}) died or froze: no heartbeat for 15 s", 0, 2)
    assert not control.ended(0)


def test_the_store_freezes_with_its_rank(start: Callable[..., Ranks]) -> None:
    ranks = start(3, program("endless"), EGNSCALE_WATCH_SECONDS="4")
    ranks.ready()
    ranks.processes[0].send_signal(signal.SIGSTOP)
    ranks.expect("rank 0 (127.0.0.1) froze: its key-value store does not answer for 4 s", 1, 2, seconds=12)


def test_the_store_dies_with_its_rank(start: Callable[..., Ranks]) -> None:
    ranks = start(3, program("endless"))
    ranks.ready()
    ranks.processes[0].kill()
    ranks.expect("rank 0 (127.0.0.1) is gone: its key-value store closed the connection", 1, 2, seconds=10)


def test_busy_and_suspended_ranks_and_early_ends_are_no_failures(start: Callable[..., Ranks]) -> None:
    ranks = start(3, program("busy"), EGNSCALE_WATCH_SECONDS="4.5")
    ranks.ready()
    for sent in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks.processes:
            process.send_signal(sent)
        time.sleep(6 if sent == signal.SIGSTOP else 0)
    ranks.until(lambda: ranks.ended(0, 1, 2))
    assert [ranks.err(rank) for rank in range(3)] == ["", "", ""]
    assert [process.returncode for process in ranks.processes] == [0, 0, 0]


def test_a_killed_rank_in_training(start: Callable[..., Ranks], tmp_path: Path) -> None:
    """gloo reports a closed connection at once; the line says whose."""
    ranks = start(2, training(tmp_path))
    log = tmp_path / "run" / "log.csv"
    ranks.until(lambda: log.exists() and log.read_text().count("\n") > 3)
    ranks.processes[1].kill()
    ranks.expect(f"rank 1 ({HOST}) died or froze: no heartbeat", 0, name="egnscale train")


@pytest.mark.parametrize("dying", [0, 1])
def test_a_stage_that_dies(start: Callable[..., Ranks], tmp_path: Path, dying: int) -> None:
    """Whoever waits for it says whose end it was, in one line, and ends."""
    ranks = start(2, [*training(tmp_path), "parallel={pipe: 2, zero: 1}", "optim.gradient_accumulation=2"])
    log = tmp_path / "run" / "log.csv"
    ranks.until(lambda: log.exists() and log.read_text().count("\n") > 3)
    ranks.processes[dying].kill()
    line = f"rank 1 ({HOST}) died or froze: no heartbeat"
    if dying == 0:
        line = "rank 0 (127.0.0.1) is gone: its key-value store closed the connection"
    ranks.expect(line, 1 - dying, name="egnscale train")


def test_a_setting_that_differs(start: Callable[..., Ranks], tmp_path: Path) -> None:
    ranks = start(2, training(tmp_path), {1: ["optim.lr_initial=0.5", "parallel.precision=bf16"]})
    ranks.expect(
        "ranks disagree: optim.lr_initial is 0.002 on rank 0 and 0.5 on rank 1; "
        "parallel.precision is fp32 on rank 0 and bf16 on rank 1 "
        "(start all ranks from the same environment, with the same configuration)",
        *(0, 1), name="egnscale train",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", ["1", "-3", "soon"])
def test_limits_that_make_no_sense(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGNSCALE_WATCH_SECONDS", limit)
    with pytest.raises(ValueError, match=f"EGNSCALE_WATCH_SECONDS is {limit}"), watched(0, 2, "program"):
        pass


# Agreement, in one process


def disagreement(*facts: dict) -> str:
    """The message, the same on every rank."""
    lines = []
    for mine in facts:

        def gather(value: object, mine: dict = mine) -> list:
            # What the others contribute follows from their facts as this rank's value from its own.
            return list(facts) if value == mine else [repr(theirs) for theirs in facts]

        with pytest.raises(ValueError, match="ranks disagree") as caught:
            check_agreement(mine, gather)
        lines.append(str(caught.value))
    assert len(set(lines)) == 1
    return lines[0].removeprefix("ranks disagree: ").partition(" (start all")[0]


def test_minority_and_majority_are_told() -> None:
    old, new = {"torch": "2.12.1"}, {"torch": "2.13.0"}
    assert disagreement(new, old) == "torch is 2.13.0 on rank 0 and 2.12.1 on rank 1"
    assert disagreement(new, new, old, new) == "torch is 2.12.1 on rank 2 and 2.13.0 on the other 3"
    assert disagreement(new, old, new, old) == "torch is 2.13.0 on ranks 0, 2 and 2.12.1 on ranks 1, 3"
    assert disagreement(new, {}, old, new) == "torch is 2.12.1 on rank 2, absent on rank 1 and 2.13.0 on the other 2"


def test_changed_sources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = run_facts({"optim": {"eps": 1e-8}}, {"bf16": {"enabled": True}}, device="cpu")
    assert facts["optim.eps"] == "1e-08"
    assert facts["deepspeed_config.bf16.enabled"] == "True"
    check_agreement(facts, lambda value: [value, value])
    assert {name.split("/")[0] for name in source_facts()} == {"models", "scaling", "data", "launch"}
    monkeypatch.setattr(agreement.zlib, "crc32", lambda content: len(content) + 1)
    changed = run_facts({"optim": {"eps": 1e-8}}, {"bf16": {"enabled": True}}, device="cpu")
    line = disagreement(facts, changed)
    assert line.startswith("models/__init__.py (checksum) is ")
    assert line.endswith(" more")
