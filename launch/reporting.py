"""What a person sees of a run: log files, a plot of them, the table of an evaluation, a progress line.

The log is two CSV files that any tool reads, `log.csv` (one row per `log_every` steps) and `eval.csv` (one per
evaluation and split), and the same numbers for TensorBoard. Where ranks share graphs, `exchanges.csv` says what rank 0
exchanged, layer by layer; in a pipeline, `pipeline.csv` says how long each stage computed and waited; with
`task.log_norms`, `norms.csv` says how large each layer's numbers are. Energies eV, forces eV/A; people are shown meV.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from egnscale.data.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

    from egnscale.launch.norms import Norm
    from egnscale.scaling.collectives import Site, Tally
    from egnscale.scaling.pipeline import StageTime

TRAIN_LOG = "log.csv"
EVAL_LOG = "eval.csv"
EXCHANGE_LOG = "exchanges.csv"
NORM_LOG = "norms.csv"
PIPELINE_LOG = "pipeline.csv"
PLOT = "training.png"
NORM_PLOT = "norms.png"
TENSORBOARD = "tensorboard"
#: Seconds of reading after which something is said of it.
LONG = 10.0


class RunLog:
    """The log files of a run, written by one process.

    Args:
        directory: of the run; made if it does not exist.
        resume_step: rows of later steps are removed, since those steps are about to be made again; 0 begins anew.
        tensorboard: write event files as well, under `tensorboard/`.
        columns: of `log.csv`, which get a place in it if the run was begun without them.
    """

    def __init__(
        self, directory: Path | str, resume_step: int = 0, tensorboard: bool = True, columns: Sequence[str] = ()
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._train = _CsvLog(self.directory / TRAIN_LOG, resume_step, columns)
        self._eval = _CsvLog(self.directory / EVAL_LOG, resume_step)
        #: Files that a run may do without.
        self._others = {
            name: _CsvLog(self.directory / name, resume_step)
            for name in (EXCHANGE_LOG, NORM_LOG, PIPELINE_LOG)
            if (self.directory / name).exists()
        }
        self._resume_step = resume_step
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None

    def train(self, step: int, **values: float) -> None:
        """Add a row to `log.csv`."""
        self._train.add({"step": step, **values})
        self._scalars("train", step, values)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Add a row to `eval.csv`."""
        self._eval.add({"step": step, "split": split, **metrics})
        self._scalars(split, step, metrics)

    def exchanges(self, step: int, tallies: Mapping[Site, Tally]) -> None:
        """Add to `exchanges.csv` what one rank exchanged in a step, by layer and verb."""
        for site, tally in tallies.items():
            self._other(EXCHANGE_LOG).add({"step": step, **site._asdict(), **asdict(tally)})

    def stages(self, step: int, times: Sequence[StageTime]) -> None:
        """Add to `pipeline.csv` what each stage of a pipeline did in a step."""
        for stage, (computing, total) in enumerate(times):
            self._other(PIPELINE_LOG).add(
                {"step": step, "stage": stage, "computing": computing, "waiting": total - computing}
            )

    def norms(self, step: int, norms: Iterable[Norm]) -> None:
        """Add to `norms.csv` how large each layer's numbers were in a step."""
        for norm in norms:
            self._other(NORM_LOG).add({"step": step, **norm._asdict()})

    def _other(self, name: str) -> _CsvLog:
        if name not in self._others:
            self._others[name] = _CsvLog(self.directory / name, self._resume_step)
        return self._others[name]

    def close(self) -> None:
        """Close all files; rows were on disk as soon as they were added."""
        self._train.close()
        self._eval.close()
        for log in self._others.values():
            log.close()
        if self._writer is not None:
            self._writer.close()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if not self._tensorboard:
            return
        if self._writer is None:
            # Imported here: it takes seconds. What TensorBoard holds of steps to be made again is hidden by purging.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory / TENSORBOARD), purge_step=self._resume_step + 1)
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)


