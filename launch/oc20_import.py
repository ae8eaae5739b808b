"""From a public OC20 checkpoint to an egnscale one.

    file = Oc20File.open(Path("gemnet_t_direct_h512_all.pt"))       what the file holds, under public names
    model = interpret(file)                                          our configuration, weights and normaliser
    import_oc20(Path("gemnet_t_direct_h512_all.pt"), Path("OUT"))    both, written as a checkpoint of egnscale

Nothing is guessed and nothing dropped in silence: what the file does not say must be given, what it says twice must
agree, and what egnscale cannot represent is refused by name. `docs/oc20-checkpoints.md` lists the forms that are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from egnscale.launch.config_file import read_mapping
from egnscale.launch.oc20_file import Oc20File, finite_number, metrics, short
from egnscale.launch.oc20_scales import SCALE_FACTOR, scale_factors
from egnscale.launch.oc20_settings import ARCHITECTURES, model_block, to_our_config
from egnscale.launch.oc20_targets import element_references, find_normalizer
from egnscale.launch.run_files import RUN, WEIGHTS, run_record
from egnscale.launch.tasks import Normalizer
from egnscale.launch.weights import write_tensors
from egnscale.models import AtomModelConfig, build_model, count_parameters
from egnscale.models.oc20_names import is_constant, to_our_names, to_public_name, without_alias
from egnscale.scaling.checkpoint import write_checkpoint


class KeyMismatch(ValueError):
    """Weights that are not those of the model that the configuration describes."""

    def __init__(self, where: str, *, missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> None:
        self.missing, self.unexpected, self.shapes = sorted(missing), sorted(unexpected), sorted(shapes)
        parts = [
            f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for what, names in (("lacks", self.missing), ("has the unknown", self.unexpected), ("has", self.shapes))
            if names
        ]
        super().__init__(f"{where} does not fit the model: it {'; '.join(parts)} (--json lists all)")


@dataclass(frozen=True)
class Options:
    """What the file does not say, or what is wanted of it."""

    weights: Literal["auto", "ema", "model"] = "auto"  #: auto: averaged ones if there are any, as in evaluation
    normalizer: Normalizer | None = None
    scale_file: Path | None = None
    config_file: Path | None = None
    drop_references: bool = False  #: go on without the file's element references


@dataclass(frozen=True)
class Oc20Model:
    """A public model in our terms."""

    config: AtomModelConfig
    weights: dict[str, Tensor]  #: fp32, by our names; scale factors included
    normalizer: Normalizer
    source: dict[str, Any]  #: where it came from, for run.json
    step: int
    warnings: list[str] = field(default_factory=list)


def import_oc20(path: Path, out: Path, options: Options | None = None) -> dict[str, Any]:
    """Write a public checkpoint as one of egnscale, atomically; returns what was done.

    Args:
        path: the .pt file.
        out: the checkpoint's directory, made here.

    Raises:
        ValueError: if it cannot be imported as it is, or `out` exists.
        OSError: if it cannot be read or written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another place, or remove it first")
    model = interpret(Oc20File.open(path), options)
    record = run_record(model.config, model.normalizer, step=model.step, source=model.source)

    def write(directory: Path) -> None:
        write_tensors(directory / WEIGHTS, {name: value.clone() for name, value in model.weights.items()})
        (directory / RUN).write_text(json.dumps(record, indent=1))

    write_checkpoint(out, write)
    return {
        "path": str(out),
        "model": record["model"],
        "parameters": sum(value.numel() for name, value in model.weights.items() if not name.endswith(SCALE_FACTOR)),
        "normalizer": asdict(model.normalizer),
        "step": model.step,
        "source": model.source,
    }


def interpret(file: Oc20File, options: Options | None = None) -> Oc20Model:
    """A public checkpoint in our terms.

    Raises:
        KeyMismatch: if its weights are not those of the model that its configuration describes.
        ValueError: for whatever else keeps it from being represented exactly.
    """
    options = options or Options()
    warnings: list[str] = []
    try:
        name, settings, config = _configuration(file, options)
        if ARCHITECTURES[name] != file.architecture:
            raise ValueError(f"the configuration is of {name}, but the weights are those of {file.architecture}")
        named = _without_repetitions(file.state)
        ours = to_our_config(file.architecture, settings, named)
        _check_names(file, named, ours)
        weights, which = _chosen_weights(file, named, options.weights)
        factors = scale_factors(named, file.data.get("scale_dict"), options.scale_file, warnings)
        normalizer, origin = find_normalizer(file.data, config, ours.forces, options.normalizer)
        references = element_references(file.data, config, drop=options.drop_references, warnings=warnings)
    except KeyMismatch:
        raise
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    tensors = {
        name: _plain(f"{file.path}: {name}", value, warnings)
        for name, value in to_our_names({**weights, **factors}).items()
    }
    energy_std, force_std = normalizer.energy_std, normalizer.force_std
    if ours.forces == "conservative" and not math.isclose(energy_std, force_std, rel_tol=1e-6):
        warnings.append(
            f"forces are {force_std / energy_std:g} times the slope of the energy, as they are in the public code: "
            f"the normaliser has {force_std:g} for forces and {energy_std:g} for energies"
        )
    step = finite_number(file.data.get("step"))
    source = {
        "format": "oc20",
        "file": file.path.name,
        "sha256": file.sha256,
        "model": name,
        "layout": file.layout,
        "prefix": file.prefix,
        "weights": which,
        "normalizer": origin,
        "step": step,
        "epoch": finite_number(file.data.get("epoch")),
        "metrics": metrics(file.data),
        **({"element_references": references} if references else {}),
        "warnings": warnings,
    }
    return Oc20Model(ours, tensors, normalizer, source, int(step or 0), warnings)


