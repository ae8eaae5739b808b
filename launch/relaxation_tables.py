"""Tables of IS2RE and IS2RS metrics, one row per split, for rich's console. People are shown meV and percent."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from egnscale.launch.reporting import s2ef_table

#: Heading, metric, factor and format of each column.
_Columns = tuple[tuple[str, str, float, str], ...]
_IS2RE: _Columns = (
    ("energy\nMAE\n\\[meV]", "energy_mae", 1e3, ".1f"),
    ("of the\nmean\n\\[meV]", "energy_mae_mean", 1e3, ".1f"),
    ("energy\nMSE\n\\[eV²]", "energy_mse", 1.0, ".4f"),
    ("EwT\n\\[%]", "energy_within_threshold", 1e2, ".2f"),
    ("struc-\ntures", "structures", 1.0, ".0f"),
    ("failed", "failed", 1.0, ".0f"),
)
_IS2RS: _Columns = (
    ("ADwT\n\\[%]", "adwt", 1e2, ".2f"),
    ("unre-\nlaxed", "adwt_initial", 1e2, ".2f"),
    ("FbT\n\\[%]", "fbt", 1e2, ".2f"),
    ("unre-\nlaxed", "fbt_initial", 1e2, ".2f"),
    ("AFbT\n\\[%]", "afbt", 1e2, ".2f"),
    ("unre-\nlaxed", "afbt_initial", 1e2, ".2f"),
    ("posi-\ntions\nMAE \\[Å]", "positions_mae", 1.0, ".4f"),
    ("unre-\nlaxed", "positions_mae_initial", 1.0, ".4f"),
    ("con-\nverged", "converged", 1.0, ".0f"),
    ("failed", "failed", 1.0, ".0f"),
    ("struc-\ntures", "structures", 1.0, ".0f"),
    ("steps\n(mean)", "steps", 1.0, ".0f"),
)


def task_table(task: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """The table of a task; metrics that are missing or NaN are shown as "-"."""
    if task == "s2ef":
        return s2ef_table(results)
    missing = sum(metrics.get("forces_missing", 0.0) for metrics in results.values())
    caption = (
        f"{missing:.0f} structures have no reference forces, and count as above every threshold" if missing else None
    )
    table = Table(caption=caption)
    columns = _IS2RE if task == "is2re" else _IS2RS
    table.add_column("split", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right")
    for split, metrics in results.items():
        values = [(metrics.get(name, math.nan), factor, form) for _, name, factor, form in columns]
        table.add_row(
            split, *("-" if math.isnan(value) else format(factor * value, form) for value, factor, form in values)
        )
    return table
