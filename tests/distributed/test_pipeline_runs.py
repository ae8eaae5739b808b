"""Runs in a pipeline: they go on under another cut or none, predict and relax as one process, and end in one line."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from launchers import start, torchrun
from safetensors.torch import load_file
from spawn import spawn
from toy import make_dataset, samples, write_config

from egnscale.launch.cli import main
from egnscale.models import build_model
from egnscale.scaling.checkpoint import find_checkpoint

STEPS, MICRO_BATCHES = 4, 4
#: Ranks, stages, precision (+fp32: gradients are added up in it); ranks besides the stages share graphs.
Layout = tuple[int, int, str]
PAIRS: list[tuple[Layout, Layout]] = [
    ((4, 4, "fp32"), (2, 2, "fp32")),
    ((4, 4, "fp32"), (1, 1, "fp32")),
    ((2, 2, "fp32"), (1, 1, "fp32")),
    ((1, 1, "fp32"), (2, 2, "fp32")),
    ((1, 1, "fp32"), (4, 4, "fp32")),
    ((2, 2, "fp32"), (4, 4, "fp32")),
    ((4, 2, "fp32"), (2, 2, "fp32")),
    ((2, 2, "bf16"), (1, 1, "bf16")),
    ((1, 1, "bf16"), (2, 2, "bf16")),
    ((2, 2, "bf16+fp32"), (1, 1, "bf16")),
    ((1, 1, "bf16"), (2, 2, "bf16+fp32")),
]


def name(*layouts: Layout) -> str:
    return "-".join(f"{ranks}x{pipe}{precision}" for ranks, pipe, precision in layouts)


def words(config: str, layout: Layout, *more: str) -> list[str]:
    ranks, pipe, precision = layout
    precision, _, fp32 = precision.partition("+")
    return [
        "train", config, *(["--deepspeed_config", "zero1-bf16"] if fp32 else []),
        f"task.output={Path(config).parent}", "parallel.zero=1",
        f"parallel.pipe={pipe}",
        f"parallel.graph={ranks // pipe}", f"parallel.precision={precision}", "model.num_blocks=3",
        f"optim.max_steps={STEPS}", f"optim.gradient_accumulation={MICRO_BATCHES}", "optim.clip_grad_norm=0.5",
        "data.workers=0", "task.eval_every=100", "task.checkpoint_every=2", "--debug", *more,
    ]  # fmt: skip


def train(world: Any, runs: list[tuple[str, Layout]]) -> None:
    """DeepSpeed keeps a pipeline's grid for the whole process: runs without one come first."""
    for config, layout in sorted(runs, key=lambda run: run[1][1]):
        assert main([*words(config, layout), "--resume"]) == 0


def on_ranks(runs: list[tuple[str, Layout]]) -> None:
    # A grid is made for one number of stages.
    for ranks, pipe in sorted({layout[:2] for _, layout in runs}):
        spawn(ranks, train, [(config, layout) for config, layout in runs if layout[:2] == (ranks, pipe)])