class _CsvLog:
    """A CSV file with a column `step`. The first row ever written fixes the header, but for `columns` added to it."""

    def __init__(self, path: Path, resume_step: int, columns: Sequence[str] = ()) -> None:
        self.path = path
        self.header: list[str] = []
        if path.exists():
            self.header, rows = _read_rows(path)
            # Through a temporary file and a rename: a process killed here leaves the old log or the new one.
            with replacing(path) as rewritten, rewritten.open("w", newline="", encoding="utf-8") as file:
                kept = [row for row in rows if int(float(row[self.header.index("step")])) <= resume_step]
                if kept:
                    added = [name for name in columns if name not in self.header]
                    self.header = [*self.header, *added]
                    csv.writer(file).writerows([self.header, *(row + [""] * len(added) for row in kept)])
                else:
                    self.header = []
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and hand it to the operating system; a value that is missing is left empty.

        Raises:
            ValueError: for a column that the file does not have.
        """
        if not self.header:
            self.header = list(row)
            self._writer.writerow(self.header)
        unknown = [name for name in row if name not in self.header]
        if unknown:
            raise ValueError(
                f"{self.path} has no column {', '.join(unknown)}; its columns are {', '.join(self.header)}"
            )
        self._writer.writerow([row.get(name, "") for name in self.header])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and whole rows; a last line cut short by a kill is left out.

    Raises:
        ValueError: if the file is no log.
    """
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if not rows:
        return ["step"], []
    header, *rows = rows
    if "step" not in header:
        raise ValueError(f"{path} is no log of a run: it has no column 'step' (columns: {', '.join(header)})")
    return header, [row for row in rows if len(row) == len(header)]


def read_log(path: Path) -> list[dict[str, float | str]]:
    """The rows of `log.csv`, `eval.csv` or `norms.csv`, numbers as floats (NaN where empty); [] if there is none."""
    if not path.exists():
        return []
    header, rows = _read_rows(path)
    return [
        {
            name: text if name in ("split", "layer", "quantity") else float(text) if text else math.nan
            for name, text in zip(header, row, strict=True)
        }
        for row in rows
    ]


def plot_training(directory: Path | str) -> Path:
    """Draw loss, energy error and, where there is one, force error against steps into `training.png`; returns its path.

    Dashed lines are what costs nothing: predicting the training set's mean energy, and no forces.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(directory)
    train, evaluations = read_log(directory / TRAIN_LOG), read_log(directory / EVAL_LOG)
    with_forces = any("forces_mae" in row for row in evaluations) or not evaluations
    figure = Figure(figsize=(12 if with_forces else 8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, energy, *forces = figure.subplots(1, 3 if with_forces else 2)
    _plot_loss(loss, train)
    _plot_errors(energy, evaluations, "energy_mae", "energy_mae_mean")
    energy.set(title="Validation energy\n(dashed: predicting the mean)", ylabel="MAE [meV]")
    for axes in forces:
        _plot_errors(axes, evaluations, "forces_mae", "forces_mae_zero")
        axes.set(title="Validation forces\n(dashed: predicting none)", ylabel="MAE [meV/Å]")
    for axes in (loss, energy, *forces):
        axes.set_xlabel("step")
    if evaluations:
        lines, splits = energy.get_legend_handles_labels()
        figure.legend(lines, splits, loc="outside lower center", ncols=len(splits), frameon=False)
    path = directory / PLOT
    with replacing(path) as rewritten:
        figure.savefig(rewritten, dpi=150)
    return path


def plot_norms(directory: Path | str) -> Path | None:
    """Draw gradient and weight norms, and the RMS of what layers make first, against steps into `norms.png`.

    Returns its path; None where no norms were logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(directory)
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in read_log(directory / NORM_LOG):
        point = (float(row["step"]), float(row["value"]))
        curves.setdefault((str(row["layer"]), str(row["quantity"])), []).append(point)
    if not curves:
        return None
    # The features come first in a State, and first of all in the log.
    feature = next(quantity for _, quantity in curves)
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, quantity in zip(figure.subplots(1, 3), ("gradient norm", "weight norm", feature), strict=True):
        for (layer, name), points in curves.items():
            if name == quantity:
                axes.plot(*zip(*points, strict=True), label=layer)
        axes.set(title=quantity, xlabel="step", yscale="log")
        axes.legend(frameon=False, fontsize="small")
    path = directory / NORM_PLOT
    with replacing(path) as rewritten:
        figure.savefig(rewritten, dpi=150)
    return path


