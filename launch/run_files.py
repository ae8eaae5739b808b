"""What a run leaves in a checkpoint besides the training state, and how a model comes back from it.

`model.safetensors` and `run.json` are all that evaluation and the calculator read: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from egnscale.launch.config import RunConfig
from egnscale.launch.tasks import Normalizer
from egnscale.launch.weights import open_weights
from egnscale.models import AtomModel, AtomModelConfig, ExtendedGraph, Prediction, build_model, model_config
from egnscale.scaling.checkpoint import find_checkpoint, verify_checkpoint
from egnscale.scaling.layout import Mesh

WEIGHTS = "model.safetensors"
RUN = "run.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for use, in fp32 on the CPU."""

    model: AtomModel  #: or a `StagedInference`, which is called alike
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


def run_model(config: RunConfig, before: AtomModelConfig | None) -> AtomModelConfig:
    """What a run's configuration says of its model.

    Args:
        before: the model that `task.init_from` has; used where the configuration names one, for all that it leaves out.

    Raises:
        ValueError: for a model that cannot be, or is said in two ways.
    """
    given = config.model
    values = given.hyperparameters()
    if config.task.name == "is2re":
        values = {"forces": "none"} | values
    if config.task.init_from is None:
        return model_config(given.preset, name=given.name, **values)
    if given.preset is not None:
        raise ValueError("task.init_from brings the sizes of its model; leave model.preset out")
    assert before is not None
    if given.name not in (None, before.name):
        raise ValueError(f"task.init_from is a {before.name}, model.name says {given.name}; leave model.name out")
    return model_config(name=before.name, **{**asdict(before), **values})


@dataclass(frozen=True)
class TrainedRun:
    """What a checkpoint says of a model; its weights are in `path / WEIGHTS`."""

    config: AtomModelConfig
    normalizer: Normalizer
    run: dict[str, Any]  #: the checkpoint's run.json
    path: Path


def read_trained(path: str | Path) -> TrainedRun:
    """What the checkpoint (or a run's latest one) says of its model.

    Raises:
        ValueError: if there is no whole checkpoint, or it is incomplete.
    """
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint)
    run = read_run(checkpoint)
    config = recorded_model(run, checkpoint)
    try:
        normalizer = Normalizer(**run["normalizer"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint / RUN} is incomplete: {error}") from None
    return TrainedRun(config, normalizer, run, checkpoint)


def load_trained(path: str | Path | TrainedRun, mesh: Mesh | None = None) -> TrainedModel:
    """The model of a checkpoint (or of a run's latest one), with the weights meant for use.

    Args:
        path: or what `read_trained` gave.
        mesh: with several stages, each gets its layers only.

    Raises:
        ValueError: if there is no whole checkpoint, or it does not fit.
    """
    trained = path if isinstance(path, TrainedRun) else read_trained(path)
    if mesh is not None and mesh.layout.pipe > 1:
        from egnscale.launch.staged_inference import StagedInference

        staged: Any = StagedInference(trained.config, trained.path / WEIGHTS, mesh)
        return TrainedModel(staged.eval(), trained.normalizer, trained.run, trained.path)
    model = build_model(trained.config)
    with open_weights(trained.path / WEIGHTS) as weights:
        weights.check_fit({name: value.shape for name, value in model.state_dict().items()})
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(weights[name])
    return TrainedModel(model.eval(), trained.normalizer, trained.run, trained.path)


def together(model: Any) -> tuple[Callable[[Sequence[ExtendedGraph]], Sequence[Prediction]], int]:
    """A trained model as what is given several graphs, and how many it likes to have."""
    if hasattr(model, "at_once"):
        return model.predict, model.at_once
    return lambda graphs: [model(graph) for graph in graphs], 1
