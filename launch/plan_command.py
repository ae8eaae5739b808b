"""`egnscale plan CONFIG.yaml [key=value ...]`: what fits, how long it takes, and which layout to choose."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("items", nargs="*", metavar="CONFIG.yaml | key=value", help="configuration and overrides")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="devices (default %(default)s)")
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="of each device (default %(default)s)")
    parser.add_argument(
        "--cpu-memory", metavar="SIZE", help="of each machine, for offloading; none is planned without it"
    )
    parser.add_argument(
        "--machine", default="h100", metavar="FILE|h100|h200|cpu", help="how fast devices are (default %(default)s)"
    )
    parser.add_argument(
        "--atoms", type=int, metavar="N", help="plan for made-up slabs of N atoms in place of the training set"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    items = list(args.items)
    if not items or "=" in items[0]:
        raise ValueError("which configuration? give CONFIG.yaml (and key=value overrides after it)")
    for name in ("nodes", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.atoms is not None and args.atoms < 20:
        raise ValueError(f"--atoms is {args.atoms}; slabs have at least 20 atoms")

    from rich.console import Console
    from rich.progress import track

    from egnscale.launch.config import load_config
    from egnscale.launch.planning import Planner
    from egnscale.scaling.planner import MACHINES, Machine, explained, ranked, read_size

    machine = MACHINES[args.machine] if args.machine in MACHINES else Machine.read(Path(args.machine))
    available, host = read_size(args.gpu_memory), None
    if args.cpu_memory is not None:
        host = read_size(args.cpu_memory) // args.gpus_per_node
    planner = Planner.of_config(load_config(Path(items[0]), items[1:]), machine, atoms=args.atoms)
    ranks = args.nodes * args.gpus_per_node
    console = Console(stderr=True, quiet=args.json)
    plans = planner.layouts(
        ranks,
        args.gpus_per_node,
        offload=host is not None,
        progress=lambda todo: track(todo, "tracing", console=console, transient=True),
    )
    plans = ranked(plans, available, host)
    result = {
        "ranks": ranks,
        "device_memory": available,
        "machine": {"name": machine.name, "source": machine.source},
        "data": planner.described,
        "parameters": planner.count,
        "plans": [planner.record(plan, available, host) for plan in plans],
        "explanation": explained(plans, available, host),
    }
    if not args.json:
        _show(result, plans)
    return result


def _show(result: dict[str, Any], plans: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from egnscale.scaling.planner import GIB
    from egnscale.scaling.rank_memory import ACTIVATIONS, KINDS

    console = Console()
    machine = result["machine"]
    console.print(
        f"{result['parameters']:,} parameters on {result['ranks']} devices; {result['data']}; "
        f"{machine['name']} ({machine['source']})",
        highlight=False,
    )
    table = Table(title="Layouts, the best first")
    for heading in ("pipe", "graph", "data", "ZeRO", "recompute", "offload", "batch", "GiB", "fits", "s/step"):
        table.add_column(heading, justify="left" if heading in ("recompute", "offload", "fits") else "right")
    for plan, record in list(zip(plans, result["plans"], strict=True))[:12]:
        combination = plan.combination
        table.add_row(
            *(str(size) for size in (plan.layout.pipe, plan.layout.graph, plan.layout.data, combination.zero)),
            combination.recompute,
            *(combination.offload, f"{plan.micro_batch}x{plan.accumulation}", f"{plan.needed / GIB:.2f}"),
            *("yes" if record["fits"] else "no", f"{plan.times.total:.3g}"),
        )
    console.print(table)
    best = plans[0]
    table = Table(title=f"Memory of the first, at its peak ({best.peak.when})")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for kind in KINDS:
        if best.peak.kinds[kind]:
            table.add_row(kind, f"{best.peak.kinds[kind] / GIB:.3f}")
        if kind == ACTIVATIONS:
            for layer, size in sorted(best.peak.layers.items(), key=lambda one: int((one[0] or "-1").split()[0])):
                table.add_row(f"  {layer or 'loss'}", f"{size / GIB:.3f}")
    table.add_row("not given back by the allocator", f"{best.peak.kept_back / GIB:.3f}")
    table.add_row("process", f"{best.process / GIB:.3f}")
    table.add_row("safety allowance", f"{(best.needed - best.foretold) / GIB:.3f}", end_section=True)
    table.add_row("needed", f"{best.needed / GIB:.3f}")
    console.print(table)
    console.print(result["explanation"], highlight=False)
