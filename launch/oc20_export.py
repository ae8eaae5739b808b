"""From an egnscale checkpoint to a public OC20 one.

The file has what the public code reads of a best_checkpoint.pt: weights for use (with aliases and constants, in the
public order), configuration, normalisers, step. It holds plain data only: `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from egnscale.data.files import replacing
from egnscale.launch.oc20_settings import to_public_settings
from egnscale.launch.run_files import load_trained
from egnscale.launch.tasks import Normalizer
from egnscale.models import AtomModelConfig, DimeNetConfig
from egnscale.models.oc20_names import to_public_names

Layout = Literal["v0", "v1"]


def export_oc20(checkpoint: Path, out: Path, *, layout: Layout = "v1", prefix: str = "") -> dict[str, Any]:
    """Write a checkpoint in the public layout, atomically; returns what was done.

    Args:
        checkpoint: of egnscale, or a run directory (its latest).
        out: the .pt file.
        layout: of configuration and normalisers: v1 as FAIR-Chem 1.x has them, v0 as before (`model_attributes`).
        prefix: put before every name, as `module.` for a model that was trained in DistributedDataParallel.

    Raises:
        ValueError: if there is no whole checkpoint, its model has no public counterpart, or `out` exists.
        OSError: if the file cannot be written; nothing is left then.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another name, or remove it first")
    trained = load_trained(checkpoint)
    config, step = trained.model.config, int(trained.run["step"])
    settings = to_public_settings(config)
    state = public_state(trained.model.state_dict(), config, layout=layout)
    content = {
        "epoch": float(trained.run.get("source", {}).get("epoch") or trained.run.get("epoch") or 0.0),
        "step": step,
        "state_dict": {prefix + name: value for name, value in state.items()},
        "normalizers": _normalizers(trained.normalizer, config, layout),
        "elementrefs": {},
        "config": _configuration(settings, trained.normalizer, config, layout),
        "val_metrics": {},
        "amp": None,
    }
    try:
        with replacing(out) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's writer, which does not say what the system said
        raise OSError(f"{out} cannot be written: is the disk full? ({error})") from None
    return {
        "path": str(out),
        "bytes": out.stat().st_size,
        "model": settings["name"],
        "layout": layout,
        "tensors": len(state),
        "step": step,
        "warnings": _differences(config),
    }


def public_state(ours: dict[str, Tensor], config: AtomModelConfig, *, layout: Layout = "v1") -> dict[str, Tensor]:
    """The public state dict of a model, with aliases and constants, in the public order."""
    named = to_public_names(ours, config.name)
    if layout == "v0":
        # There, a factor that is not fitted is one; zero would multiply.
        for name, value in named.items():
            if name.endswith(".scale_factor") and value == 0:
                named[name] = torch.ones_like(value)
    if isinstance(config, DimeNetConfig) or config.rbf != "gaussian":
        return named
    centers = torch.linspace(0, 1, config.num_radial)
    names = ("radial_basis.rbf.offset", "cbf_basis3.radial_basis.rbf.offset")
    return {**{name: centers.clone() for name in names}, **named}


def _normalizers(normalizer: Normalizer, config: AtomModelConfig, layout: Layout) -> dict[str, dict[str, Tensor]]:
    # fp64, so that the numbers come back as they are.
    energy, energies, deviation = ("target", "grad_target", "std") if layout == "v0" else ("energy", "forces", "rmsd")

    def moments(mean: float, value: float) -> dict[str, Tensor]:
        return {"mean": torch.tensor(mean).double(), deviation: torch.tensor(value).double()}

    made = {energy: moments(normalizer.energy_mean, normalizer.energy_std)}
    if config.forces != "none":
        made[energies] = moments(0.0, normalizer.force_std)
    return made


def _configuration(
    settings: dict[str, Any], normalizer: Normalizer, config: AtomModelConfig, layout: Layout
) -> dict[str, Any]:
    """What the public trainers and calculators ask a configuration for; they train nothing by it."""
    with_forces = config.forces != "none"
    both: dict[str, Any] = {
        "optim": {"batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "max_epochs": 1}
        | {"optimizer": "AdamW", "lr_initial": 1e-4, "scheduler": "Null"},
        "cmd": {"seed": 0},
        "logger": "tensorboard",
        "amp": False,
        "gpus": 0,
    }
    source = {"src": ""}  # they delete it
    if layout == "v0":
        targets: dict[str, Any] = {
            "normalize_labels": True,
            "target_mean": normalizer.energy_mean,
            "target_std": normalizer.energy_std,
        }
        if with_forces:
            targets |= {"grad_target_mean": 0.0, "grad_target_std": normalizer.force_std}
        return {
            "trainer": "forces" if with_forces else "energy",
            "model": settings["name"],
            "model_attributes": {name: value for name, value in settings.items() if name != "name"},
            "task": {"dataset": "trajectory_lmdb", "type": "regression", "metric": "mae"},
            "dataset": {**source, **targets},
            "normalizer": targets,
            **both,
        }
    normalizers: dict[str, Any] = {"energy": {"mean": normalizer.energy_mean, "stdev": normalizer.energy_std}}
    outputs: dict[str, Any] = {"energy": {"level": "system"}}
    losses: list[dict[str, Any]] = [{"energy": {"fn": "mae", "coefficient": 1}}]
    if with_forces:
        normalizers["forces"] = {"mean": 0.0, "stdev": normalizer.force_std}
        outputs["forces"] = {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True}
        losses.append({"forces": {"fn": "l2mae", "coefficient": 100}})
    return {
        "trainer": "ocp",
        "model": settings,
        "task": {},
        "dataset": {"format": "lmdb", **source, "transforms": {"normalizer": normalizers}},
        "outputs": outputs,
        "loss_functions": losses,
        "evaluation_metrics": {"primary_metric": "forces_mae" if with_forces else "energy_mae"},
        **both,
    }


def _differences(config: AtomModelConfig) -> list[str]:
    """What makes the public code's numbers differ from ours."""
    found = []
    if isinstance(config, DimeNetConfig):
        if config.forces == "conservative" and config.angles == "exact":
            found.append("the public DimeNet++ leaves angles out of its forces: its forces differ, its energies agree")
        if config.symmetrize != "none":
            found.append("the model was trained on symmetrised graphs, which the public DimeNet++ does not make")
        if config.max_neighbors != 50:
            found.append(f"the model has max_neighbors {config.max_neighbors}; the public DimeNet++ always has 50")
    elif config.symmetrize != "oc20":
        found.append(
            f"the model was trained on graphs with symmetrize: {config.symmetrize}; the public code pairs edges "
            "otherwise where the limit on neighbours cuts"
        )
    return found
