"""What a run leaves in a checkpoint besides the training state, and how a model comes back from it.

`model.safetensors` and `run.json` are all that evaluation and the calculator read: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from egnscale.launch.tasks import Normalizer
from egnscale.models import AtomModel, AtomModelConfig, build_model, model_config
from egnscale.scaling.checkpoint import find_checkpoint, verify_checkpoint

WEIGHTS = "model.safetensors"
RUN = "run.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for use, in fp32 on the CPU."""

    model: AtomModel
    normalizer: Normalizer
    run: dict[str, Any]  #: the checkpoint's run.json
    path: Path


def run_record(model: AtomModelConfig, normalizer: Normalizer, **state: Any) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("egnscale", "torch", "deepspeed")},
        "model": {"name": model.name, **asdict(model)},
        "normalizer": asdict(normalizer),
        **state,
    }


def save_weights(path: Path, weights: Iterable[tuple[str, Tensor]], model: torch.nn.Module, *, write: bool) -> None:
    """Write parameters and scale factors by name, fp32. Every rank iterates over `weights`, one writes."""
    tensors = {}
    for name, tensor in weights:
        if write:
            tensors[name] = tensor.detach().float().cpu().contiguous()
    if write:
        for name, buffer in model.named_buffers():
            tensors[name] = buffer.detach().float().cpu().contiguous()
        write_tensors(path, tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file of contiguous tensors that share no memory.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(0o644)  # as the other files; safetensors leaves it to its owner alone


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: if it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Read and check a checkpoint's run.json."""
    try:
        run = json.loads((checkpoint / RUN).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint / RUN} cannot be read: {error}") from None
    if run.get("format") != FORMAT:
        raise ValueError(f"{checkpoint / RUN} has format {run.get('format')}; this version of egnscale reads {FORMAT}")
    return run


def recorded_model(run: dict[str, Any], checkpoint: Path) -> AtomModelConfig:
    """The configuration of the model that a run.json describes.

    Raises:
        ValueError: if it describes none.
    """
    try:
        return model_config(**run["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / RUN} is incomplete: {error}") from None


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Load a model's parameters and scale factors.

    Raises:
        ValueError: where names or shapes differ, naming the first few.
    """
    found = read_weights(path)
    _check_fit(found, model.state_dict(), path)
    model.load_state_dict(found)


def _check_fit(found: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    problems = [f"lacks {name}" for name in wanted.keys() - found.keys()]
    problems += [f"has {name}, which the model does not" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model's is {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more differences)" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(sorted(problems)[:3])}{more}")


def start_weights(model: torch.nn.Module, start: TrainedModel) -> None:
    """Give a model the weights of a trained one. What only the trained one has for forces is left out.

    Raises:
        ValueError: where anything else differs, naming the first few.
    """
    wanted = model.state_dict()
    found = {name: value for name, value in start.model.state_dict().items() if name in wanted or ".force." not in name}
    _check_fit(found, wanted, start.path / WEIGHTS)
    model.load_state_dict(found)


def load_trained(path: str | Path) -> TrainedModel:
    """The model of a checkpoint (or of a run's latest one), with the weights meant for use.

    Raises:
        ValueError: if there is no whole checkpoint, or it does not fit.
    """
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint)
    run = read_run(checkpoint)
    config = recorded_model(run, checkpoint)
    try:
        normalizer = Normalizer(**run["normalizer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / RUN} is incomplete: {error}") from None
    model = build_model(config)
    load_weights(model, checkpoint / WEIGHTS)
    return TrainedModel(model.eval(), normalizer, run, checkpoint)
