"""Whole runs of every task and kind of forces, through the command line: train, evaluate, resume, fine-tune."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toy import make_dataset, make_relaxed_dataset, write_config

from egnscale.data.store import Store
from egnscale.launch import Calculator
from egnscale.launch.cli import main
from egnscale.launch.run_files import load_trained
from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import _seal, find_checkpoint

DIMENET = (
    "model={name: dimenetplusplus, num_blocks: 1, hidden_channels: 16, out_emb_channels: 12, int_emb_size: 8, "
    "basis_emb_size: 4, num_spherical: 4, cutoff: 4.0, max_neighbors: 20}"
)
KINDS = {"gemnet_t": ["model.forces=conservative"], "dimenetplusplus": [DIMENET]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_relaxed_dataset(make_dataset(tmp_path_factory.mktemp("data")))


def train(data: Path, output: Path, capsys: Any, *overrides: str, status: int = 0) -> Any:
    config = write_config(output.with_suffix(".yaml"), data, output)
    capsys.readouterr()
    assert main(["train", str(config), "data.workers=0", "--json", *overrides]) == status
    out, err = capsys.readouterr()
    return err if status else json.loads(out)


def losses(run: Path) -> list[float]:
    with open(run / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", KINDS)
def test_a_conservative_model_learns_and_has_the_forces_of_its_energy(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    longer = ["optim.max_steps=64", "task.eval_every=64", "optim.lr_initial=0.01"]
    report = train(data, tmp_path / "run", capsys, *KINDS[name], *longer)
    seen = losses(tmp_path / "run")
    assert np.mean(seen[-8:]) < 0.9 * np.mean(seen[:8]), "of the last epoch and the first"
    assert set(report["evaluations"]) == {"val_id", "val_ood_ads"}

    trained = load_trained(tmp_path / "run")
    assert trained.model.config.name == name
    assert trained.model.config.forces == "conservative"
    assert trained.normalizer.force_std == trained.normalizer.energy_std
    # In eV and eV/A, through the calculator: units of both must fit together.
    atoms = Store(data / "s2ef" / "val_id")[0].to_atoms()
    atoms.set_constraint()
    atoms.calc = Calculator(tmp_path / "run", dtype=torch.float64)
    forces, step = atoms.get_forces(), 1e-3
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[3, 2] += sign * step
        energies.append(moved.get_potential_energy())
    assert forces[3, 2] == pytest.approx((energies[1] - energies[0]) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_a_conservative_run_goes_on_where_it_stopped(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = train(data, tmp_path / "whole", capsys, *KINDS[name])
    train(data, tmp_path / "parts", capsys, *KINDS[name], "optim.max_steps=4", "optim.scheduler=constant")
    resumed = train(data, tmp_path / "again", capsys, *KINDS[name], "optim.scheduler=constant")
    continued = train(data, tmp_path / "parts", capsys, *KINDS[name], "optim.scheduler=constant", "--resume")
    assert whole["step"] == resumed["step"] == continued["step"] == 8
    assert losses(tmp_path / "parts") == losses(tmp_path / "again")


@pytest.mark.parametrize("name", KINDS)
def test_zero_3_trains_conservative_forces(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """By reverse over forward; the run is that of double backward under ZeRO-0, and goes on under another stage."""
    double = train(data, tmp_path / "double", capsys, *KINDS[name])
    dual = train(data, tmp_path / "dual", capsys, *KINDS[name], "parallel.zero=3")
    assert losses(tmp_path / "dual") == pytest.approx(losses(tmp_path / "double"), rel=1e-4)
    for split, metrics in double["evaluations"].items():
        assert dual["evaluations"][split]["forces_mae"] == pytest.approx(metrics["forces_mae"], rel=1e-4)
    longer = ["optim.scheduler=cosine", "optim.max_steps=10", "parallel.zero=1"]
    resumed = train(data, tmp_path / "dual", capsys, *KINDS[name], *longer, "--resume")
    assert resumed["step"] == 10
    weights = read_weights(find_checkpoint(tmp_path / "dual") / "model.safetensors")
    assert weights.keys() == load_trained(tmp_path / "double").model.state_dict().keys()


def test_zero_3_trains_direct_forces(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(data, tmp_path / "zero0", capsys)
    train(data, tmp_path / "zero3", capsys, "parallel.zero=3")
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "zero0"), rel=1e-4)


def test_relaxed_energies_are_learnt_directly(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task = ["task.name=is2re", f"data.train={data}/is2re/train", f"data.val={data}/is2re", "optim.max_steps=60"]
    report = train(data, tmp_path / "run", capsys, *task, "optim.lr_initial=0.005", "task.eval_every=20")
    metrics = report["evaluations"]["val_id"]
    assert metrics["energy_mae"] < metrics["energy_mae_mean"]
    trained = load_trained(tmp_path / "run")
    assert trained.model.config.forces == "none"
    assert not [key for key in trained.model.state_dict() if ".force." in key]
    assert (tmp_path / "run" / "training.png").stat().st_size > 10_000
    # The evaluation of the command is that of the training.
    assert main(["evaluate", str(tmp_path / "run"), str(data), "--task", "is2re", "--json"]) == 0
    split = json.loads(capsys.readouterr().out)["splits"]["val_id"]
    assert split["energy_mae"] == pytest.approx(metrics["energy_mae"], rel=1e-5)
    assert split["energy_mae_mean"] == pytest.approx(metrics["energy_mae_mean"], rel=1e-5)

    atoms = Store(data / "is2re" / "val_id")[0].to_atoms()
    atoms.calc = Calculator(tmp_path / "run")
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(NotImplementedError):
        atoms.get_forces()


@pytest.mark.parametrize(("kind", "zero"), [("direct", 0), *((kind, 0) for kind in KINDS), ("direct", 3)])
def test_fine_tuning_starts_with_the_weights_of_a_checkpoint(
    kind: str, zero: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(data, tmp_path / "s2ef", capsys, *KINDS.get(kind, []))
    before = load_trained(tmp_path / "s2ef")
    task = [
        *("task.name=is2re", f"data.train={data}/is2re/train", f"data.val={data}/is2re", "model={}"),
        *(f"task.init_from={tmp_path}/s2ef", "optim.max_steps=null", "optim.max_epochs=2", "optim.ema_decay=null"),
        *("optim.lr_initial=1e-12", "optim.weight_decay=0", "optim.scheduler={name: exponential, gamma: 0.5}"),
        f"parallel.zero={zero}",
    ]
    train(data, tmp_path / "is2re", capsys, *task)
    after = load_trained(tmp_path / "is2re")
    assert after.normalizer == before.normalizer
    assert after.model.config.name == before.model.config.name
    weights = read_weights(find_checkpoint(tmp_path / "is2re") / "model.safetensors")
    old = read_weights(find_checkpoint(tmp_path / "s2ef") / "model.safetensors")
    assert {name for name in old if name not in weights} == {name for name in old if ".force." in name}
    for name, value in weights.items():
        torch.testing.assert_close(value, old[name], rtol=1e-6, atol=1e-9)
    with open(tmp_path / "is2re" / "log.csv") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([1e-12] * 8 + [5e-13] * 8)


def test_fine_tuning_goes_on_without_the_checkpoint_that_it_started_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(data, tmp_path / "start", capsys, "optim.max_steps=1")
    how = [f"task.init_from={tmp_path}/start", "model={}", "optim.scheduler=constant"]
    train(data, tmp_path / "run", capsys, *how, "optim.max_steps=4")
    (tmp_path / "start").rename(tmp_path / "gone")
    assert train(data, tmp_path / "run", capsys, *how, "--resume")["step"] == 8
    again = train(data, tmp_path / "other", capsys, *how, status=1)
    assert "start" in again, "a new run needs it"


def test_starting_from_a_checkpoint_leaves_its_scale_factors_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also where one of them was never fitted: the weights were trained with it as it is."""
    train(data, tmp_path / "start", capsys, "optim.max_steps=1")
    checkpoint = find_checkpoint(tmp_path / "start")
    weights = read_weights(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("scale_factor"))
    weights[name] = torch.zeros(())
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "manifest.json").unlink()
    _seal(checkpoint)
    how = [f"task.init_from={tmp_path}/start", "model={}", "optim.max_steps=1", "optim.ema_decay=null"]
    train(data, tmp_path / "run", capsys, *how)
    found = read_weights(find_checkpoint(tmp_path / "run") / "model.safetensors")
    assert {k: v.item() for k, v in found.items() if k.endswith("scale_factor")} == {
        k: v.item() for k, v in weights.items() if k.endswith("scale_factor")
    }


