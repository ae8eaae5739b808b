"""Logs that survive a kill and a resume, the plot, the table, the progress line."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from egnscale.launch.reporting import RunLog, TrainingProgress, plot_training, read_log, s2ef_table

METRICS = {
    "energy_mae": 0.2701,
    "energy_mae_mean": 2.1,
    "forces_mae": 0.0204,
    "forces_mae_zero": 0.084,
    "forces_cos": 0.6603,
    "energy_forces_within_threshold": 0.0181,
}


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def _write(directory: Path, steps: range, resume_step: int = 0) -> None:
    log = RunLog(directory, resume_step, tensorboard=False)
    for step in steps:
        log.train(step, loss=100.0 / step, lr=1e-4)
        if step % 5 == 0:
            for split in ("val_id", "val_ood"):
                log.evaluation(step, split, {name: value / step for name, value in METRICS.items()})
    log.close()


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.train(10, loss=1.5, lr=1e-4)
    log.evaluation(10, "val", {"forces_mae": 0.25})
    assert _rows(tmp_path / "log.csv") == [["step", "loss", "lr"], ["10", "1.5", "0.0001"]]
    assert _rows(tmp_path / "eval.csv") == [["step", "split", "forces_mae"], ["10", "val", "0.25"]]
    log.close()


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.train(1, loss=1 / 3, lr=1e-300)
    log.train(2, loss=float("nan"))
    log.close()
    first, second = read_log(tmp_path / "log.csv")
    assert (first["loss"], first["lr"]) == (1 / 3, 1e-300)
    assert second["loss"] != second["loss"]
    assert second["lr"] != second["lr"], "a value that is missing reads as NaN"


@pytest.mark.parametrize("killed_at", [12, 15, 19])
def test_a_resumed_log_is_that_of_one_run(tmp_path: Path, killed_at: int) -> None:
    _write(tmp_path / "whole", range(1, 21))
    _write(tmp_path / "parts", range(1, killed_at + 1))
    _write(tmp_path / "parts", range(11, 21), resume_step=10)
    for name in ("log.csv", "eval.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["eval.csv", "log.csv"]


@pytest.mark.parametrize("torn", ["6", "6,1", "6,16.6,0.00"])
def test_a_row_cut_short_by_a_kill_is_left_out(tmp_path: Path, torn: str) -> None:
    _write(tmp_path / "whole", range(1, 7))
    _write(tmp_path / "killed", range(1, 6))
    with (tmp_path / "killed" / "log.csv").open("a") as file:
        file.write(torn)
    assert len(read_log(tmp_path / "killed" / "log.csv")) == 5
    _write(tmp_path / "killed", range(6, 7), resume_step=6)
    assert (tmp_path / "killed" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 11))
    log = RunLog(tmp_path, tensorboard=False)
    log.train(1, other=2.0)
    log.close()
    assert _rows(tmp_path / "log.csv") == [["step", "other"], ["1", "2.0"]]


def test_the_header_is_fixed(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 3))
    log = RunLog(tmp_path, resume_step=2, tensorboard=False)
    with pytest.raises(ValueError, match=r"log\.csv has no column colour; its columns are step, loss, lr"):
        log.train(3, loss=1.0, colour=1.0)
    log.close()


def test_not_a_log(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        RunLog(tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume_step in ((range(1, 6), 0), (range(4, 8), 3)):
        log = RunLog(tmp_path, resume_step)
        for step in steps:
            log.train(step, loss=float(10 * step + resume_step))
        log.evaluation(steps[-1], "val", METRICS)
        log.close()
        # Event files are read in the order of their names, which tell seconds apart; a resumed run starts later.
        time.sleep(1.1)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/forces_mae"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        *((step, 10.0 * step) for step in range(1, 4)),
        *((step, 10.0 * step + 3) for step in range(4, 8)),
    ]


@pytest.mark.parametrize("steps", [0, 1, 12, 400])
def test_plot(tmp_path: Path, steps: int) -> None:
    _write(tmp_path, range(1, steps + 1))
    path = plot_training(tmp_path)
    assert path == tmp_path / "training.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_plot_shows_every_split_and_its_baseline_in_milli_units(tmp_path: Path) -> None:
    from matplotlib.colors import same_color
    from matplotlib.figure import Figure

    from egnscale.launch.reporting import _plot_errors

    _write(tmp_path, range(1, 11))
    axes = Figure().subplots()
    _plot_errors(axes, read_log(tmp_path / "eval.csv"), "forces_mae", "forces_mae_zero")
    first, first_baseline, second, second_baseline = axes.get_lines()
    assert [first.get_label(), second.get_label()] == ["val_id", "val_ood"]
    assert list(first.get_xdata()) == [5, 10]
    assert list(first.get_ydata()) == pytest.approx([20.4 / 5, 20.4 / 10])
    for line, baseline in ((first, first_baseline), (second, second_baseline)):
        assert baseline.get_ydata()[0] == pytest.approx(8.4)
        assert baseline.get_linestyle() == "--"
        assert same_color(baseline.get_color(), line.get_color())


def test_table() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(s2ef_table({"val_id": {**METRICS, "step": 5}, "val_ood": {"energy_mae": 1.0}}))
    lines = console.file.getvalue().splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    assert cells["val_id"] == ["270.1", "2100.0", "20.40", "84.00", "0.660", "1.81"]
    assert cells["val_ood"] == ["1000.0", "-", "-", "-", "-", "-"]


def _progress(terminal: bool, enabled: bool, log_every: int = 10) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with TrainingProgress(40, enabled=enabled, start=15, log_every=log_every, console=console) as progress:
        for step in range(16, 41):
            progress.update(step, loss=0.125, atoms_per_second=12345.6)
    return console.file.getvalue()


def test_progress_without_a_terminal_is_a_plain_line_now_and_then() -> None:
    lines = _progress(terminal=False, enabled=True, log_every=15).splitlines()
    assert [line.split()[1] for line in lines] == ["30/40", "40/40"]
    assert lines[0] == "step 30/40  loss 0.125  12,346 atoms/s  0:00:00 left"


def test_progress_on_a_terminal_is_live() -> None:
    text = _progress(terminal=True, enabled=True)
    assert "step 40/40" in text
    assert "loss 0.125  12,346 atoms/s" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_silent_when_disabled(terminal: bool) -> None:
    assert _progress(terminal, enabled=False) == ""
