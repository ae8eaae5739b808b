"""Models by name: the published sizes and `build_model`.

model = build_model("gemnet-dt")
model = build_model("dimenet++", forces="none")
model = build_model("gemnet-xl", cutoff=5.0)
model = build_model(num_blocks=2, emb_size_atom=64, emb_size_edge=64, emb_size_trip=32, emb_size_bil_trip=32)
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from egnscale.models.dimenet import DimeNetConfig, DimeNetPlusPlus
from egnscale.models.gemnet import GemNetConfig, GemNetT

AtomModelConfig = GemNetConfig | DimeNetConfig
AtomModel = GemNetT | DimeNetPlusPlus

#: Architectures, under OC20's names.
CONFIGS: dict[str, type[AtomModelConfig]] = {config.name: config for config in (GemNetConfig, DimeNetConfig)}


@dataclass(frozen=True)
class Preset:
    """Published sizes of an architecture."""

    name: str  #: of the architecture
    sizes: dict[str, int]


def _gemnet(blocks: int, atom: int, edge: int, trip: int, bil: int) -> Preset:
    sizes = {
        "num_blocks": blocks,
        "emb_size_atom": atom,
        "emb_size_edge": edge,
        "emb_size_trip": trip,
        "emb_size_bil_trip": bil,
    }
    return Preset(GemNetConfig.name, sizes)


def _dimenet(blocks: int, hidden: int, out: int, inner: int = 64) -> Preset:
    sizes = {"num_blocks": blocks, "hidden_channels": hidden, "out_emb_channels": out, "int_emb_size": inner}
    return Preset(DimeNetConfig.name, sizes)


#: Sizes of Sriram et al. (ICLR 2022): GemNet-T and -XL, the four rungs of their Table 4, and two rungs further up;
#: OC20's DimeNet++ and -Large, and DimeNet++-XL with the dimensions that the paper publishes. These give 219 M
#: parameters where it says 240 M; no published dimension explains the rest (five output layers, not three: 243 M).
PRESETS: dict[str, Preset] = {
    "gemnet-dt": _gemnet(3, 512, 512, 64, 64),
    "gemnet-xl": _gemnet(6, 128, 1536, 384, 192),
    "gemnet-125m": _gemnet(3, 1280, 768, 128, 64),
    "gemnet-245m": _gemnet(4, 1536, 1024, 192, 96),
    "gemnet-480m": _gemnet(6, 1792, 1184, 288, 160),
    "gemnet-960m": _gemnet(8, 2320, 1302, 512, 288),
    "gemnet-1b": _gemnet(8, 2560, 1280, 512, 256),
    "gemnet-2.5b": _gemnet(12, 2560, 2304, 640, 320),
    "dimenet++": _dimenet(3, 192, 192),
    "dimenet++-large": _dimenet(3, 512, 384),
    "dimenet++-xl": _dimenet(4, 2048, 1536, 256),
}


def model_config(preset: str | None = None, *, name: str | None = None, **hyperparameters: Any) -> AtomModelConfig:
    """A preset's hyperparameters, overlaid with those given.

    Args:
        preset: a name in `PRESETS`.
        name: the architecture, a name in `CONFIGS`; the preset's, or that which has the hyperparameters given, if None.

    Raises:
        ValueError: for an unknown preset, architecture or hyperparameter (naming the nearest known one), a missing one,
            or a value that no model can have.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}{_nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    chosen = PRESETS[preset] if preset else None
    if name is None:
        name = chosen.name if chosen else _architecture(hyperparameters)
    if name not in CONFIGS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, CONFIGS)}; known: {', '.join(CONFIGS)}")
    if chosen and chosen.name != name:
        raise ValueError(f"preset {preset!r} is a {chosen.name}, not a {name}; leave the model's name out")
    values = {**(chosen.sizes if chosen else {}), **hyperparameters}
    known = {field.name: field for field in fields(CONFIGS[name])}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown hyperparameter {key!r} of {name}{_nearest(key, known)}")
    missing = [key for key, field in known.items() if field.default is MISSING and key not in values]
    if missing:
        presets = ", ".join(key for key, preset in PRESETS.items() if preset.name == name)
        raise ValueError(f"the model needs {', '.join(missing)}; give them, or a preset ({presets})")
    return CONFIGS[name](**values)


def _architecture(hyperparameters: dict[str, Any]) -> str:
    """That which knows the most of these hyperparameters; GemNet where several do."""

    def recognised(name: str) -> int:
        return sum(field.name in hyperparameters for field in fields(CONFIGS[name]))

    return max(CONFIGS, key=recognised)


def build_model(preset: str | AtomModelConfig | None = None, **hyperparameters: Any) -> Any:
    """Build a model with freshly initialised weights, on the current default device (`torch.device("meta")` included).

    Args:
        preset: a name in `PRESETS`, a whole configuration, or None.
        hyperparameters: as for `model_config`; they override the preset's.

    Returns:
        An `AtomModel`.
    """
    if isinstance(preset, GemNetConfig | DimeNetConfig):
        if hyperparameters:
            raise ValueError("give either a whole configuration or hyperparameters, not both")
        return DimeNetPlusPlus(preset) if isinstance(preset, DimeNetConfig) else GemNetT(preset)
    return build_model(model_config(preset, **hyperparameters))


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
