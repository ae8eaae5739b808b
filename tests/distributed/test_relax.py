"""Relaxations and predictions of two ranks are those of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from launchers import start, torchrun
from toy import make_dataset, samples, write_config

from egnscale.data.store import write_store
from egnscale.launch.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relax")
    config = write_config(root / "config.yaml", make_dataset(root / "data", 8, 5), root / "run")
    assert main(["train", str(config), "optim.max_steps=4", "data.workers=0", "--json"]) == 0
    made = [
        replace(
            sample, energy_relaxed=sample.energy, positions_relaxed=sample.positions + 0.03 * ~sample.fixed[:, None]
        )
        for sample in samples(7, seed=3)
    ]
    for split, some in (("train", made[:3]), ("val_id", made)):
        write_store(root / "data" / "is2re" / split, some, provenance={"calculator": "EMT"})
    return root


def on_two(*words: str) -> dict:
    result = start(torchrun(), ["-m", "egnscale.launch.cli", *words, "--json"])
    assert result.returncode == 0, result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


def on_one(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_relax(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(out: str) -> list[str]:
        store = place / "data" / "is2re" / "val_id"
        return ["relax", str(place / "run"), str(store), str(tmp_path / out), "--steps", "4", "--dtype", "float64"]

    alone, shared = on_one(capsys, *words("alone")), on_two(*words("shared"))
    for report in (alone, shared):
        report.pop("out"), report.pop("seconds")
    assert shared == alone
    for mine, theirs in zip(
        *(ase.io.read(tmp_path / name / "relaxed.extxyz", ":") for name in ("shared", "alone")), strict=True
    ):
        assert mine.info["sid"] == theirs.info["sid"]
        assert np.allclose(mine.positions, theirs.positions, atol=1e-7)
    assert len(list((tmp_path / "shared" / "trajectories").iterdir())) == 7
    # Refused on both, by one line of each.
    result = start(torchrun(), ["-m", "egnscale.launch.cli", *words("shared"), "--fmax", "0.5"])
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("egnscale relax")]
    assert lines
    assert all("was made with fmax 0.02, not 0.5" in line for line in lines)


@pytest.mark.parametrize("task", ["is2re", "is2rs"])
def test_evaluate(task: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(out: str) -> list[str]:
        more = ["--task", task, "--steps", "3", "--dtype", "float64", "--predictions", str(tmp_path / out)]
        return ["evaluate", str(place / "run"), str(place / "data"), *more]

    alone, shared = on_one(capsys, *words("alone.npz")), on_two(*words("shared.npz"))
    assert shared["splits"]["val_id"] == pytest.approx(alone["splits"]["val_id"], rel=1e-6)
    with np.load(tmp_path / "alone.npz") as theirs, np.load(tmp_path / "shared.npz") as mine:
        assert mine.files == theirs.files
        for name in mine.files:
            if name == "ids":
                assert mine[name].tolist() == theirs[name].tolist()
            else:
                assert np.allclose(mine[name], theirs[name], atol=1e-7)


@pytest.mark.parametrize("graph", [1, 2])
def test_s2ef_predictions(graph: int, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(out: str) -> list[str]:
        more = ["--predictions", str(tmp_path / out), "--full-precision", "--batch-size", "2"]
        return ["evaluate", str(place / "run"), str(place / "data"), *more]

    on_one(capsys, *words("alone.npz")), on_two(*words("shared.npz"), "--graph", str(graph))
    with np.load(tmp_path / "alone.npz") as theirs, np.load(tmp_path / "shared.npz") as mine:
        assert mine.files == theirs.files
        for name in mine.files:
            if name.endswith("ids"):
                assert mine[name].tolist() == theirs[name].tolist()
            else:
                assert np.allclose(mine[name], theirs[name], atol=1e-4)
