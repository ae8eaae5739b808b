"""A run killed at any moment, resumed, ends where an uninterrupted run ends: bit for bit on one rank."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import make_dataset, write_config

from egnscale.launch.cli import main
from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import find_checkpoint, verify_checkpoint

STEPS = 24
OVERRIDES = [
    f"optim.max_steps={STEPS}",
    "task.eval_every=4",
    "task.checkpoint_every=2",
    "task.keep_last=2",
    "data.workers=0",
]
#: The child sleeps a little at every step and while it writes checkpoints, so that kills land everywhere.
CHILD = """
import sys, time
from pathlib import Path
import egnscale.launch.trainer as trainer
import egnscale.scaling.checkpoint as checkpoint

def slowly(function, seconds):
    def wrapper(*args, **kwargs):
        time.sleep(seconds)
        result = function(*args, **kwargs)
        time.sleep(seconds)
        return result
    return wrapper

trainer.Trainer._train_step = slowly(trainer.Trainer._train_step, 0.01)
checkpoint.os.replace = slowly(checkpoint.os.replace, 0.02)
checkpoint._sync = slowly(checkpoint._sync, 0.01)
trainer.save_weights = slowly(trainer.save_weights, 0.02)
progress = Path(sys.argv[1])
original = trainer.Trainer.run
trainer.Trainer.run = lambda self, **kwargs: (progress.touch(), original(self, **kwargs))[1]
from egnscale.launch.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=10, val=4)


def command(config: Path, *, resume: bool) -> list[str]:
    return ["train", str(config), *OVERRIDES, "--json", *(["--resume"] if resume else [])]


def losses(run: Path) -> list[tuple[str, str]]:
    with open(run / "log.csv") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def evaluations(run: Path) -> list[dict[str, str]]:
    with open(run / "eval.csv") as file:
        return list(csv.DictReader(file))


def final(run: Path) -> tuple[dict, dict]:
    checkpoint = find_checkpoint(run)
    record = json.loads((checkpoint / "run.json").read_text())
    return read_weights(checkpoint / "model.safetensors"), {
        key: record[key] for key in ("step", "schedule", "evaluations")
    }


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert main(command(write_config(root / "config.yaml", data, root / "run"), resume=False)) == 0
    return root / "run"


def same_end(run: Path, uninterrupted: Path) -> None:
    assert losses(run) == losses(uninterrupted)
    assert evaluations(run) == evaluations(uninterrupted)
    weights, record = final(run)
    wanted, wanted_record = final(uninterrupted)
    assert record == wanted_record
    assert weights.keys() == wanted.keys()
    assert all(weights[name].equal(wanted[name]) for name in wanted)


def kill_and_resume(data: Path, root: Path, kills: int, seed: int) -> Path:
    """Kill the run `kills` times, each time after a random delay since its training began, then let it end."""
    chance = random.Random(seed)
    config = write_config(root / "config.yaml", data, root / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = 0
    for _ in range(4 * kills):
        if killed == kills:
            break
        started = root / "started"
        started.unlink(missing_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(started), *command(config, resume=True)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not started.exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.2))
        child.send_signal(signal.SIGKILL)
        _, err = child.communicate()
        if child.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert child.returncode == 0, err
            break  # it had ended before the blow
        if (root / "run" / "checkpoints" / "latest").exists():
            verify_checkpoint(find_checkpoint(root / "run"))
    assert killed >= min(kills, 2), "the run ended before it was killed"
    assert main(command(config, resume=True)) == 0
    return root / "run"


def test_killed_runs_end_where_an_uninterrupted_one_does(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    same_end(kill_and_resume(data, tmp_path, kills=3, seed=0), uninterrupted)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_twenty_kills(data: Path, uninterrupted: Path, tmp_path: Path, seed: int) -> None:
    same_end(kill_and_resume(data, tmp_path, kills=4, seed=seed), uninterrupted)


@pytest.mark.parametrize("moment", ["engine", "weights", "manifest", "rename", "latest", "prune"])
def test_killed_while_writing_a_checkpoint(data: Path, uninterrupted: Path, tmp_path: Path, moment: str) -> None:
    """Die at a chosen point of the third checkpoint; `latest` still loads, and the run ends the same."""
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-c", DIE_AT, moment, *command(config, resume=False)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    checkpoint = find_checkpoint(tmp_path / "run")
    verify_checkpoint(checkpoint)
    assert checkpoint.name == ("step_00000006" if moment == "prune" else "step_00000004")
    assert main(command(config, resume=True)) == 0
    same_end(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "left-overs are cleared away"


#: Kills itself at a named point of writing the checkpoint of step 6.
DIE_AT = """
import os, signal, sys
import egnscale.launch.trainer as trainer
import egnscale.scaling.checkpoint as checkpoint
from egnscale.scaling.engine import Engine

moment = sys.argv[1]

def dying(function, when):
    def wrapper(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

is_sixth = lambda text: "00000006" in str(text)
if moment == "engine":
    Engine.save = dying(Engine.save, lambda self, path: is_sixth(path))
elif moment == "weights":
    trainer.save_weights = dying(trainer.save_weights, lambda path, *rest: is_sixth(path))
elif moment == "manifest":
    manifest = lambda path, text: path.name == "manifest.json" and is_sixth(path)
    checkpoint.write_text = dying(checkpoint.write_text, manifest)
elif moment == "rename":
    checkpoint.os.replace = dying(checkpoint.os.replace, lambda a, b: is_sixth(b) and b.name.startswith("step"))
elif moment == "latest":
    checkpoint.write_text = dying(checkpoint.write_text, lambda path, text: path.name == "latest" and is_sixth(text))
elif moment == "prune":
    # The first removal of an old checkpoint after the sixth was published.
    checkpoint.shutil.rmtree = dying(checkpoint.shutil.rmtree, lambda path, *rest: str(path).endswith(".old.tmp"))
from egnscale.launch.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_control_another_seed_ends_elsewhere(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    assert main([*command(config, resume=False), "task.seed=2"]) == 0
    assert losses(tmp_path / "run") != losses(uninterrupted)
