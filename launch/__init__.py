"""The top of the house: command line, run configuration, tasks, trainer, ASE calculator."""

if __name__ != "egnscale.launch":
    raise ImportError("`import launch` finds a folder of egnscale's source tree; write `import egnscale.launch`")

from typing import Any

__all__ = ["Calculator"]


def __getattr__(name: str) -> Any:
    """Import the calculator when it is asked for: `egnscale --help` should not wait for torch."""
    if name == "Calculator":
        from egnscale.launch.calculator import Calculator

        return Calculator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
