"""Long-run hygiene on one rank: spikes and rollbacks, skipped steps, the norms' log and plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy import make_dataset, samples, write_config

from egnscale.data.store import write_store
from egnscale.launch import troubles
from egnscale.launch.cli import main
from egnscale.launch.config import load_config
from egnscale.launch.reporting import RunLog, plot_norms, read_log
from egnscale.launch.spikes import SpikeGuard
from egnscale.launch.trainer import Trainer
from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import find_checkpoint, forget_newer, whole_checkpoints

STEPS = 15


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen structures, one of which has an energy that is far off."""
    root = make_dataset(tmp_path_factory.mktemp("data"), train=16, val=2)
    made = samples(16)
    made[5] = replace(made[5], energy=1e5)
    write_store(root / "corrupt", made)
    return root


def command(data: Path, place: Path, *more: str) -> list[str]:
    config = write_config(place / "config.yaml", data, place / "run")
    return [
        "train", str(config), f"data.train={data}/corrupt", "data.workers=0", f"optim.max_steps={STEPS}",
        "task.normalizer={energy_mean: 1, energy_std: 1, force_std: 1}", "task.checkpoint_every=2", "task.eval_every=4",
        "task.rollback={factor: 20, window: 3, max: 2}", "--json", *more,
    ]  # fmt: skip


