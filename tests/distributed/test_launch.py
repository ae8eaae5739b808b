"""The command line under the launchers that people use, on two ranks."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import ENVIRONMENT, ROOT, deepspeed, log, start, torchrun
from toy import make_dataset, write_config

from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import find_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=12, val=5)


def test_launchers_agree_and_resume_is_exact(data: Path, tmp_path: Path) -> None:
    whole = write_config(tmp_path / "whole.yaml", data, tmp_path / "whole")
    result = start(deepspeed(), whole, "parallel.zero=1", "optim.max_steps=6", "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert printed["step"] == 6
    assert set(printed["evaluations"]) == {"val_id", "val_ood_ads"}

    parts = write_config(tmp_path / "parts.yaml", data, tmp_path / "parts")
    assert start(torchrun(), parts, "parallel.zero=1", "optim.max_steps=6", "--json").returncode == 0
    assert dict(log(tmp_path / "parts")) == pytest.approx(dict(log(tmp_path / "whole")))

    # From the checkpoint of step 4 again to the end.
    checkpoints = tmp_path / "parts" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000004")
    shutil.rmtree(checkpoints / "step_00000006")
    result = start(torchrun(), parts, "parallel.zero=1", "optim.max_steps=6", "--resume")
    assert result.returncode == 0, result.stderr
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    found, wanted = (
        read_weights(find_checkpoint(tmp_path / name) / "model.safetensors") for name in ("parts", "whole")
    )
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_mpirun(data: Path, tmp_path: Path) -> None:
    """Ranks are found through mpi4py (extra `[mpi]`)."""
    pytest.importorskip("mpi4py")
    mpirun = shutil.which("mpirun", path=ENVIRONMENT["PATH"])
    if mpirun is None:
        pytest.skip("no mpirun")
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    launcher = [mpirun, "-n", "2", "--allow-run-as-root", "--oversubscribe", sys.executable]
    result = start(launcher, config, "optim.max_steps=2", "--json")
    assert result.returncode == 0, result.stderr
    assert "= 2 ranks" in result.stderr
    assert log(tmp_path / "run")[-1][0] == 2


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"SLURM_STEP_NUM_TASKS": "4"}, "srun"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi4py")],
)
def test_launchers_that_cannot_be_joined_say_so(
    data: Path, tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    if words == "mpi4py" and importlib.util.find_spec("mpi4py"):
        pytest.skip("mpi4py is installed")
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), str(config)],
        env={**ENVIRONMENT, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert words in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_an_error_ends_every_rank_with_a_line(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    result = start(torchrun(), config, "optim.lr_initial=1e30", "optim.clip_grad_norm=null")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("egnscale train [rank")]
    assert 1 <= len(lines) <= 2, "torchrun ends the second rank, maybe before it has spoken"
    assert all("the loss became nan at step 2 on sid" in line for line in lines)


GIVEN = "task.normalizer={energy_mean: 0.0, energy_std: 1.0, force_std: 1.0}"


def test_too_few_structures_for_the_ranks(data: Path, tmp_path: Path) -> None:
    from toy import samples

    from egnscale.data.store import write_store

    write_store(tmp_path / "one", samples(1))
    config = write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    result = start(torchrun(), config, f"data.train={tmp_path}/one", GIVEN)
    assert result.returncode != 0
    assert "too few" in result.stderr
