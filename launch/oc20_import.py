"""From a public OC20 checkpoint to an egnscale one.

    file = Oc20File.open(Path("gemnet_t_direct_h512_all.pt"))       what the file holds, under public names
    model = interpret(file)                                          our configuration, weights and normaliser
    import_oc20(Path("gemnet_t_direct_h512_all.pt"), Path("OUT"))    both, written as a checkpoint of egnscale

Nothing is guessed and nothing dropped in silence: what the file does not say must be given, what it says twice must
agree, and what egnscale cannot represent is refused by name. `docs/oc20-checkpoints.md` lists the forms that are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from egnscale.launch.config_file import read_mapping
from egnscale.launch.oc20_settings import ARCHITECTURES, model_block, to_our_config
from egnscale.launch.run_files import RUN, WEIGHTS, run_record, write_tensors
from egnscale.launch.tasks import Normalizer
from egnscale.launch.torch_file import read_torch_file
from egnscale.models import AtomModelConfig, build_model, count_parameters
from egnscale.models.oc20_names import (
    is_constant,
    recognise,
    scale_factor_module,
    to_our_name,
    to_public_name,
    without_alias,
)
from egnscale.scaling.checkpoint import write_checkpoint

#: Names in front of the model's own: of wrappers that a model was trained in, and of hydra's backbone.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|backbone)\.)*")
_SCALE = ".scale_factor"


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
        match = _PREFIX.match(next(iter(state)))
        prefix = match[0] if match else ""
        named = {name.removeprefix(prefix): value for name, value in state.items()}
        if len(named) != len(state):
            raise ValueError(f"{path}: its state_dict has names with and without {prefix!r} in front")
        architecture = recognise(named)
        if architecture is None:
            raise ValueError(
                f"{path} holds neither GemNet-T nor DimeNet++: its weights begin with {_short(next(iter(state)))}"
            )
        # Weights that are parts of each other would be written out each: a small file could fill a disk.
        used = sum(value.numel() * value.itemsize for name, value in named.items() if name == without_alias(name))
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
        "parameters": sum(value.numel() for name, value in model.weights.items() if not name.endswith(_SCALE)),
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
        factors = _scale_factors(file, named, options, warnings)
        normalizer, origin = _normalizer(file.data, config, ours.forces, options)
        references = _references(file.data, config, options, warnings)
    except KeyMismatch:
        raise
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    renamed = {**_renamed(weights, file.architecture), **_renamed(factors, file.architecture)}
    tensors = {name: _plain(f"{file.path}: {name}", value, warnings) for name, value in renamed.items()}
    step = _number(file.data.get("step"))
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
        "epoch": _number(file.data.get("epoch")),
        "metrics": metrics(file.data),
        **({"element_references": references} if references else {}),
        "warnings": warnings,
    }
    return Oc20Model(ours, tensors, normalizer, source, int(step or 0), warnings)


# ------------------------------------------------------------------------------------------------ model and weights


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
    missing = [name for name in shapes.keys() - named.keys() if not name.endswith(_SCALE)]
    unexpected = [f"{file.prefix}{_short(name)}" for name in named.keys() - shapes.keys()]
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
    weights = {name: value for name, value in named.items() if not name.endswith(_SCALE)}
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


def _renamed(public: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    return {to_our_name(name, architecture) or name: value for name, value in public.items()}


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


# ---------------------------------------------------------------------------------------------------- scale factors


def _scale_factors(
    file: Oc20File, named: Mapping[str, Tensor], options: Options, warnings: list[str]
) -> dict[str, Tensor]:
    """{public name: ()} of every scale factor: of the state dict, of `scale_dict` and of a file, which must agree.

    Zero, and one in a state dict (where the oldest code began), mean that a factor is not fitted.
    """
    sites = {f"{path}{_SCALE}" for path in _sites(named)}
    values = {name: _scalar(name, named[name]) for name in sites if name in named}
    said_by = dict.fromkeys(values, "state_dict")
    sources = []
    if file.data.get("scale_dict"):
        sources.append(("scale_dict", file.data["scale_dict"]))
    if options.scale_file is not None:
        sources.append((str(options.scale_file), _read_scale_file(options.scale_file)))
    for where, given in sources:
        if not isinstance(given, dict):
            raise ValueError(f"{where} is no dictionary of scale factors")
        if not sites:
            raise ValueError(f"{where} has scale factors, but {file.architecture} has none")
        for name, value in given.items():
            if name == "comment":
                continue
            path = scale_factor_module(_PREFIX.sub("", name, count=1)) if isinstance(name, str) else None
            if path is None or f"{path}{_SCALE}" not in sites:
                raise ValueError(f"{where}: the model has no scale factor {_short(name)}")
            name, number = f"{path}{_SCALE}", _scalar(f"{where}: {name}", value)
            before = values.get(name, 0.0)
            if before not in (0.0, 1.0) and number != 0.0 and not math.isclose(before, number, rel_tol=1e-5):
                raise ValueError(f"scale factor {path} is {before:g} in {said_by[name]}, but {number:g} in {where}")
            if before in (0.0, 1.0) and number != 0.0:
                values[name], said_by[name] = number, where
    unfitted = sorted(name for name in sites if values.get(name, 0.0) == 0.0)
    if unfitted:
        warnings.append(
            f"{len(unfitted)} of {len(sites)} scale factors are not fitted and act as one "
            "(--scale-file reads them from the file that the model was trained with)"
        )
    return {name: torch.tensor(values.get(name, 0.0)) for name in sites}


def _sites(named: Mapping[str, Tensor]) -> set[str]:
    """Paths of all scale factors that a model with these weights has."""
    found = set()
    for name in named:
        for weight, site in _SITE_BESIDE.items():
            if name.endswith(weight) and to_our_name(name.removesuffix(weight) + site + _SCALE, "gemnet_t"):
                found.add(name.removesuffix(weight) + site)
    return found


#: Every scale factor stands beside one of these weights, in the same module.
_SITE_BESIDE = {
    ".trip_interaction.mlp_rbf.linear.weight": ".trip_interaction.scale_rbf",
    ".trip_interaction.mlp_cbf.weight": ".trip_interaction.scale_cbf_sum",
    ".dense_rbf.linear.weight": ".scale_sum",
    ".dense_rbf_F.linear.weight": ".scale_rbf_F",
}


def _read_scale_file(path: Path) -> Any:
    """A JSON file {name: value, "comment": ...}, or a dictionary written by torch.save."""
    with open(path, "rb") as file:
        is_json = file.read(64).lstrip()[:1] == b"{"
    if not is_json:
        return read_torch_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_once, path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{path}: a name stands twice")
    return found


def _scalar(what: str, value: Any) -> float:
    """A number, or a tensor of one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = _number(value)
    if number is None or number < 0:
        raise ValueError(f"{_short(what)} is {_short(value)}; expected a number that is not negative")
    return float(number)