def log(run: Path) -> list[tuple[str, ...]]:
    with open(run / "log.csv") as file:
        return [(row["step"], row["epoch"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def end(run: Path) -> tuple[Any, ...]:
    """What two runs must have in common, but for the weights."""
    record = json.loads((find_checkpoint(run) / "run.json").read_text())
    kept = {key: record[key] for key in ("step", "schedule", "evaluations", "best", "spikes")}
    return log(run), kept, json.loads((run / "rollbacks.json").read_text()), sorted(p.name for p in run.glob("ch*/*"))


@pytest.fixture(scope="module")
def recovered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recovered")
    assert main(command(data, root)) == 0
    return root / "run"


def test_a_run_goes_on_after_a_spike(recovered: Path) -> None:
    rows, record, rollbacks, _ = end(recovered)
    assert [row[0] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert max(float(row[2]) for row in rows[3:]) < 500, "the spike is in the log"
    # The epoch has 8 batches, so the structure comes once or twice; nothing is read again after a rollback.
    assert 1 <= len(rollbacks) <= 2
    assert record["spikes"]["rollbacks"] == rollbacks
    skipped = sum(one["skipped_batches"] for one in rollbacks)
    assert float(rows[-1][1]) == pytest.approx((STEPS + skipped) / 8)
    for one in rollbacks:
        assert one["to_step"] < one["step"]
        assert "times the median of the last 3 steps" in one["reason"]


def killed_when(monkeypatch: pytest.MonkeyPatch, when: Callable[[Trainer], bool]) -> None:
    """End a run as a kill would, before its next step, as soon as `when` says so."""
    step = Trainer._train_step

    def dying(self: Trainer, batches: Any) -> Any:
        if when(self):
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", dying)


@pytest.mark.parametrize("moment", ["right after the rollback", "after the next checkpoint", "just before the spike"])
def test_a_killed_run_ends_the_same(
    data: Path, recovered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    first = json.loads((recovered / "rollbacks.json").read_text())[0]
    moments: dict[str, Callable[[Trainer], bool]] = {
        "right after the rollback": lambda run: len(run.guard.rollbacks) == 1,
        "after the next checkpoint": lambda run: len(run.guard.rollbacks) == 1 and run.step == first["to_step"] + 3,
        "just before the spike": lambda run: run.step == first["step"] - 1,
    }
    with monkeypatch.context() as patch:
        killed_when(patch, moments[moment])
        assert main(command(data, tmp_path)) != 0
    assert main(command(data, tmp_path, "--resume")) == 0
    assert end(tmp_path / "run") == end(recovered)
    weights, wanted = (
        read_weights(find_checkpoint(run) / "model.safetensors") for run in (tmp_path / "run", recovered)
    )
    assert weights.keys() == wanted.keys()
    assert all(weights[name].equal(wanted[name]) for name in wanted)


def test_a_run_that_cannot_recover_stops(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every batch has a spike once the weights are driven away: two rollbacks are made, and no third."""
    more = [
        f"data.train={data}/s2ef/train", "task.rollback={factor: 1.05, window: 2, max: 2}", "task.checkpoint_every=1",
        "optim.max_steps=60", "task.eval_every=60", "optim.scheduler=constant", "optim.lr_initial=5",
    ]  # fmt: skip
    status = main(command(data, tmp_path, *more))
    out, err = capfd.readouterr()
    assert status == 1
    line = err.splitlines()[-1]
    assert "2 rollbacks have been made, of at most 2 (task.rollback.max); the last checkpoint is untouched" in line
    assert err.count("rollback 2 of at most 2") == 1
    assert not out.strip()
    assert len(json.loads((tmp_path / "run" / "rollbacks.json").read_text())) == 2
    find_checkpoint(tmp_path / "run")


def test_without_a_checkpoint_a_spike_ends_the_run(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["task.checkpoint_every=100", "task.eval_every=100", "task.rollback={factor: 20, window: 1}"]
    assert main(command(data, tmp_path, *more)) == 1
    assert "there is no checkpoint to go back to yet" in capfd.readouterr().err.splitlines()[-1]


def test_a_rollback_needs_checkpoints(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, tmp_path, "task.checkpoint_every=null")) == 1
    assert "checkpoint_every" in capfd.readouterr().err.splitlines()[-1]


def test_spikes() -> None:
    guard = SpikeGuard(factor=4, window=3, max=1)
    assert guard.spike(math.nan) == "the loss became nan"
    for loss in (3.0, 1.0, 2.0):
        assert guard.spike(1e9) is None, "there is no measure yet"
        guard.add(loss)
    assert guard.spike(8.0) is None
    assert "4.5 times the median of the last 3 steps" in str(guard.spike(9.0))
    assert not guard.uneasy
    guard.add(7.0)  # above twice the median of 1, 2, 7
    assert guard.uneasy
    guard.add(2.5)
    assert not guard.uneasy


def test_an_older_checkpoint_where_the_newest_was_tried() -> None:
    guard = SpikeGuard(factor=4, window=3, max=9)
    chosen = []
    for steps in ([2, 4, 6], [2, 4, 6], [2, 4], [2], [2, 8]):
        chosen.append(guard.choose(steps))
        guard.rollbacks.append({"to_step": chosen[-1]})
    assert chosen == [6, 4, 2, 2, 8]


def test_rollbacks_that_are_newer_than_the_checkpoint(tmp_path: Path) -> None:
    guard = SpikeGuard(factor=4, window=3, max=9)
    guard.rollbacks = [{"step": 7, "to_step": 4, "skipped_batches": 3, "reason": "why"}]
    guard.write(tmp_path)
    for step, known in ((4, 1), (2, 0)):
        fresh = SpikeGuard(factor=4, window=3, max=9)
        fresh.load({"losses": [1.0], "rollbacks": []}, tmp_path, step)
        assert len(fresh.rollbacks) == known
    (tmp_path / "rollbacks.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"rollbacks\.json cannot be read"):
        fresh.load({"losses": [], "rollbacks": []}, tmp_path, 4)


def test_newer_checkpoints_are_forgotten(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "manifest.json").touch()
    assert whole_checkpoints(tmp_path) == []
    (tmp_path / "latest").write_text("step_00000006")
    forget_newer(tmp_path, "step_00000004")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]
    assert (tmp_path / "latest").read_text() == "step_00000004"
    assert not (tmp_path / "step_00000006").exists()


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments for a run in fp16 whose first loss scale is 2^power."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: [__import__("torch").float16])

    def arguments(power: int, minimum: float = 1) -> list[str]:
        fp16 = {"initial_scale_power": power, "hysteresis": 1, "loss_scale_window": 1000, "min_loss_scale": minimum}
        (tmp_path / "ds.json").write_text(json.dumps({"fp16": fp16}))
        return ["parallel={zero: 1, precision: fp16}", "--deepspeed_config", str(tmp_path / "ds.json")]

    return arguments


def test_skipped_steps_are_counted(
    data: Path, tmp_path: Path, in_fp16: Callable[..., list[str]], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from egnscale.scaling.ema import ExponentialMovingAverage

    updates = []
    update = ExponentialMovingAverage.update
    monkeypatch.setattr(ExponentialMovingAverage, "update", lambda self: (updates.append(1), update(self))[1])
    more = [f"data.train={data}/s2ef/train", "task.rollback=null", "optim.max_steps=12", "task.eval_every=12"]
    assert main(command(data, tmp_path, *more, *in_fp16(12))) == 0
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    skipped = [int(float(row["skipped_steps"])) for row in rows]
    assert 0 < skipped[-1] < 12
    assert skipped == sorted(skipped)
    assert float(rows[-1]["loss_scale"]) == 2.0 ** (12 - skipped[-1])
    assert len(updates) == 12 - skipped[-1]
    assert f"fp16: skipped steps {skipped[-1]}" in capfd.readouterr().err


def test_a_resumed_run_has_the_loss_scale(data: Path, tmp_path: Path, in_fp16: Callable[..., list[str]]) -> None:
    more = [f"data.train={data}/s2ef/train", "task.rollback=null", "task.eval_every=50", "optim.scheduler=constant"]
    for run, lengths in (("whole", [12]), ("halves", [6, 12])):
        for steps in lengths:
            place = [
                f"task.output={tmp_path}/{run}",
                f"optim.max_steps={steps}",
                "task.checkpoint_every=6",
                "data.val={}",
            ]
            assert main(command(data, tmp_path, *more, *place, *in_fp16(12), "--resume")) == 0
    assert log(tmp_path / "halves") == log(tmp_path / "whole")


def test_too_many_skipped_steps(
    data: Path, tmp_path: Path, in_fp16: Callable[..., list[str]], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The scale is at its minimum before they are counted: DeepSpeed itself would stop with an error of its own."""
    monkeypatch.setattr(troubles, "MAX_SKIPPED_STEPS", 4)
    more = [f"data.train={data}/s2ef/train", "task.rollback=null", "task.eval_every=50", "task.checkpoint_every=50"]
    assert main(command(data, tmp_path, *more, *in_fp16(21, 2.0**20))) == 1
    assert "fp16 left out 4 steps in a row, to step 4" in capfd.readouterr().err.splitlines()[-1]


def test_the_log_gets_the_columns_of_fp16(tmp_path: Path) -> None:
    begun = RunLog(tmp_path, tensorboard=False)
    begun.train(1, loss=1.0)
    begun.close()
    resumed = RunLog(tmp_path, resume_step=1, tensorboard=False, columns=("loss_scale",))
    resumed.train(2, loss=2.0, loss_scale=4.0)
    resumed.close()
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss,loss_scale", "1,1.0,", "2,2.0,4.0"]


def test_norms_are_logged_when_due(data: Path, tmp_path: Path) -> None:
    more = [f"data.train={data}/s2ef/train", "task.log_norms=2", "optim.max_steps=5", "parallel.recompute=block"]
    assert main(command(data, tmp_path, *more)) == 0
    rows = read_log(tmp_path / "run" / "norms.csv")
    assert {row["step"] for row in rows} == {2.0, 4.0}
    assert {row["layer"] for row in rows} == {"0 Embedding", "1 Block", "2 Readout"}
    whole = [row["grad_norm"] for row in read_log(tmp_path / "run" / "log.csv")]
    for step in (2, 4):
        squares = [
            float(row["value"]) ** 2 for row in rows if (row["step"], row["quantity"]) == (step, "gradient norm")
        ]
        assert math.sqrt(sum(squares)) == pytest.approx(whole[step - 1], rel=1e-5)
    assert plot_norms(tmp_path / "run") == tmp_path / "run" / "norms.png"
    assert (tmp_path / "run" / "norms.png").stat().st_size > 10_000


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_norm_before_a_step_is_that_of_deepspeed(data: Path, tmp_path: Path, zero: int, precision: str) -> None:
    """Where DeepSpeed computes one: not below stage 1 in fp32."""
    from egnscale.scaling.engine import start_world

    more = [
        f"data.train={data}/s2ef/train", "data.val={}", "optim.gradient_accumulation=2", "optim.max_steps=2",
        f"parallel={{zero: {zero}, precision: {precision}}}", "task.log_norms=1",
    ]  # fmt: skip
    _, config, *overrides = command(data, tmp_path, *more)
    overrides.remove("--json")
    made = Trainer(load_config(Path(config), overrides), start_world())
    made.run(progress=False)
    logged = float(log(tmp_path / "run")[-1][3])
    norms = [row for row in read_log(tmp_path / "run" / "norms.csv") if row["step"] == 2]
    squares = [float(row["value"]) ** 2 for row in norms if row["quantity"] == "gradient norm"]
    tolerance = 1e-5 if precision == "fp32" else 0.02
    assert math.sqrt(sum(squares)) == pytest.approx(logged, rel=tolerance)
    theirs = made.engine.gradient_norm()
    assert math.isnan(theirs) if (zero, precision) == (0, "fp32") else logged == pytest.approx(theirs, rel=tolerance)


def test_no_norms_no_files(recovered: Path) -> None:
    assert not (recovered / "norms.csv").exists()
    assert plot_norms(recovered) is None
