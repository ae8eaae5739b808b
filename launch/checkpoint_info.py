"""What a checkpoint holds, of egnscale or of OC20, without making its model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from egnscale.launch.oc20_file import Oc20File, metrics
from egnscale.launch.oc20_import import interpret, parameter_count
from egnscale.launch.oc20_scales import scale_factor_counts
from egnscale.launch.run_files import WEIGHTS, read_run, recorded_model
from egnscale.scaling.checkpoint import FORMAT, find_checkpoint, verify_checkpoint


def describe(path: Path) -> dict[str, Any]:
    """Model, sizes, normaliser, position and metrics, as plain data; both kinds have the same keys.

    Of an OC20 file, `problem` says what keeps it from being imported as it is, or is None.

    Raises:
        ValueError: if there is no checkpoint, or it is damaged.
        OSError: if it cannot be read.
    """
    return _describe_file(path) if path.is_file() else _describe_checkpoint(find_checkpoint(path))


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    verify_checkpoint(path)
    run = read_run(path)
    try:
        config = recorded_model(run, path)
        evaluations = run.get("evaluations", {})
        source = run.get("source")
        origin = f"{source['file']} ({source['layout']}, sha256 {source['sha256'][:16]}...)" if source else None
        found = {
            "path": str(path),
            "kind": "checkpoint of egnscale",
            "layout": f"format {FORMAT}, written by egnscale {run['versions']['egnscale']}",
            "model": run["model"],
            "parameters": parameter_count(config),
            "normalizer": run["normalizer"],
            "weights": source["weights"] if source else "for use (averaged where the run averages)",
            "step": run["step"],
            "epoch": source["epoch"] if source else None,
            "metrics": {
                **({"OC20 validation": source["metrics"]} if source and source["metrics"] else {}),
                **{split: {k: v for k, v in values.items() if k != "step"} for split, values in evaluations.items()},
            },
            "best": run.get("best") or None,
            "source": origin,
            "warnings": source["warnings"] if source else [],
            "problem": None,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'run.json'} is incomplete: {error}") from None
    return {**found, "scale_factors": _factors(path / WEIGHTS)}


def _factors(weights: Path) -> dict[str, int]:
    try:
        with safe_open(weights, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(".scale_factor")]  # noqa: SIM118
            fitted, every = scale_factor_counts({name: file.get_tensor(name) for name in names})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} cannot be read as safetensors: {error}") from None
    return {"fitted": fitted, "all": every}


def _describe_file(path: Path) -> dict[str, Any]:
    file = Oc20File.open(path)
    fitted, every = scale_factor_counts(file.state)
    found: dict[str, Any] = {
        "path": str(path),
        "kind": "OC20 checkpoint",
        "layout": file.layout,
        "model": None,
        "parameters": None,
        "normalizer": None,
        "weights": "averaged (ema) and last trained" if file.has_ema else "one set",
        "step": None,
        "epoch": None,
        "metrics": {},
        "best": None,
        "source": f"sha256 {file.sha256}",
        "scale_factors": {"fitted": fitted, "all": every},
        "warnings": [],
        "problem": None,
    }
    stored = metrics(file.data)
    found["best"] = stored.pop("best", None)
    found["metrics"] = {"validation": stored} if stored else {}
    try:
        model = interpret(file)
    except ValueError as error:
        return found | {"model": {"name": file.architecture}, "problem": str(error)}
    return found | {
        "model": {"name": file.architecture, **asdict(model.config)},
        "parameters": parameter_count(model.config),
        "normalizer": asdict(model.normalizer),
        "step": model.source["step"],
        "epoch": model.source["epoch"],
        "warnings": model.warnings,
    }
