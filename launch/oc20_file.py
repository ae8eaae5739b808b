"""A public OC20 checkpoint as it is in the file: what it holds, under public names, and small helpers to read it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from egnscale.launch.torch_file import read_torch_file
from egnscale.models.oc20_names import recognise, without_alias

#: Names in front of the model's own: of wrappers that a model was trained in, and of hydra's backbone.
PREFIX = re.compile(r"(?:(?:module|_orig_mod|backbone)\.)*")


@dataclass
class Oc20File:
    """A public checkpoint, as it is in the file."""

    path: Path
    data: dict[str, Any]
    architecture: str
    prefix: str  #: in front of every name
    state: dict[str, Tensor]  #: by public name, prefix taken off; aliases and constants included
    sha256: str

    @classmethod
    def open(cls, path: Path) -> Oc20File:
        """Read a file.

        Raises:
            ValueError: if it is damaged, asks for what is refused, or holds neither GemNet-T nor DimeNet++.
            OSError: if it cannot be opened.
        """
        data = read_torch_file(path)
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds no dictionary, so it is no checkpoint of OC20")
        state = data.get("state_dict", data)
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} holds no state_dict of tensors, so it is no checkpoint of OC20")
        if not all(isinstance(name, str) for name in state):
            raise ValueError(f"{path}: its state_dict has names that are no text")
        match = PREFIX.match(next(iter(state)))
        prefix = match[0] if match else ""
        named = {name.removeprefix(prefix): value for name, value in state.items()}
        if len(named) != len(state):
            raise ValueError(f"{path}: its state_dict has names with and without {prefix!r} in front")
        architecture = recognise(named)
        if architecture is None:
            raise ValueError(
                f"{path} holds neither GemNet-T nor DimeNet++: its weights begin with {short(next(iter(state)))}"
            )
        # Weights that are parts of each other would be written out each: a small file could fill a disk.
        once = {without_alias(name): value for name, value in named.items()}
        used = sum(value.numel() * value.itemsize for value in once.values())
        if used > path.stat().st_size:
            raise ValueError(f"{path}: its weights share memory, which no such model's do")
        return cls(path, {} if state is data else data, architecture, prefix, named, _sha256(path))

    @property
    def config(self) -> dict[str, Any]:
        """The public configuration; empty if there is none."""
        config = self.data.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def layout(self) -> str:
        """One line on the form of the file."""
        block = self.config.get("model")
        if block is None:
            form = "no configuration"
        elif isinstance(block, str):
            form = "old configuration (model_attributes)"
        elif isinstance(block, dict):
            form = "hydra configuration" if block.get("name") == "hydra" else "new configuration"
        else:
            form = "unknown configuration"
        return f"{form}, names with {self.prefix!r} in front" if self.prefix else form

    @property
    def has_ema(self) -> bool:
        ema = self.data.get("ema")
        return isinstance(ema, dict) and isinstance(ema.get("shadow_params"), list)


def metrics(data: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics that a public checkpoint holds: {name: value}."""
    found: dict[str, float] = {}
    stored = data.get("val_metrics")
    for name, value in list(stored.items())[:100] if isinstance(stored, dict) else ():
        number = finite_number(value.get("metric") if isinstance(value, dict) else value)
        if number is not None:
            found[_plain_text(name)] = float(number)
    best = finite_number(data.get("best_val_metric"))
    if best is not None:
        found["best"] = float(best)
    return found


def finite_number(value: Any) -> float | int | None:
    """A finite number, or None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None


def _plain_text(value: Any) -> str:
    return str(value)[:80] if isinstance(value, str | int | float) else type(value).__name__


def short(value: Any) -> str:
    """A value from the file in a message."""
    if value is None or isinstance(value, str | bool | float):
        text = str(value)
        return text if len(text) <= 100 else text[:97] + "..."
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else "a huge number"
    return f"a {type(value).__name__}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
