"""Scale factors of a public GemNet-T: of the state dict, the checkpoint's `scale_dict`, and files of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egnscale.launch.oc20_file import PREFIX, finite_number, short
from egnscale.launch.torch_file import read_torch_file
from egnscale.models.oc20_names import is_ignored_site, scale_factor_module, to_our_name

#: What names of scale factors end in, in a state dict.
SCALE_FACTOR = ".scale_factor"
#: Every scale factor stands beside one of these weights, in the same module.
_SITE_BESIDE = {
    ".trip_interaction.mlp_rbf.linear.weight": ".trip_interaction.scale_rbf",
    ".trip_interaction.mlp_cbf.weight": ".trip_interaction.scale_cbf_sum",
    ".dense_rbf.linear.weight": ".scale_sum",
    ".dense_rbf_F.linear.weight": ".scale_rbf_F",
}


def scale_factors(
    named: Mapping[str, Tensor], scale_dict: Any, scale_file: Path | None, warnings: list[str]
) -> dict[str, Tensor]:
    """{public name: ()} of every scale factor that a model has; the sources must agree.

    Zero gives way to another source. So does one, where the oldest code began, but only if no factor of the state dict
    is anything else: in a fitted model it may have been in force, since the public code ignores `IntBlock_*_sum`.

    Args:
        named: weights and scale factors by public name.
        scale_dict: {site or module: value}, of the checkpoint; may be anything, since it comes from there.
        scale_file: the same, as a file.
        warnings: takes a line if factors are not fitted, or named as the public code does not know them.

    Raises:
        ValueError: for a factor that the model does not have, sources that disagree, or a value that makes no sense.
        OSError: if the file cannot be opened.
    """
    sites = {f"{path}{SCALE_FACTOR}" for path in _sites(named)}
    values = {name: scalar(name, named[name]) for name in sites if name in named}
    said_by = dict.fromkeys(values, "state_dict")
    initial = {0.0, 1.0} if set(values.values()) <= {0.0, 1.0} else {0.0}
    sources = []
    if isinstance(scale_dict, Tensor) or scale_dict:
        sources.append(("scale_dict", scale_dict))
    if scale_file is not None:
        sources.append((str(scale_file), _read_scale_file(scale_file)))
    for where, given in sources:
        if not isinstance(given, dict):
            raise ValueError(f"{where} is no dictionary of scale factors")
        if not sites:
            raise ValueError(f"{where} has scale factors, but the model has none")
        used, overruled = [], []
        for site, value in given.items():
            if site == "comment":
                continue
            path = scale_factor_module(PREFIX.sub("", site, count=1)) if isinstance(site, str) else None
            if path is None or f"{path}{SCALE_FACTOR}" not in sites:
                raise ValueError(f"{where}: the model has no scale factor {short(site)}")
            name, number = f"{path}{SCALE_FACTOR}", scalar(f"{where}: {site}", value)
            before, source = values.get(name, 0.0), said_by.get(name)
            ignored = is_ignored_site(PREFIX.sub("", site, count=1))
            if number == 0.0:
                continue
            if before == 0.0 or (source == "state_dict" and before in initial):
                values[name], said_by[name] = number, where
                if ignored:
                    used.append(site)
            elif not math.isclose(before, number, rel_tol=1e-5):
                if not (ignored and source == "state_dict"):
                    raise ValueError(f"scale factor {path} is {before:g} in {source}, but {number:g} in {where}")
                overruled.append(site)
        if used:
            warnings.append(
                f"{', '.join(used)} of {where} were taken, which the public code ignores: there, these factors were one"
            )
        if overruled:
            warnings.append(
                f"{', '.join(overruled)} of {where} were not taken: the state dict has other numbers, and the public "
                "code ignores these names"
            )
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
            if name.endswith(weight) and to_our_name(name.removesuffix(weight) + site + SCALE_FACTOR, "gemnet_t"):
                found.add(name.removesuffix(weight) + site)
    return found


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


def scalar(what: str, value: Any) -> float:
    """A number, or a tensor of one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = finite_number(value)
    if number is None or number < 0:
        raise ValueError(f"{short(what)} is {short(value)}; expected a number that is not negative")
    return float(number)


def scale_factor_counts(named: Mapping[str, Tensor]) -> tuple[int, int]:
    """(fitted, all) of the scale factors in a state dict."""
    values = [value for name, value in named.items() if name.endswith(SCALE_FACTOR)]
    return sum(bool((value != 0).all()) for value in values), len(values)
