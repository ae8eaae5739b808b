"""Models by name: the published sizes and `build_model`.

model = build_model("gemnet-dt")
model = build_model("gemnet-xl", cutoff=5.0)
model = build_model(num_blocks=2, emb_size_atom=64, emb_size_edge=64, emb_size_trip=32, emb_size_bil_trip=32)
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields
from typing import Any

import torch

from egnscale.models.gemnet import GemNetConfig, GemNetT


def _gemnet(blocks: int, atom: int, edge: int, trip: int, bil: int) -> dict[str, int]:
    return {
        "num_blocks": blocks,
        "emb_size_atom": atom,
        "emb_size_edge": edge,
        "emb_size_trip": trip,
        "emb_size_bil_trip": bil,
    }


#: Sizes of Sriram et al. (ICLR 2022): GemNet-T and -XL, the four rungs of their Table 4, and one rung further up.
PRESETS: dict[str, dict[str, int]] = {
    "gemnet-dt": _gemnet(3, 512, 512, 64, 64),
    "gemnet-xl": _gemnet(6, 128, 1536, 384, 192),
    "gemnet-125m": _gemnet(3, 1280, 768, 128, 64),
    "gemnet-245m": _gemnet(4, 1536, 1024, 192, 96),
    "gemnet-480m": _gemnet(6, 1792, 1184, 288, 160),
    "gemnet-960m": _gemnet(8, 2320, 1302, 512, 288),
    "gemnet-2.5b": _gemnet(12, 2560, 2304, 640, 320),
}


def model_config(preset: str | None = None, **hyperparameters: Any) -> GemNetConfig:
    """A preset's hyperparameters, overlaid with those given.

    Raises:
        ValueError: for an unknown preset or hyperparameter (naming the nearest known one), a missing one, or a value
            that no model can have.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{_nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    values = {**(PRESETS[preset] if preset else {}), **hyperparameters}
    known = {field.name: field for field in fields(GemNetConfig)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown hyperparameter {name!r}{_nearest(name, known)}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"the model needs {', '.join(missing)}; give them, or a preset ({', '.join(PRESETS)})")
    return GemNetConfig(**values)


def build_model(preset: str | GemNetConfig | None = None, **hyperparameters: Any) -> GemNetT:
    """Build a model with freshly initialised weights, on the current default device (`torch.device("meta")` included).

    Args:
        preset: a name in `PRESETS`, a whole configuration, or None.
        hyperparameters: override the preset's.
    """
    if isinstance(preset, GemNetConfig):
        if hyperparameters:
            raise ValueError("give either a GemNetConfig or hyperparameters, not both")
        return GemNetT(preset)
    return GemNetT(model_config(preset, **hyperparameters))


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