def _plot_loss(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The loss of each row and, where there are many, a running mean over a fiftieth of them."""
    import numpy as np

    axes.set(title="Training loss", ylabel="loss (normalised)")
    steps = np.array([row["step"] for row in rows])
    values = np.array([row["loss"] for row in rows])
    width = max(len(values) // 50, 1)
    if width == 1:
        axes.plot(steps, values)
    else:
        axes.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], mean, color="C0", label=f"mean of {width} rows")
        axes.legend(frameon=False)
    _log_scale(axes, values)


def _plot_errors(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, baseline: str) -> None:
    """One line per split and, dashed in the same colour, its baseline; in thousandths."""
    shown: list[float] = []
    for number, split in enumerate(dict.fromkeys(row["split"] for row in rows)):
        own = [row for row in rows if row["split"] == split]
        values = [1e3 * row[metric] for row in own]
        level = 1e3 * own[-1].get(baseline, math.nan)
        axes.plot([row["step"] for row in own], values, f"C{number}.-", label=split)
        axes.axhline(level, color=f"C{number}", linestyle="--", linewidth=1)
        shown += [*values, level]
    _log_scale(axes, shown)


def _log_scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis with plain numbers on it; left alone if there is nothing positive to show."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not any(value > 0 for value in values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


#: Heading, metric, factor and format of each column of `s2ef_table`.
_COLUMNS = (
    ("energy\nMAE\n\\[meV]", "energy_mae", 1e3, ".1f"),
    ("of the\nmean\n\\[meV]", "energy_mae_mean", 1e3, ".1f"),
    ("force\nMAE\n\\[meV/Å]", "forces_mae", 1e3, ".2f"),
    ("of no\nforces\n\\[meV/Å]", "forces_mae_zero", 1e3, ".2f"),
    ("force\ncosine", "forces_cos", 1.0, ".3f"),
    ("EFwT\n\\[%]", "energy_forces_within_threshold", 1e2, ".2f"),
)


def s2ef_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of S2EF metrics, one row per split, for rich's console; metrics that are missing are shown as "-"."""
    table = Table()
    table.add_column("split", no_wrap=True)
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right")
    for split, metrics in results.items():
        cells = (format(factor * metrics[name], form) if name in metrics else "-" for _, name, factor, form in _COLUMNS)
        table.add_row(split, *cells)
    return table


class TrainingProgress:
    """A live line on a terminal, a plain line every `log_every` steps elsewhere, nothing when disabled.

    Written to standard error: standard output belongs to results.

    Args:
        total: steps of the run.
        enabled: False on all ranks but one.
        start: steps made before, when resuming.
        log_every: steps between plain lines.
        console: where to write.
    """

    def __init__(
        self,
        total: int,
        enabled: bool = True,
        start: int = 0,
        log_every: int = 10,
        console: Console | None = None,
    ) -> None:
        self.total, self.start, self.log_every, self.enabled = total, start, log_every, enabled
        self.console = console or Console(file=sys.stderr)
        self._began = time.monotonic()
        self._live: Progress | None = None
        if enabled and self.console.is_terminal:
            self._live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._live.add_task("", total=total, completed=start)

    def __enter__(self) -> TrainingProgress:
        self._began = time.monotonic()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, *, loss: float, atoms_per_second: float) -> None:
        """Show that `step` steps are made."""
        if not self.enabled:
            return
        what = f"loss {loss:.4g}  {atoms_per_second:,.0f} atoms/s"
        if self._live:
            self._live.update(self._task, completed=step, description=what)
        elif step % self.log_every == 0 or step == self.total:
            pace = (time.monotonic() - self._began) / max(step - self.start, 1)
            left = _clock(pace * (self.total - step))
            print(f"step {step}/{self.total}  {what}  {left} left", file=self.console.file, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def show_reading(path: str | Path) -> Iterator[Callable[[int, int], None]]:
    """Progress of reading structures once, on standard error: a live line on a terminal, else one line if it is long.

    What is yielded may be called later, too.
    """
    began, said, open_line = time.monotonic(), False, False

    def show(done: int, total: int) -> None:
        nonlocal began, said, open_line
        if done == 0:
            began, said = time.monotonic(), False
        count = f"{path}: {done:,} of {total:,} structures read"
        if sys.stderr.isatty():
            open_line = done < total
            print(f"\r{count}", end="" if open_line else "\n", file=sys.stderr, flush=True)
        elif not said and done < total and time.monotonic() - began > LONG:
            said = True
            print(f"{count} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if open_line:
            print(file=sys.stderr)
