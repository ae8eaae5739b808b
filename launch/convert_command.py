"""`egnscale data convert`: data of other programs into a store."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from egnscale.data.convert import convert
from egnscale.data.ranks import find_ranks

_DESCRIPTION = (
    "Convert to a store: OC20's LMDB files (S2EF directories, IS2RE and IS2RS files), OC20's raw extxyz + txt pairs, "
    ".aselmdb files, ASE databases, trajectories and whatever else ASE reads. A conversion that was stopped goes on "
    "when the same command is given again. Under mpirun, each rank converts a part of it."
)


def add_arguments(actions: Any) -> None:
    """Add `convert` to the actions of `egnscale data`."""
    parser = actions.add_parser("convert", help="convert data of OC20 or ASE to a store", description=_DESCRIPTION)
    parser.set_defaults(action_run=run)
    parser.add_argument("source", metavar="SRC", help="a file, or a directory of files of one kind")
    parser.add_argument("out", metavar="OUT", help="the store to make")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="W", help="processes, on each rank (default %(default)s)"
    )
    parser.add_argument(
        "--total-energies",
        action="store_true",
        help="keep total energies; by default the references in OC20's txt files are subtracted",
    )
    bad = parser.add_mutually_exclusive_group()
    bad.add_argument(
        "--skip-bad", action="store_true", help="leave out structures that cannot be used, and count them by reason"
    )
    bad.add_argument("--strict", action="store_true", help="stop at the first structure that cannot be used (default)")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    ranks = find_ranks()
    start = time.monotonic()
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("parts"), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = args.json or ranks.rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("converting")
        report = convert(
            args.source,
            args.out,
            workers=args.workers,
            total_energies=args.total_energies,
            skip_bad=args.skip_bad,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            ranks=ranks,
        )
    if ranks.rank > 0:
        return None
    report["seconds"] = round(time.monotonic() - start, 2)
    if not args.json:
        print(_summary(report))
    return report


def _summary(report: dict[str, Any]) -> str:
    skipped = report["skipped"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped["reasons"].items())
    left_out = f"; {skipped['count']:,} left out: {reasons}" if skipped["count"] else ""
    if report["status"] == "already there":
        return f"{report['path']} is already there, converted from the same files{left_out}"
    lines = [
        f"{report['path']}: {report['structures']:,} structures of {report['source']} ({report['kind']}) "
        f"in {report['seconds']:.0f} s{left_out}"
    ]
    return "\n".join([*lines, *(f"  {example}" for example in skipped["examples"])])