# ------------------------------------------------------------------------------------------ normaliser, references


def _normalizer(
    data: Mapping[str, Any], config: Mapping[str, Any], forces: str, options: Options
) -> tuple[Normalizer, str]:
    """(normaliser, where it was found)."""
    found = _stored_normalizer(data, forces) or _configured_normalizer(config, forces)
    given = options.normalizer
    if given is None:
        if found is None:
            raise ValueError(
                "neither the file nor its configuration says how targets were normalised; give --normalizer MEAN STD "
                "FORCE_STD (eV, eV, eV/A; for OC20's S2EF -0.7554450631141663 2.887317180633545 2.887317180633545)"
            )
        return found
    if found is not None and not _close(found[0], given):
        have = found[0]
        raise ValueError(
            f"--normalizer contradicts the file, which has {have.energy_mean:g} {have.energy_std:g} {have.force_std:g} "
            f"({found[1]}); leave it out"
        )
    return given, "--normalizer"


def _close(one: Normalizer, other: Normalizer) -> bool:
    pairs = zip(asdict(one).values(), asdict(other).values(), strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) for a, b in pairs)


def _stored_normalizer(data: Mapping[str, Any], forces: str) -> tuple[Normalizer, str] | None:
    """Of the checkpoint: {target, grad_target}: {mean, std}, or {energy, forces}: {mean, rmsd}."""
    stored = data.get("normalizers")
    if not isinstance(stored, dict) or not stored:
        return None
    known = {"target", "energy", "grad_target", "forces"}
    if not stored.keys() <= known:
        raise ValueError(f"normalizers has {_short(min(stored.keys() - known, key=str))}; expected energy and forces")
    energy, force = (stored.get(new, stored.get(old)) for new, old in (("energy", "target"), ("forces", "grad_target")))
    if energy is None or (force is None and forces != "none"):
        raise ValueError("normalizers lacks energies or forces; the model must have both normalised")
    return _made("normalizers", energy, force), "normalizers of the file"


