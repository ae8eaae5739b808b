"""`egnscale data make`, `convert` and `info`: make an EMT data set, convert one, say what a data set holds."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from egnscale.data.dataset import Dataset, open_dataset
from egnscale.data.emt import TASKS, make_emt
from egnscale.data.emt_systems import ADSORBATES, METALS, MIN_STRUCTURES, SPLITS, EmtOptions
from egnscale.launch import convert_command
from egnscale.launch.reporting import show_reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    default = EmtOptions()
    text = "relax adsorbates on slabs of metals and alloys under ASE's EMT, and split them as OC20 does"
    make = actions.add_parser("make", help=text, description=text)
    make.set_defaults(action_run=_make)
    make.add_argument("out", metavar="OUT", help="directory to make; a build that was stopped goes on")
    make.add_argument(
        "--structures",
        type=int,
        default=default.structures,
        metavar="N",
        help=f"relaxations over all splits together, at least {MIN_STRUCTURES} (default {default.structures})",
    )
    make.add_argument("--seed", type=int, default=default.seed, metavar="S", help="default %(default)s")
    make.add_argument("--workers", type=int, default=2, metavar="W", help="processes (default %(default)s)")
    make.add_argument(
        "--metals", type=_names, default=METALS, metavar="A,B,...", help=f"default {','.join(METALS)} and their alloys"
    )
    make.add_argument("--size", type=_size, metavar="RxCxL", help="atoms x atoms x layers (default: 36 to 100 atoms)")
    make.add_argument(
        "--adsorbates",
        type=_names,
        default=default.adsorbates,
        metavar="A,B,...",
        help=f"default: all of {','.join(ADSORBATES)}",
    )
    make.add_argument(
        "--max-steps",
        type=int,
        default=default.max_steps,
        metavar="K",
        help="steps of a relaxation (default %(default)s)",
    )
    make.add_argument(
        "--fmax", type=float, default=default.fmax, metavar="F", help="eV/A, where it ends (default %(default)s)"
    )
    make.add_argument(
        "--rattle",
        type=float,
        default=default.rattle,
        metavar="A",
        help="random displacements of the free atoms at the start, standard deviation in A (default %(default)s)",
    )
    convert_command.add_arguments(actions)
    text = "count structures, systems, atoms, edges and elements; show energies and forces"
    info = actions.add_parser("info", help=text, description=text)
    info.set_defaults(action_run=_info)
    info.add_argument("path", metavar="PATH", help="a store, a directory of stores, or OC20's LMDB files")
    info.add_argument("--verify", action="store_true", help="read every record and compare every checksum")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    return args.action_run(args)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _size(text: str) -> tuple[int, int, int]:
    try:
        along, across, layers = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 3x3x4") from None
    return along, across, layers


# ------------------------------------------------------------------------------------------------------------- make


def _make(args: argparse.Namespace) -> dict[str, Any]:
    options = EmtOptions(
        structures=args.structures,
        seed=args.seed,
        metals=args.metals,
        size=args.size,
        adsorbates=args.adsorbates,
        max_steps=args.max_steps,
        fmax=args.fmax,
        rattle=args.rattle,
    )
    start = time.monotonic()
    columns = (TextColumn("relaxing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=args.json or not console.is_terminal) as bar:
        task = bar.add_task("relaxing", total=options.structures)
        report = make_emt(
            args.out,
            options,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    report |= {"path": args.out, "seconds": round(time.monotonic() - start, 2)}
    if not args.json:
        print(_made(report))
    return report


def _made(report: dict[str, Any]) -> str:
    if report["status"] == "already there":
        return f"{report['path']} is already there, made with the same options"
    held_out = ", ".join([*report["held_out_metals"], *report["held_out_adsorbates"]]) or "nothing"
    return (
        f"{report['path']}: {report['systems']} systems, {report['frames']} frames in {report['seconds']:.0f} s; "
        f"{report['converged']} converged, {report['dropped_frames']} frames filtered out; held out: {held_out}"
    )


# ------------------------------------------------------------------------------------------------------------- info


def _info(args: argparse.Namespace) -> dict[str, Any]:
    stores = {}
    for name, path in _find(Path(args.path)).items():
        with show_reading(path) as progress:
            store = open_dataset(path, progress=progress)
        if args.verify:
            store.verify()
        stores[name] = _describe(store)
    result = {"path": args.path, "verified": args.verify, "stores": stores}
    if not args.json:
        console = Console()
        # A pipe has no width; the usual 80 columns would break the numbers.
        console = console if console.is_terminal else Console(width=140)
        console.print(_table(result))
        if args.verify:
            print("every record is as it was written")
    return result


def _find(path: Path) -> dict[str, Path]:
    """Name -> path of the stores at or below `path`."""
    found = [path / task / split for task in TASKS for split in SPLITS if (path / task / split).exists()]
    below = {str(store.relative_to(path)): store for store in found}
    return below or {path.name: path}


def _describe(store: Dataset) -> dict[str, Any]:
    statistics = store.metadata["statistics"]
    return {
        "structures": len(store),
        # Where structures have to be read for it, all of them, this is not worth the time.
        "systems": len(np.unique(store.sid)) if store.ids_known else None,
        "atoms": int(store.num_atoms.sum(dtype=np.int64)),
        "max_atoms": int(store.num_atoms.max()),
        "edges": int(store.num_edges.sum(dtype=np.int64)),
        "max_edges": int(store.num_edges.max()),
        "elements": [chemical_symbols[number] for number in statistics["elements"]],
        "energy": statistics["energy"],
        "energy_relaxed": statistics["energy_relaxed"],
        "forces": statistics["forces"],
        "shards": len(store.metadata["shards"]),
        "bytes": sum(file.stat().st_size for file in ([store.path] if store.path.is_file() else store.path.iterdir())),
        "provenance": store.metadata["provenance"],
    }


def _table(result: dict[str, Any]) -> Table:
    columns = ("store", "structures", "systems", "atoms", "edges", "energy", "energy range", "force", "MB", "elements")
    table = Table(
        title=result["path"],
        caption="energy: mean ± std in eV; force: rms of free atoms' components, largest norm, in eV/A",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        text = column in ("store", "elements")
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "elements")
    for name, store in result["stores"].items():
        energy, forces = store["energy"], store["forces"]
        table.add_row(
            name,
            f"{store['structures']:,}",
            "-" if store["systems"] is None else f"{store['systems']:,}",
            f"{store['atoms']:,}",
            f"{store['edges']:,}",
            "-" if energy is None else f"{energy['mean']:.2f} ± {energy['std']:.2f}",
            "-" if energy is None else f"{energy['min']:.2f} .. {energy['max']:.2f}",
            "-" if forces is None else f"{forces['free']['rms']:.3f}, {forces['all']['max']:.1f}",
            f"{store['bytes'] / 1e6:.1f}",
            " ".join(store["elements"]),
        )
    return table
