"""`parallel.graph: 2` from the command line: training, evaluation, calculator, checkpoints that change layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launchers import log, start, torchrun
from spawn import spawn
from toy import make_dataset, slab, write_config

from egnscale.launch.cli import main
from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import find_checkpoint

SPREAD = ["parallel.graph=2", "parallel.zero=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and the same run of 6 steps by one process and by two that share its graphs."""
    root = tmp_path_factory.mktemp("graph")
    data = make_dataset(root / "data", train=12, val=5)
    for name in ("alone", "shared"):
        write_config(root / f"{name}.yaml", data, root / name)
    words = ["optim.max_steps=6", "task.checkpoint_every=2", "task.keep_last=9", "data.workers=0"]
    assert main(["train", str(root / "alone.yaml"), *words, "--json"]) == 0
    result = start(torchrun(), root / "shared.yaml", *SPREAD, *words)
    assert result.returncode == 0, result.stderr
    assert "pipe 1 x data 1 x graph 2 = 2 ranks" in result.stderr
    return root


def evaluations(run: Path) -> list[dict[str, float]]:
    with open(run / "eval.csv") as file:
        return [{k: float(v) for k, v in row.items() if k != "split"} for row in csv.DictReader(file)]


def test_two_ranks_that_share_graphs_train_as_one_process(place: Path) -> None:
    assert dict(log(place / "shared")) == pytest.approx(dict(log(place / "alone")), rel=1e-4)
    for mine, theirs in zip(*(evaluations(place / name) for name in ("shared", "alone")), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    shared, alone = (read_weights(find_checkpoint(place / name) / "model.safetensors") for name in ("shared", "alone"))
    assert shared.keys() == alone.keys()
    for name, weight in alone.items():  # averaged weights, and scale factors
        assert (shared[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_bf16_rows_are_exchanged(place: Path, tmp_path: Path) -> None:
    words = ["optim.max_steps=4", "data.workers=0", "parallel.precision=bf16", "parallel.zero=2"]
    assert main(["train", str(place / "alone.yaml"), *words, f"task.output={tmp_path}/alone", "--json"]) == 0
    result = start(torchrun(), place / "shared.yaml", "parallel.graph=2", *words, f"task.output={tmp_path}/shared")
    assert result.returncode == 0, result.stderr
    assert dict(log(tmp_path / "shared")) == pytest.approx(dict(log(tmp_path / "alone")), rel=0.03)


def test_exchanges_are_logged(place: Path) -> None:
    with open(place / "shared" / "exchanges.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {str(step) for step in range(1, 7)}
    of_block = {(row["verb"], row["direction"]) for row in rows if row["layer"] == "1 Block"}
    assert of_block == {(verb, way) for verb in ("gather_sources", "swap") for way in ("forward", "backward")}
    with open(place / "shared" / "log.csv") as file:
        for step, row in enumerate(csv.DictReader(file), start=1):
            sent = sum(int(found["bytes"]) for found in rows if found["step"] == str(step))
            assert float(row["exchanged_mb"]) == pytest.approx(sent / 1e6)
            assert sent > 0
    assert not (place / "alone" / "exchanges.csv").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_under_any_layout(place: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "shared"), str(place / "data"), "--json", "--workers", str(workers)]
    assert main(["evaluate", *words]) == 0
    wanted = json.loads(capsys.readouterr().out)["splits"]
    for ranks in ("1", "2"):  # that share a graph, of two
        result = start([*torchrun(), "-m", "egnscale.launch.cli"], ["evaluate", *words, "--graph", ranks])
        assert result.returncode == 0, result.stderr
        printed = [line for line in result.stdout.splitlines() if line.startswith("{")]
        assert len(printed) == 1
        found = json.loads(printed[0])["splits"]
        for split, metrics in wanted.items():
            assert found[split] == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_checkpoint_goes_on_under_another_layout(place: Path, tmp_path: Path, shared_first: bool) -> None:
    import shutil

    first, config = ("shared", "shared.yaml") if shared_first else ("alone", "alone.yaml")
    run = tmp_path / "run"
    shutil.copytree(place / first, run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    (run / "checkpoints" / "latest").write_text("step_00000002")
    words = [f"task.output={run}", "optim.max_steps=6", "data.workers=0", "--resume"]
    if shared_first:
        assert main(["train", str(place / config), *words, "--json"]) == 0
    else:
        result = start(torchrun(), place / config, "parallel.graph=2", "parallel.zero=3", *words)
        assert result.returncode == 0, result.stderr
    assert dict(log(run)) == pytest.approx(dict(log(place / "alone")), rel=1e-4)


def calculate(world: Any, run: str) -> tuple[float, np.ndarray]:
    from egnscale.launch import Calculator
    from egnscale.scaling.layout import Mesh

    atoms = slab("Pt", (3, 2, 3))
    atoms.calc = Calculator(run, mesh=Mesh.of_world(world.device, graph=world.size))
    return atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)


def test_calculator_spreads_a_structure(place: Path) -> None:
    from egnscale.launch import Calculator

    atoms = slab("Pt", (3, 2, 3))
    atoms.calc = Calculator(place / "alone")
    for energy, forces in spawn(2, calculate, str(place / "alone")):
        assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-5)
        np.testing.assert_allclose(forces, atoms.get_forces(apply_constraint=False), rtol=1e-4, atol=1e-5)


def test_impossible_layouts_say_what_would_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(place / "alone.yaml"), "parallel.graph=3", f"task.output={place}/none"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "pipe(1) x graph(3) = 3 does not divide 1 rank" in line
    assert "try parallel.graph=1, or start 3 ranks" in line
    assert not (place / "none").exists()