def log(run: Path) -> list[dict[str, float]]:
    with open(run / "log.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs, and what their second steps go on to under other layouts."""
    place = tmp_path_factory.mktemp("runs")
    data = make_dataset(place / "data", train=24, val=5)
    sources = {source for source, _ in PAIRS}
    for layout in sources:
        (place / name(layout)).mkdir()
        write_config(place / name(layout) / "config.yaml", data, place / name(layout))
    on_ranks([(str(place / name(layout) / "config.yaml"), layout) for layout in sources])
    resumed = []
    for source, target in PAIRS:
        run, before = place / name(source, target), place / name(source)
        (run / "checkpoints").mkdir(parents=True)
        shutil.copytree(before / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000002")
        (run / "checkpoints" / "latest").write_text("step_00000002")
        for file in ("log.csv", "config.yaml"):
            shutil.copy(before / file, run / file)
        resumed.append((str(run / "config.yaml"), target))
    on_ranks(resumed)
    return place


@pytest.mark.parametrize("source, target", PAIRS, ids=lambda pair: name(pair))
def test_a_run_goes_on_under_another_cut(root: Path, source: Layout, target: Layout) -> None:
    wanted, found = log(root / name(source)), log(root / name(source, target))
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    limit = 1e-6 if "bf16" not in source[2] else 5e-3
    for quantity in ("loss", "grad_norm"):
        for mine, theirs in zip(found[2:], wanted[2:], strict=True):
            assert mine[quantity] == pytest.approx(theirs[quantity], rel=limit if quantity == "loss" else 20 * limit)
    runs = name(source), name(source, target)
    weights = [load_file(find_checkpoint(root / run) / "model.safetensors") for run in runs]
    assert weights[0].keys() == weights[1].keys() == build_model(**model_of(root)).state_dict().keys()
    if "bf16" not in source[2]:
        for key, value in weights[0].items():
            assert torch.allclose(value, weights[1][key], rtol=1e-4, atol=1e-6), key


def model_of(root: Path) -> dict[str, Any]:
    checkpoint = find_checkpoint(root / name((2, 2, "fp32")))
    return json.loads((checkpoint / "run.json").read_text())["model"]


def test_bubbles_are_logged(root: Path) -> None:
    run = root / name((2, 2, "fp32"))
    with open(run / "pipeline.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["stage"] for row in rows] == [0, 1] * STEPS
    assert all(row["computing"] > 0 and row["waiting"] > 0 for row in rows)
    for step in log(run):
        mine = [row for row in rows if row["step"] == step["step"]]
        waiting = sum(row["waiting"] for row in mine)
        assert step["bubble"] == pytest.approx(waiting / (waiting + sum(row["computing"] for row in mine)))
        assert 0 < step["bubble"] < 1 <= step["stage_imbalance"]


def on_two(*words: str) -> dict:
    result = start(torchrun(), ["-m", "egnscale.launch.cli", *words, "--pipe", "2", "--json"])
    assert result.returncode == 0, result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


def on_one(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluation(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(out: str) -> list[str]:
        run = root / name((1, 1, "fp32"))
        return ["evaluate", str(run), str(root / "data"), "--batch-size", "2", "--predictions", str(tmp_path / out)]

    assert on_two(*words("two.npz")) == on_one(capsys, *words("one.npz"))
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert sorted(one) == sorted(two)
        assert all(np.array_equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def conservative(root: Path) -> Path:
    """A trained DimeNet++."""
    config = write_config(root / "dimenet.yaml", root / "data", root / "dimenet")
    lines = [line for line in config.read_text().splitlines() if "emb_size_rbf" not in line and "model:" not in line]
    model = "model: {name: dimenetplusplus, num_blocks: 3, hidden_channels: 12, out_emb_channels: 10, int_emb_size: 6, "
    model += "basis_emb_size: 4, num_radial: 4, num_spherical: 3, cutoff: 4.0, max_neighbors: 20}"
    config.write_text("\n".join([model, *lines]))
    assert main(["train", str(config), "optim.max_steps=2", "data.workers=0", "--json"]) == 0
    return root / "dimenet"


def test_relaxation(root: Path, conservative: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Forces through the pipeline, for several structures at once, that end at different steps."""

    def words(out: str) -> list[str]:
        store = root / "data" / "s2ef" / "val_id"
        return ["relax", str(conservative), str(store), str(tmp_path / out), "--steps", "5", "--dtype", "float64"]

    alone, shared = on_one(capsys, *words("alone")), on_two(*words("shared"))
    for report in (alone, shared):
        report.pop("out"), report.pop("seconds")
    assert shared == alone
    for mine, theirs in zip(
        *(ase.io.read(tmp_path / which / "relaxed.extxyz", ":") for which in ("shared", "alone")), strict=True
    ):
        assert mine.info["sid"] == theirs.info["sid"]
        assert np.allclose(mine.positions, theirs.positions, atol=1e-9)


def calculated(world: Any, run: Path) -> tuple[float, np.ndarray]:
    from egnscale.launch.calculator import Calculator
    from egnscale.scaling.layout import Mesh

    atoms = samples(1, seed=7)[0].to_atoms()
    mesh = None if world.size == 1 else Mesh.of_world(world.device, pipe=2)
    atoms.calc = Calculator(run, dtype=torch.float64, mesh=mesh)
    return atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)


def test_calculator(conservative: Path) -> None:
    ((energy, forces),) = spawn(1, calculated, conservative)
    for theirs in spawn(2, calculated, conservative):
        assert theirs[0] == pytest.approx(energy, abs=1e-10)
        assert np.allclose(theirs[1], forces, atol=1e-10)


# What ends a run


def test_too_many_stages(root: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", root / "data", tmp_path / "run")
    result = start([*torchrun()[:-1], "3"], config, "parallel.pipe=3", "parallel.zero=1")
    assert result.returncode != 0
    line = "egnscale train [rank 0]: parallel.pipe is 3, and a model of 1 blocks can be cut into at most 2 stages"
    assert any(said.startswith(line) for said in result.stderr.splitlines())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["parallel.zero=0"], "DeepSpeed clips gradients by the norm of one stage; set parallel.zero to 1"),
        (["parallel.zero=2"], "DeepSpeed's pipelines know no ZeRO-2; set parallel.zero to 1, or parallel.pipe to 1"),
        (["parallel.zero=1", "parallel.offload=optimizer"], "offloading has not been tried in a pipeline"),
    ],
)
def test_what_does_not_go_with_a_pipeline(
    root: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", root / "data", tmp_path / "run")
    result = start(torchrun(), config, "parallel.pipe=2", *overrides)
    assert result.returncode != 0
    assert message in result.stderr
    assert main(["train", str(config), "parallel.pipe=2", "parallel.zero=1"]) == 1
    assert "pipe(2) x graph(1) = 2 does not divide 1 rank" in capsys.readouterr().err


def test_deepspeed_without_the_names_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from egnscale.scaling import pipeline

    pipeline.check_deepspeed()
    monkeypatch.delattr(pipeline.PipelineEngine, "_exec_schedule")
    with pytest.raises(ValueError, match=r"private names of DeepSpeed 0.19.*; this is .*, and lacks _exec_schedule"):
        pipeline.check_deepspeed()
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.deepspeed, "__version__", "0.20.1")
    with pytest.raises(ValueError, match=r"this is 0.20.1; install deepspeed==0.19"):
        pipeline.check_deepspeed()
