"""`egnscale bench`: what graph parallelism sends, and how fast a machine is.

`comm` compares with the paper's scheme, foretold and measured; `machine` writes a description for `egnscale plan`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "bytes that ranks sharing a graph send for one block, foretold and counted in real runs"
    comm = actions.add_parser("comm", help=text, description=text)
    comm.set_defaults(action_run=_comm)
    comm.add_argument("--model", default="gemnet-xl", metavar="PRESET", help="default %(default)s")
    comm.add_argument("--ranks", type=int, default=4, metavar="P", help="that share the graph (default %(default)s)")
    comm.add_argument(
        "--atoms", type=int, nargs="+", default=[80, 1000], metavar="N", help="sizes of slabs (default: 80 1000)"
    )
    comm.add_argument("--no-run", action="store_true", help="foretell only; start no processes")
    text = "measure this machine's device, for egnscale plan --machine"
    machine = actions.add_parser("machine", help=text, description=text)
    machine.set_defaults(action_run=_machine)
    machine.add_argument("out", type=Path, metavar="OUT.json", help="where to write the description")


def run(args: argparse.Namespace) -> dict[str, Any]:
    return args.action_run(args)


def _comm(args: argparse.Namespace) -> dict[str, Any]:
    if args.ranks < 2:
        raise ValueError(f"--ranks is {args.ranks}; fewer than 2 exchange nothing")
    if min(args.atoms) < 20:
        raise ValueError(f"--atoms is {min(args.atoms)}; slabs have at least 20 atoms")

    from egnscale.launch.bench_comm import (
        foretell,
        gemnet_config,
        imbalance,
        measure,
        of_block,
        of_paper,
        parts_of,
        slab,
    )

    config = gemnet_config(args.model)
    systems = []
    for atoms in args.atoms:
        graph, parts = parts_of([slab(atoms)], config, args.ranks)
        foretold = foretell(config, parts)
        owner, paper = of_block(foretold), of_paper(config, graph, args.ranks)
        system: dict[str, Any] = {
            "atoms": graph.num_atoms,
            "edges": graph.num_edges,
            "imbalance": imbalance(parts[0]),
            "owner": owner,
            "paper": paper,
            "ratio": sum(paper.values()) / max(sum(owner.values()), 1),
            "step": sum(foretold.values()),
        }
        if not args.no_run:
            system["measured"] = measure(args.model, atoms, args.ranks)
        systems.append(system)
    balance = {
        f"{count} slab{'s' * (count > 1)} over 8 ranks": imbalance(
            parts_of([slab(80 + 5 * (number % 9), number) for number in range(count)], config, 8)[1][0]
        )
        for count in (1, 32)
    }
    result = {"model": args.model, "ranks": args.ranks, "bytes_per_number": 4, "systems": systems, "imbalance": balance}
    if not args.json:
        _show(result)
    return result


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    from egnscale.launch.bench_machine import measured_machine

    machine = measured_machine(args.out.stem)
    machine.write(args.out)
    if not args.json:
        rates = ", ".join(f"{name} {rate / 1e9:.3g} GFLOP/s" for name, rate in machine.matmul.items())
        print(f"{args.out}: {rates}, memory {machine.bandwidth / 1e9:.3g} GB/s; {machine.source}")
    return asdict(machine)


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result['model']}, one block, {result['ranks']} ranks, fp32, MB sent by all ranks together")
    for heading in ("slab", "exchange", "foretold", "counted", "calls", "waited [ms]"):
        table.add_column(heading, justify="left" if heading in ("slab", "exchange") else "right")
    for system in result["systems"]:
        name = f"{system['atoms']} atoms, {system['edges']:,} edges"
        measured = system.get("measured")
        for verb, sent in system["owner"].items():
            counted = [f"{measured['block'][verb] / 1e6:.3f}", str(measured["calls"][verb])] if measured else ["", ""]
            waited = f"{1e3 * measured['seconds_waited'][verb]:.1f}" if measured else ""
            table.add_row(name, verb, f"{sent / 1e6:.3f}", *counted, waited)
            name = ""
        ours, theirs = sum(system["owner"].values()), sum(system["paper"].values())
        table.add_row("", "owner, together", f"{ours / 1e6:.3f}", "", "", "")
        table.add_row("", "the paper's all-reduces", f"{theirs / 1e6:.1f}", "", "", "")
        table.add_row("", f"[bold]{system['ratio']:.0f} times fewer", "", "", "", "", end_section=True)
    console.print(table)
    for system in result["systems"]:
        wire = system.get("measured", {}).get("wire")
        if wire:
            step, paper = system["measured"]["all"] / 1e6, sum(system["paper"].values()) / 1e6
            console.print(
                f"{system['atoms']} atoms, through the network interface, headers included: "
                f"a step with one block {wire['owner'] / 1e6:.2f} MB (counted {step:.2f}), "
                f"the paper's all-reduces {wire['paper'] / 1e6:.1f} MB (foretold {paper:.1f})",
                highlight=False,
            )
    for what, value in result["imbalance"].items():
        console.print(f"most edges over mean, {what}: {value:.3f}", highlight=False)
