"""Hyperparameters of the public OC20 models, and ours, both ways.

What a public configuration says is compared with the sizes that the weights have; what it leaves out has the default of
the public constructor. A setting that egnscale does not know, or does not have, is refused by its name: a model that
computes something else than the published one would be worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from egnscale.models import AtomModelConfig, DimeNetConfig, GemNetConfig

#: Public names of a model -> our architecture. Names of hydra's backbones end in _backbone.
ARCHITECTURES = {"gemnet_t": "gemnet_t", "gp_gemnet_t": "gemnet_t", "dimenetplusplus": "dimenetplusplus"}
#: Settings that change nothing in the model: how graphs, files and ranks are handled.
_NO_MATTER = {
    *("name", "otf_graph", "use_pbc_single", "scale_file", "scale_dict", "num_atoms", "bond_feat_dim", "scatter_atoms"),
    "pass_through_head_outputs",
}
#: Settings with one value that is supported; what else may be written for it.
_FIXED: dict[str, tuple[Any, ...]] = {
    "num_targets": (1,),
    "use_pbc": (True,),
    "enforce_max_neighbors_strictly": (True,),
    "scale_num_blocks": (False,),
    "regress_stress": (False,),
    "direct_stress": (False,),
    "activation": ("silu", "swish"),
    "act": ("silu", "swish"),
}
#: Angular functions beyond this are numerically meaningless.
_MAX_SPHERICAL = 32


def model_block(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(public name, settings) of the model in a public configuration, or None if it has none.

    Read are the old form (`model: NAME, model_attributes: {...}`), the new one (`model: {name: NAME, ...}`) and hydra's
    (`model: {name: hydra, backbone: {model: NAME_backbone, ...}, heads: ...}`).

    Raises:
        ValueError: for another form, or a model that egnscale does not have.
    """
    block = config.get("model")
    if block is None:
        return None
    settings = config.get("model_attributes", {}) if isinstance(block, str) else block
    if not isinstance(settings, dict):
        raise ValueError("the configuration's model is neither a name with model_attributes nor a section with a name")
    settings = dict(settings)
    name = block if isinstance(block, str) else settings.pop("name", None)
    if name == "hydra":
        backbone = settings.get("backbone")
        if not isinstance(backbone, dict):
            raise ValueError("the configuration's model is a hydra without a backbone")
        settings = dict(backbone)
        name = settings.pop("model", None)
        name = name.removesuffix("_backbone") if isinstance(name, str) else name
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"the model is {_show(name)}; egnscale has {', '.join(ARCHITECTURES)}")
    return name, settings


