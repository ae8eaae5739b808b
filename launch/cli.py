"""The `egnscale` command: one parser, one way to fail.

A command is a module with `add_arguments(parser)` and `run(args) -> dict | None`. What `run` returns
is printed as one JSON object under `--json`; otherwise the command prints for people.
Errors meant for people are ValueError and OSError: one line on standard error, exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence

#: Modules of the commands, in the order of `egnscale --help`. Imported only when needed: torch takes seconds.
COMMANDS = {
    "data": ("egnscale.launch.data_command", "make, convert and inspect data sets"),
    "train": ("egnscale.launch.train_command", "train a model"),
    "plan": ("egnscale.launch.plan_command", "foretell memory and time of a run, choose a layout"),
    "evaluate": ("egnscale.launch.evaluate_command", "evaluate a checkpoint on a data set"),
    "checkpoint": ("egnscale.launch.checkpoint_command", "exchange checkpoints with OC20's code, look into them"),
    "relax": ("egnscale.launch.relax_command", "relax structures with a trained model, many at once"),
    "bench": ("egnscale.launch.bench_command", "measure what a run costs"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line and the way out, instead of the usage text."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="egnscale", description="Train very large graph networks for atoms.")
    parser.add_argument("--version", action="store_true", help="print the versions of egnscale, torch and deepspeed")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == wanted:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
        for leaf in _leaves(command):
            _add_common(leaf)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional words in one run only; overrides may stand among the options too.
    overrides = [word for word in rest if "=" in word and not word.startswith("-") and hasattr(args, "items")]
    unknown = [word for word in rest if word not in overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        args.items += overrides
    if args.version:
        print(_versions())
        raise SystemExit(0)
    if args.command is None:
        parser.print_help()
        raise SystemExit(2)
    return args


def _leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser itself, or its sub-commands' parsers where it has any."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [leaf for child in action.choices.values() for leaf in _leaves(child)]
    return [parser]


def _versions() -> str:
    from importlib.metadata import version

    return " ".join(f"{name} {version(name)}" for name in ("egnscale", "torch", "deepspeed"))


def _where(command: str) -> str:
    """How a line of this process starts. Under mpirun, the rank is known only once the ranks have joined."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"egnscale {command}" + (f" [rank {os.environ['RANK']}]" if several and "RANK" in os.environ else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Before torch is imported: a broken connection shall be one line, without C++ stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        result = args.run(args)
    except KeyboardInterrupt:
        print(f"{_where(args.command)}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        text = str(error)
        if text.startswith("Caught ") and "Original Traceback" in text:
            # What torch makes of an error in a loader's process; its last line is the error.
            text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        text = " ".join(text.split()) or type(error).__name__
        if not isinstance(error, ValueError | OSError):
            text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
        print(f"{_where(args.command)}: {text}", file=sys.stderr)
        return 1
    if args.json and result is not None and os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
