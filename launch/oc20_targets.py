"""How the targets of a public checkpoint were normalised, and what its energies are relative to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from egnscale.launch.oc20_file import finite_number, short
from egnscale.launch.tasks import Normalizer


def find_normalizer(
    data: Mapping[str, Any], config: Mapping[str, Any], forces: str, given: Normalizer | None
) -> tuple[Normalizer, str]:
    """(normaliser, where it was found): in the checkpoint, else in the configuration, else given.

    Args:
        data: the public checkpoint.
        config: its configuration.
        forces: of the model; "none" needs no normaliser of forces.
        given: by the user.

    Raises:
        ValueError: if there is none, it makes no sense, or the one given contradicts the file.
    """
    found = _stored_normalizer(data, forces) or _configured_normalizer(config, forces)
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
        raise ValueError(f"normalizers has {short(min(stored.keys() - known, key=str))}; expected energy and forces")
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
        number = finite_number(value)
        if number is None:
            raise ValueError(f"{where}: {' or '.join(names)} is {short(value)}; expected a number")
        values.append(float(number))
    return values[0], values[1]


def element_references(
    data: Mapping[str, Any], config: Mapping[str, Any], *, drop: bool, warnings: list[str]
) -> dict[str, list[float]]:
    """Energies of elements that the model's energies are relative to: {target: by atomic number}, eV.

    Args:
        data: the public checkpoint.
        config: its configuration.
        drop: go on without them, since egnscale adds none.
        warnings: takes a line if it did.

    Raises:
        ValueError: if there are any, and they are not to be dropped.
    """
    found: dict[str, list[float]] = {}
    stored = data.get("elementrefs")
    stored = {} if stored is None else stored
    if not isinstance(stored, dict):
        raise ValueError(f"elementrefs is {short(stored)}; expected a value for each element")
    for name, block in stored.items():
        for value in block.values() if isinstance(block, dict) else (block,):
            if not isinstance(value, Tensor) or value.numel() > 1000:
                raise ValueError(f"elementrefs: {short(name)} is {short(value)}; expected a value for each element")
            if bool((value != 0).any()):
                found[short(name)] = [float(number) for number in value.flatten()]
    blocks = [block.get("transforms") for _, block in _dataset_blocks(config)]
    configured = any(isinstance(block, dict) and block.get("element_references") for block in blocks)
    if not found and not configured:
        return {}
    if not drop:
        raise ValueError(
            "its energies are relative to references for each element (elementrefs), which egnscale does not add; "
            "--without-element-references imports it all the same, and then you add them"
        )
    warnings.append("energies are relative to the element references of the file: add them to have its energies")
    return found