def to_our_config(architecture: str, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> AtomModelConfig:
    """The configuration of a public model.

    Args:
        architecture: of `egnscale.models.oc20_names`.
        settings: the model's block in the public configuration.
        weights: by public name.

    Raises:
        ValueError: for a setting that is unknown, not supported, makes no sense, or contradicts the weights.
    """
    given = dict(settings)
    for name in _NO_MATTER & given.keys():
        del given[name]
    for name in _FIXED.keys() & given.keys():
        value = given.pop(name)
        if not any(type(value) is type(allowed) and value == allowed for allowed in _FIXED[name]):
            raise ValueError(f"model setting {name} is {_show(value)}; egnscale has {_show(_FIXED[name][0])} only")
    gemnet = architecture == "gemnet_t"
    values = _gemnet_sizes(weights) if gemnet else _dimenet_sizes(weights)
    for name in values.keys() & given.keys():
        said = given.pop(name)
        if type(said) is not int or said != values[name]:
            raise ValueError(
                f"model setting {name} is {_show(said)}, but the weights have {values[name]}: "
                "configuration and weights are of different models"
            )
    values |= _gemnet_settings(given) if gemnet else _dimenet_settings(given)
    if given:
        raise ValueError(f"model setting {_show(min(given, key=str))} is not known; it may change what is computed")
    return GemNetConfig(**values) if gemnet else DimeNetConfig(**values)


def to_public_settings(config: AtomModelConfig) -> dict[str, Any]:
    """The inverse of `to_our_config`: a model block with its name.

    Raises:
        ValueError: for what the public models cannot be told.
    """
    if config.max_neighbors is None:
        raise ValueError("the model takes every neighbour within its cutoff, which the public models cannot")
    both = {
        "otf_graph": True,  # the public code computes edges; otherwise it demands those of OC20's files
        "use_pbc": True,
        "regress_forces": config.forces != "none",
        "cutoff": config.cutoff,
        "num_spherical": config.num_spherical,
        "num_radial": config.num_radial,
        "num_blocks": config.num_blocks,
        "num_before_skip": config.num_before_skip,
        "num_after_skip": config.num_after_skip,
    }
    if isinstance(config, DimeNetConfig):
        if config.num_elements != 94:
            raise ValueError(f"num_elements is {config.num_elements}; the public DimeNet++ always has 94")
        names = ("hidden_channels", "out_emb_channels", "int_emb_size", "basis_emb_size", "num_output_layers")
        own = {name: getattr(config, name) for name in (*names, "envelope_exponent")}
        return {"name": "dimenetplusplus", **own, **both}
    widths = ("emb_size_atom", "emb_size_edge", "emb_size_trip", "emb_size_bil_trip", "emb_size_rbf", "emb_size_cbf")
    own = {name: getattr(config, name) for name in (*widths, "num_concat", "num_atom", "extensive", "output_init")}
    if config.num_elements != 83:
        own["num_elements"] = config.num_elements  # the oldest constructors do not take it
    return {
        "name": "gemnet_t",
        **own,
        **both,
        "direct_forces": config.forces == "direct",
        "max_neighbors": config.max_neighbors,
        "rbf": {"name": config.rbf},
        "envelope": {"name": "polynomial", "exponent": config.envelope_exponent},
        "cbf": {"name": "spherical_harmonics"},
        "activation": "silu",
    }


# --------------------------------------------------------------------------------------------------- what is written


def _gemnet_settings(given: dict[str, Any]) -> dict[str, Any]:
    """GemNet's settings that weights do not show; takes what it reads out of `given`."""
    rbf = _named(given, "rbf", "gaussian", ("gaussian", "spherical_bessel"))
    envelope = given.get("envelope")
    exponent = envelope.get("exponent", 5) if isinstance(envelope, dict) else 5
    _named(given, "envelope", "polynomial", ("polynomial",))
    _named(given, "cbf", "spherical_harmonics", ("spherical_harmonics",))
    regress, direct = _flag(given, "regress_forces", True), _flag(given, "direct_forces", False)
    return {
        "rbf": rbf,
        "envelope_exponent": _whole("envelope.exponent", exponent, most=100),
        "forces": "none" if not regress else "direct" if direct else "conservative",
        "extensive": _flag(given, "extensive", True),
        "output_init": _named(given, "output_init", "HeOrthogonal", ("HeOrthogonal", "zeros")),
        "cutoff": _positive(given, "cutoff", 6.0),
        "max_neighbors": _whole("max_neighbors", given.pop("max_neighbors", 50), most=1_000_000),
        "symmetrize": "oc20",
    }


def _dimenet_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The same for DimeNet++, whose public constructor has a cutoff of 10 A."""
    return {
        "envelope_exponent": _whole("envelope_exponent", given.pop("envelope_exponent", 5), most=100),
        "forces": "conservative" if _flag(given, "regress_forces", True) else "none",
        "cutoff": _positive(given, "cutoff", 10.0),
        "max_neighbors": _whole("max_neighbors", given.pop("max_neighbors", 50), most=1_000_000),
        "symmetrize": "none",
        "angles": "detached",
    }


def _named(given: dict[str, Any], key: str, default: str, supported: tuple[str, ...]) -> str:
    """A setting of the form NAME or {name: NAME, ...}."""
    value = given.pop(key, default)
    name = value.get("name", default) if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in supported:
        raise ValueError(f"model setting {key} is {_show(name)}; egnscale has {', '.join(supported)}")
    unknown = value.keys() - {"name", "exponent"} if isinstance(value, dict) else set()
    if unknown:
        raise ValueError(f"model setting {key}.{_show(min(unknown, key=str))} is not known")
    return name


def _flag(given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.pop(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"model setting {key} is {_show(value)}; expected true or false")
    return value


def _whole(key: str, value: Any, *, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"model setting {key} is {_show(value)}; expected a whole number of at least 1")
    return value


def _positive(given: dict[str, Any], key: str, default: float) -> float:
    value = given.pop(key, default)
    if type(value) not in (int, float) or not (0 < value < 1000 and math.isfinite(value)):
        raise ValueError(f"model setting {key} is {_show(value)}; expected a positive number")
    return float(value)


def _show(value: Any) -> str:
    """A setting in a message; sections may be huge, or hold themselves, and are not written out."""
    if value is None or isinstance(value, str | bool | int | float):
        text = repr(value if not isinstance(value, str) else value[:60])
        return text if len(text) < 70 else f"{text[:60]}..."
    return f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------- what weights show


def _gemnet_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    spherical, radial, cbf = _shape(weights, "mlp_cbf3.weight", 3)
    elements, atom = _shape(weights, "atom_emb.embeddings.weight", 2)
    trip, _, bilinear = _shape(weights, "int_blocks.0.trip_interaction.mlp_cbf.weight", 3)
    inside = {
        "num_before_skip": _count(weights, r"int_blocks\.0\.layers_before_skip\.(\d+)\."),
        "num_after_skip": _count(weights, r"int_blocks\.0\.layers_after_skip\.(\d+)\."),
        "num_concat": _count(weights, r"int_blocks\.0\.residual_m\.(\d+)\."),
        "num_atom": _count(weights, r"out_blocks\.0\.layers\.([1-9]\d*)\."),
    }
    return {
        "num_spherical": _spherical(spherical),
        "num_radial": radial,
        "num_blocks": _blocks(weights, r"int_blocks\.(\d+)\.", inside),
        "emb_size_atom": atom,
        "emb_size_edge": _shape(weights, "edge_emb.dense.linear.weight", 2)[0],
        "emb_size_trip": trip,
        "emb_size_bil_trip": bilinear,
        "emb_size_rbf": _shape(weights, "mlp_rbf3.linear.weight", 2)[0],
        "emb_size_cbf": cbf,
        **inside,
        "num_elements": elements,
    }


def _dimenet_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    rows, hidden = _shape(weights, "emb.emb.weight", 2)
    (radial,) = _shape(weights, "rbf.freq", 1)
    basis, columns = _shape(weights, "interaction_blocks.0.lin_sbf1.weight", 2)
    if columns % radial:
        raise ValueError(
            f"interaction_blocks.0.lin_sbf1.weight has {columns} columns, no multiple of {radial} (rbf.freq)"
        )
    inside = {
        "num_before_skip": _count(weights, r"interaction_blocks\.0\.layers_before_skip\.(\d+)\."),
        "num_after_skip": _count(weights, r"interaction_blocks\.0\.layers_after_skip\.(\d+)\."),
        "num_output_layers": _count(weights, r"output_blocks\.0\.lins\.(\d+)\."),
    }
    return {
        "num_spherical": _spherical(columns // radial),
        "num_radial": radial,
        "num_blocks": _blocks(weights, r"interaction_blocks\.(\d+)\.", inside),
        "hidden_channels": hidden,
        "out_emb_channels": _shape(weights, "output_blocks.0.lin_up.weight", 2)[0],
        "int_emb_size": _shape(weights, "interaction_blocks.0.lin_sbf2.weight", 2)[0],
        "basis_emb_size": basis,
        **inside,
        "num_elements": rows - 1,  # row 0 stands for no element
    }


def _shape(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    shape = tuple(weights[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{name} has shape {shape}; expected {dimensions} dimensions")
    return shape


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at one place in the names."""
    return len({match[1] for match in map(re.compile(pattern).match, weights) if match})


def _blocks(weights: Mapping[str, Tensor], pattern: str, inside: Mapping[str, int]) -> int:
    """The number of blocks; a file that has too few weights for them is refused before such a model is built."""
    blocks = _count(weights, pattern)
    if blocks * max(1, *inside.values()) > len(weights):
        raise ValueError(f"there are {blocks} blocks, but only {len(weights)} weights")
    return blocks


def _spherical(number: int) -> int:
    if number > _MAX_SPHERICAL:
        raise ValueError(f"the weights have num_spherical {number}; at most {_MAX_SPHERICAL} make sense")
    return number
