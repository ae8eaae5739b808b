"""`egnscale checkpoint`: exchange checkpoints with the public OC20 code (import, export), look into them (info)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "make a checkpoint of egnscale from a public OC20 file of GemNet-T or DimeNet++"
    read = actions.add_parser("import", help=text, description=text)
    read.set_defaults(action_run=_import)
    read.add_argument("file", type=Path, metavar="FILE.pt", help="a published file, or one of OC20's runs")
    read.add_argument("out", type=Path, metavar="OUT", help="directory of the new checkpoint; must not exist")
    read.add_argument(
        "--weights",
        choices=["ema", "model"],
        help="averaged weights, or those last trained (default: averaged ones where the file has them)",
    )
    read.add_argument(
        "--normalizer",
        type=float,
        nargs=3,
        metavar=("MEAN", "STD", "FORCE_STD"),
        help="how targets were normalised (eV, eV, eV/A), for files that do not say",
    )
    read.add_argument(
        "--scale-file", type=Path, metavar="FILE", help="JSON or .pt file of scale factors, for files without them"
    )
    read.add_argument("--config", type=Path, metavar="FILE.yml", help="public configuration, for files that have none")
    read.add_argument(
        "--without-element-references",
        action="store_true",
        help="import a model whose energies are relative to element references, and do not add them",
    )
    text = "write a checkpoint as a public OC20 file"
    write = actions.add_parser("export", help=text, description=text)
    write.set_defaults(action_run=_export)
    write.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run directory (its latest)"
    )
    write.add_argument("file", type=Path, metavar="FILE.pt", help="file to write; must not exist")
    write.add_argument(
        "--layout",
        choices=["v0", "v1"],
        default="v1",
        help="configuration and normalisers as in FAIR-Chem 1.x (v1, the default) or before (v0)",
    )
    write.add_argument("--prefix", default="", help="put before every weight's name, such as module.")
    text = "say what a checkpoint of egnscale, or a public OC20 file, holds"
    info = actions.add_parser("info", help=text, description=text)
    info.set_defaults(action_run=_info)
    info.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run directory, or a .pt file")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    return args.action_run(args)


def _import(args: argparse.Namespace) -> dict[str, Any]:
    from egnscale.launch.oc20_import import KeyMismatch, Options, import_oc20
    from egnscale.launch.tasks import Normalizer

    options = Options(
        weights=args.weights or "auto",
        normalizer=Normalizer(*args.normalizer) if args.normalizer else None,
        scale_file=args.scale_file,
        config_file=args.config,
        drop_references=args.without_element_references,
    )
    try:
        report = import_oc20(args.file, args.out, options)
    except KeyMismatch as error:
        if args.json:
            lists = {"missing": error.missing, "unexpected": error.unexpected, "shapes": error.shapes}
            print(json.dumps({"error": str(error), **lists}))
        raise
    if not args.json:
        source = report["source"]
        print(f"{args.file} -> {args.out}")
        print(f"{report['model']['name']}, {report['parameters']:,} parameters, {source['weights']} weights")
        _warn(source["warnings"])
    return report


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from egnscale.launch.oc20_export import export_oc20

    report = export_oc20(args.checkpoint, args.file, layout=args.layout, prefix=args.prefix)
    if not args.json:
        print(f"{args.checkpoint} -> {args.file}")
        print(f"{report['model']}, {report['tensors']} tensors, {report['bytes']:,} bytes, layout {report['layout']}")
        _warn(report["warnings"])
    return report


def _warn(warnings: list[str]) -> None:
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from egnscale.launch.checkpoint_info import describe

    found = describe(args.path)
    if not args.json:
        Console().print(_table(found))
    return found


def _table(found: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, title=found["path"], title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        if value not in (None, {}, []):
            table.add_row(name, str(value))

    model, normalizer, factors = found["model"], found["normalizer"], found["scale_factors"]
    row("kind", found["kind"])
    row("layout", found["layout"])
    row("model", model and model["name"])
    row("parameters", found["parameters"] and f"{found['parameters']:,}")
    if model:
        sizes = {name: value for name, value in model.items() if name != "name"}
        row("settings", ", ".join(f"{name} {value}" for name, value in sizes.items()))
    if normalizer:
        row(
            "normaliser",
            f"energy {normalizer['energy_mean']:.6g} +- {normalizer['energy_std']:.6g} eV, "
            f"forces +- {normalizer['force_std']:.6g} eV/A",
        )
    row("weights", {"ema": "averaged (ema)", "model": "of the state_dict"}.get(found["weights"], found["weights"]))
    row("step", found["step"])
    row("epoch", found["epoch"])
    if factors["all"]:
        row("scale factors", f"{factors['fitted']} of {factors['all']} fitted")
    for split, values in found["metrics"].items():
        row(split, ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
    best = found["best"]
    row("best", f"{best['value']:.5g} at step {best['step']}" if isinstance(best, dict) else best)
    row("from", found["source"])
    for text in found["warnings"]:
        row("warning", text)
    row("problem", found["problem"])
    return table
