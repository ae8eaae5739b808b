"""`egnscale train CONFIG.yaml [key=value ...]`, alone or under a launcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("items", nargs="*", metavar="CONFIG.yaml | key=value", help="configuration and overrides")
    parser.add_argument("--config", type=Path, help="the configuration, for launchers that like flags")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="DeepSpeed JSON or preset (zero0 ... zero3)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in task.output from its latest checkpoint"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


def run(args: argparse.Namespace) -> dict[str, Any]:
    from egnscale.launch.config import load_config

    items = list(args.items)
    path = args.config
    if path is None:
        if not items or "=" in items[0]:
            raise ValueError("which configuration? give CONFIG.yaml (and key=value overrides after it)")
        path = Path(items.pop(0))
    config = load_config(path, items)

    from egnscale.launch.trainer import Trainer
    from egnscale.scaling.engine import start_world
    from egnscale.scaling.failure import watched

    world = start_world()

    def say(line: str) -> None:
        if world.is_main:
            print(line, file=sys.stderr)

    with watched(world.rank, world.size, f"egnscale {args.command}"):
        trainer = Trainer(config, world, ds_config=args.deepspeed_config, resume=args.resume, say=say)
        result = trainer.run(progress=not args.json)
    if world.is_main and not args.json:
        from rich.console import Console

        from egnscale.launch.relaxation_tables import task_table

        console = Console()
        if result["evaluations"]:
            console.print(task_table(config.task.name, result["evaluations"]))
        console.print(f"checkpoints, logs and training.png are in {result['output']}", highlight=False)
    return result