MISTAKES = {
    "forces for is2re": (["task.name=is2re", "model.forces=direct"], "task is2re trains energies alone"),
    "metric of the other task": (["task.primary_metric=energy_within_threshold"], "task s2ef has forces_mae"),
    "no relaxed energies": (["task.name=is2re"], "have no energy_relaxed, which is2re needs"),
    "no checkpoint": (["task.init_from=nowhere"], "nowhere"),
    "two deviations, then conservative": (
        ["task.init_from={start}", "model={forces: conservative}"],
        "the normalizer of task.init_from has energy_std 1.0 and force_std 2.0",
    ),
    "other sizes": (["task.init_from={start}", "model={emb_size_edge: 20}"], "the model's is (20,"),
    "preset and checkpoint": (["task.init_from={start}", "model={preset: gemnet-dt}"], "leave model.preset out"),
    "another architecture": (["task.init_from={start}", "model={name: dimenetplusplus}"], "leave model.name out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_one_line(case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides, message = MISTAKES[case]
    if any("{start}" in override for override in overrides):
        scale = "task.normalizer={energy_mean: 0, energy_std: 1, force_std: 2}"
        train(data, tmp_path / "start", capsys, "optim.max_steps=1", scale)
    overrides = [override.replace("{start}", str(tmp_path / "start")) for override in overrides]
    problem = train(data, tmp_path / "run", capsys, *overrides, status=1)
    assert message in problem
    assert problem.count("\n") == 1
    assert not (tmp_path / "run").exists()