def _configuration(file: Oc20File, options: Options) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(public name, settings of the model, whole configuration)."""
    own = model_block(file.config)
    if options.config_file is None:
        if own is None:
            raise ValueError(
                "the file has no configuration of its model; give the YAML it was trained with as --config"
            )
        return *own, file.config
    if own is not None:
        raise ValueError("the file has its own configuration; leave --config out")
    config = read_mapping(options.config_file)
    found = model_block(config)
    if found is None:
        raise ValueError(f"{options.config_file} has no section model")
    return *found, config


def _without_repetitions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and scale factors, each once and in the file's order; what is said twice must agree."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_constant(name):
            expected = torch.linspace(0, 1, value.numel(), dtype=torch.float64)
            if value.dim() != 1 or not torch.allclose(value.double(), expected, rtol=0, atol=1e-5):
                raise ValueError(f"{name} is not evenly spaced from 0 to 1: another radial basis than egnscale's")
            continue
        first = without_alias(name)
        if first in named and not torch.equal(named[first], value):
            raise ValueError(f"{name} and {first} are one weight under two names, but differ in this file")
        named.setdefault(first, value)
    return named


def _check_names(file: Oc20File, named: Mapping[str, Tensor], config: AtomModelConfig) -> None:
    """Compare names and shapes with those of the model."""
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    shapes = {to_public_name(name, file.architecture) or name: tuple(value.shape) for name, value in wanted.items()}
    # A file may leave scale factors out: the public code has them in files of their own.
    missing = [name for name in shapes.keys() - named.keys() if not name.endswith(SCALE_FACTOR)]
    unexpected = [f"{file.prefix}{short(name)}" for name in named.keys() - shapes.keys()]
    different = [
        f"{name} of shape {tuple(named[name].shape)} for {shapes[name]}"
        for name in named.keys() & shapes.keys()
        if tuple(named[name].shape) != shapes[name]
    ]
    if missing or unexpected or different:
        missing = [f"{file.prefix}{name}" for name in missing]
        raise KeyMismatch(str(file.path), missing=missing, unexpected=unexpected, shapes=different)


def _chosen_weights(file: Oc20File, named: Mapping[str, Tensor], choice: str) -> tuple[dict[str, Tensor], str]:
    """(weights by public name, "ema" or "model"). Averaged weights come as a list, in the order of the state dict."""
    weights = {name: value for name, value in named.items() if not name.endswith(SCALE_FACTOR)}
    if choice == "auto" and file.data.get("ema") is not None and not file.has_ema:
        raise ValueError("its averaged weights (ema) are of an unknown form; --weights model leaves them out")
    if choice == "model" or (choice == "auto" and not file.has_ema):
        return weights, "model"
    if not file.has_ema:
        raise ValueError(
            "the file has no averaged weights (ema); those of a best_checkpoint.pt are its state_dict: "
            "leave --weights out"
        )
    shadow = file.data["ema"]["shadow_params"]
    if len(shadow) != len(weights):
        raise ValueError(
            f"there are {len(shadow)} averaged weights for {len(weights)} of the model; --weights model takes these"
        )
    averaged = {}
    for (name, value), average in zip(weights.items(), shadow, strict=True):
        if not isinstance(average, Tensor) or average.shape != value.shape:
            raise ValueError(f"the averaged weight in place of {name} has another shape; --weights model leaves it out")
        averaged[name] = average
    return averaged, "ema"


def _plain(what: str, value: Tensor, warnings: list[str]) -> Tensor:
    """The tensor in fp32."""
    if not value.is_floating_point():
        raise ValueError(f"{what} holds {value.dtype}, no weights")
    plain = value.detach().to(torch.float32).contiguous()
    if not torch.isfinite(plain).all():
        raise ValueError(f"{what} holds values that are not finite")
    note = "weights are stored in fp64 and were rounded to fp32"
    if value.dtype == torch.float64 and value.dim() and note not in warnings:
        warnings.append(note)
    return plain


def parameter_count(config: AtomModelConfig) -> int:
    """Trainable parameters of a model, without making it."""
    with torch.device("meta"):
        return count_parameters(build_model(config))
