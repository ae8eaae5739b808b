"""Checkpoints in the public OC20 layouts, made of the reference weights in `tests/reference`."""

from __future__ import annotations

import json
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN, STD = -0.7554450631141663, 2.887317180633545
#: Architecture -> file. Random weights of small widths, under public names, aliases and constants included.
FILES = {"gemnet_t": "gemnet_tiny_unfitted.npz", "dimenetplusplus": "dimenetpp_tiny.npz"}
HEADS = {
    "gemnet_t": {"forces": {"module": "gemnet_t_force_head"}},
    "dimenetplusplus": {"energy": {"module": "dimenetplusplus_energy_and_force_head"}},
}


@cache
def reference(architecture: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, np.ndarray]]:
    """(public hyperparameters, public state dict, all arrays)."""
    with np.load(Path(__file__).parent / "reference" / FILES[architecture], allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    state = {name[3:]: torch.as_tensor(value) for name, value in arrays.items() if name.startswith("sd/")}
    return json.loads(str(arrays["cfg"])), state, arrays


def public_state(architecture: str, *, scale: float | None = 0.0) -> OrderedDict[str, Tensor]:
    """A copy of the reference's state dict, its aliases being one tensor; `scale` begins a row of scale factors."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in reference(architecture)[1].items():
        first = name.replace(".seq_energy.", ".layers.")
        state[name] = state[first] if first in state else value.clone()
    for number, name in enumerate(name for name in state if name.endswith("scale_factor")):
        state[name] = torch.tensor(scale + 0.125 * number) if scale else torch.tensor(0.0)
    return state


def normalizers(kind: str) -> dict[str, Any]:
    """As in a public checkpoint: "tensors" and "floats" of the old form, or the "new" one."""
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    match kind:
        case "floats":
            return {"target": {"mean": MEAN, "std": STD}, "grad_target": {"mean": 0.0, "std": STD}}
        case "tensors":
            return {"target": {"mean": mean, "std": std}, "grad_target": {"mean": torch.tensor(0.0), "std": std}}
    block = OrderedDict(mean=mean[None], rmsd=std[None])
    return {"energy": block, "forces": OrderedDict(mean=torch.zeros(1), rmsd=std[None])}


def old_config(architecture: str, **more: Any) -> dict[str, Any]:
    return {"model": architecture, "model_attributes": dict(reference(architecture)[0]), "cmd": {"seed": 0}, **more}


def new_config(architecture: str, **more: Any) -> dict[str, Any]:
    return {"model": {"name": architecture, **reference(architecture)[0]}, **more}


def hydra_config(architecture: str) -> dict[str, Any]:
    backbone = {"model": f"{architecture}_backbone", **reference(architecture)[0]}
    return {"model": {"name": "hydra", "backbone": backbone, "heads": HEADS[architecture]}}


def averaged(state: OrderedDict[str, Tensor]) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:
    """(a state dict of other weights, an `ema` that holds the given ones as the public code stores them)."""
    once = [name for name in state if not name.endswith((".offset", ".scale_factor")) and ".seq_energy." not in name]
    ema = {"decay": 0.999, "num_updates": None, "shadow_params": [state[name] for name in once], "collected_params": []}
    other = OrderedDict((name, value + 1 if name in once else value) for name, value in state.items())
    for name in other:
        other[name] = other[name.replace(".seq_energy.", ".layers.")]
    return other, ema


def checkpoint(architecture: str, layout: str = "v1", *, scale: float | None = 2.0) -> dict[str, Any]:
    """The content of a public checkpoint, in one of `LAYOUTS`; `scale` as in `public_state`."""
    state = public_state(architecture, scale=scale)
    content: dict[str, Any] = {
        "epoch": 3.25,
        "step": 1200,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler": {"best": np.float64(0.03), "mode": "min"},
        "normalizers": normalizers("new"),
        "config": new_config(architecture),
        "val_metrics": {"forces_mae": {"metric": np.float64(0.03), "total": 3.0, "numel": 100}},
        "amp": None,
        "best_val_metric": 0.03,
        "primary_metric": "forces_mae",
    }
    prefix = ""
    match layout:
        case "v0, many processes":
            prefix = "module.module."
            content |= {"normalizers": normalizers("tensors"), "config": old_config(architecture)}
        case "v0, one process":
            prefix = "module."
            content |= {"normalizers": normalizers("floats"), "config": old_config(architecture)}
        case "v0, normaliser in the configuration":
            prefix = "module."
            targets = {"target_mean": MEAN, "target_std": STD, "grad_target_mean": 0.0, "grad_target_std": STD}
            config = old_config(architecture, normalizer={"normalize_labels": True, **targets})
            content |= {"normalizers": {}, "config": config}
        case "v1, many processes":
            prefix = "module."
        case "v1, normaliser in the configuration":
            given = {"energy": {"mean": MEAN, "stdev": STD}, "forces": {"mean": 0.0, "stdev": STD}}
            train = {"format": "lmdb", "transforms": {"normalizer": given}}
            content |= {"config": new_config(architecture, dataset={"train": train})}
            del content["normalizers"]
        case "compiled":
            prefix = "module._orig_mod."
        case "hydra":
            prefix = "module.backbone."
            content |= {"config": hydra_config(architecture), "elementrefs": {}}
        case "averaged":
            prefix = "module.module."
            state, content["ema"] = averaged(state)
        case "best":
            for name in ("optimizer", "scheduler", "best_val_metric"):
                del content[name]
        case _:
            assert layout == "v1"
    content["state_dict"] = OrderedDict((prefix + name, value) for name, value in state.items())
    return content


LAYOUTS = (
    *("v0, many processes", "v0, one process", "v0, normaliser in the configuration"),
    *("v1", "v1, many processes", "v1, normaliser in the configuration"),
    *("compiled", "hydra", "averaged", "best"),
)