def _configured_normalizer(config: Mapping[str, Any], forces: str) -> tuple[Normalizer, str] | None:
    """Of the configuration: dataset's target_mean and so on (old), or its transforms (new)."""
    for where, block in _dataset_blocks(config):
        if block.get("normalize_labels") is False:
            return Normalizer(0.0, 1.0, 1.0), f"{where}: normalize_labels is false"
        if "target_mean" in block and "target_std" in block:
            energy = {"mean": block["target_mean"], "std": block["target_std"]}
            force = None
            if "grad_target_std" in block:
                force = {"mean": block.get("grad_target_mean", 0.0), "std": block["grad_target_std"]}
            if force is not None or forces == "none":
                return _made(where, energy, force), f"{where} of the configuration"
        transforms = block.get("transforms")
        normalizer = transforms.get("normalizer") if isinstance(transforms, dict) else None
        if isinstance(normalizer, dict) and "energy" in normalizer and ("forces" in normalizer or forces == "none"):
            made = _made(f"{where}.transforms.normalizer", normalizer["energy"], normalizer.get("forces"))
            return made, f"{where}.transforms.normalizer of the configuration"
    return None


def _dataset_blocks(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Places of a public configuration that may describe the training set."""
    dataset = config.get("dataset")
    train = None
    if isinstance(dataset, dict):
        train = dataset.get("train")
    elif isinstance(dataset, list) and dataset:
        train = dataset[0]
    blocks = [("normalizer", config.get("normalizer")), ("dataset", dataset), ("dataset.train", train)]
    return [(where, block) for where, block in blocks if isinstance(block, dict)]


def _made(where: str, energy: Any, force: Any) -> Normalizer:
    mean, deviation = _moments(f"{where}, energies", energy)
    force_mean, force_deviation = (0.0, deviation) if force is None else _moments(f"{where}, forces", force)
    if abs(force_mean) > 1e-6 * force_deviation:
        raise ValueError(f"{where}: the mean of forces is {force_mean:g}; egnscale has forces of mean zero only")
    return Normalizer(mean, deviation, force_deviation)


def _moments(where: str, block: Any) -> tuple[float, float]:
    if not isinstance(block, dict):
        raise ValueError(f"{where}: expected mean and std or rmsd")
    values = []
    for names in (("mean",), ("std", "rmsd", "stdev")):
        value = next((block[name] for name in names if name in block), None)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        number = _number(value)
        if number is None:
            raise ValueError(f"{where}: {' or '.join(names)} is {_short(value)}; expected a number")
        values.append(float(number))
    return values[0], values[1]


def _references(
    data: Mapping[str, Any], config: Mapping[str, Any], options: Options, warnings: list[str]
) -> dict[str, list[float]] | None:
    """Energies of elements that the model's energies are relative to; egnscale adds none."""
    found: dict[str, list[float]] = {}
    stored = data.get("elementrefs")
    for name, block in stored.items() if isinstance(stored, dict) else ():
        for value in block.values() if isinstance(block, dict) else (block,):
            if isinstance(value, Tensor) and value.dim() <= 2 and value.numel() <= 1000 and bool((value != 0).any()):
                found[_short(name)] = [float(number) for number in value.flatten()]
            elif isinstance(value, Tensor) and value.numel() > 1000:
                raise ValueError(
                    f"elementrefs: {_short(name)} has {value.numel()} values, more than there are elements"
                )
    blocks = [block.get("transforms") for _, block in _dataset_blocks(config)]
    configured = any(isinstance(block, dict) and block.get("element_references") for block in blocks)
    if not found and not configured:
        return None
    if not options.drop_references:
        raise ValueError(
            "its energies are relative to references for each element (elementrefs), which egnscale does not add; "
            "--without-element-references imports it all the same, and then you add them"
        )
    warnings.append("energies are relative to the element references of the file: add them to have its energies")
    return found or None


# ------------------------------------------------------------------------------------------------------------- small


def metrics(data: Mapping[str, Any]) -> dict[str, float]:
    """The validation metrics that a public checkpoint holds: {name: value}."""
    found: dict[str, float] = {}
    stored = data.get("val_metrics")
    for name, value in list(stored.items())[:100] if isinstance(stored, dict) else ():
        number = _number(value.get("metric") if isinstance(value, dict) else value)
        if number is not None:
            found[_plain_text(name)] = float(number)
    best = _number(data.get("best_val_metric"))
    if best is not None:
        found["best"] = float(best)
    return found


def scale_factor_counts(named: Mapping[str, Tensor]) -> tuple[int, int]:
    """(fitted, all) of the scale factors in a state dict."""
    values = [value for name, value in named.items() if name.endswith(_SCALE)]
    return sum(bool((value != 0).all()) for value in values), len(values)


def parameter_count(config: AtomModelConfig) -> int:
    """Trainable parameters of a model, without making it."""
    with torch.device("meta"):
        return count_parameters(build_model(config))


def _number(value: Any) -> float | int | None:
    """A finite number, or None."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None


def _plain_text(value: Any) -> str:
    return str(value)[:80] if isinstance(value, str | int | float) else type(value).__name__


def _short(value: Any) -> str:
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
