"""DeepSpeed's configuration of a run: a JSON file as DeepSpeed knows it, plus what the run decides.

The file may set whatever DeepSpeed understands. Where the run's own configuration decides, it must say "auto", say the
same, or say nothing. Nothing of DeepSpeed's vocabulary is spelled a second time in ours.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from egnscale.scaling.combinations import Offload, Precision

#: DeepSpeed counts micro-batches in "samples". Ours is one graph, however many structures it holds.
MICRO_BATCH = 1
REFUSED = {
    "activation_checkpointing": "what is recomputed is set by parallel.recompute, and done by torch: DeepSpeed's own "
    "checkpointing gives wrong gradients where forces are derivatives",
    "optimizer": "the optimizer comes from the run's `optim` section",
    "scheduler": "the learning-rate schedule comes from the run's `optim.scheduler`",
}
#: Where a file says what its settings are for. DeepSpeed ignores it.
COMMENTS = "//"
#: Devices of (offload_optimizer, offload_param).
_DEVICES: dict[Offload, tuple[str, str]] = {
    "none": ("none", "none"),
    "optimizer": ("cpu", "none"),
    "parameters": ("cpu", "cpu"),
    "nvme": ("nvme", "nvme"),
}


def preset_names() -> list[str]:
    """Names of the JSON files shipped in `egnscale.ds_configs`."""
    return sorted(
        path.name.removesuffix(".json")
        for path in files("egnscale.ds_configs").iterdir()
        if path.name.endswith(".json")
    )


def preset_name(zero: int, offload: Offload | None) -> str:
    """The shipped file for a ZeRO stage and what it keeps off the device; what cannot be kept there has none.

    That it cannot, and what can, is said by `egnscale.scaling.combinations`.
    """
    name = f"zero{zero}-offload-{offload}"
    return name if name in preset_names() else f"zero{zero}"


def read_ds_config(source: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON by path, or a shipped one by name ("zero2").

    Raises:
        ValueError: if there is no such file or preset, or it is not a JSON object; one line.
    """
    path = Path(source)
    if str(source) in preset_names():
        text = files("egnscale.ds_configs").joinpath(f"{source}.json").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ValueError(
            f"no DeepSpeed configuration {str(source)!r}: "
            f"give the path of a JSON file, or one of {', '.join(preset_names())}"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{source} holds a JSON {type(config).__name__}, expected an object")
    return config


def offload_of(config: dict[str, Any]) -> Offload:
    """What a DeepSpeed configuration keeps off the device."""
    zero = config.get("zero_optimization", {})
    optimizer, parameters = ((zero.get(key) or {}).get("device") for key in ("offload_optimizer", "offload_param"))
    if "nvme" in (optimizer, parameters):
        return "nvme"
    return "parameters" if parameters == "cpu" else "optimizer" if optimizer == "cpu" else "none"


def complete_ds_config(
    base: dict[str, Any],
    *,
    zero: int,
    precision: Precision,
    gradient_accumulation: int,
    clip_grad_norm: float | None,
    offload: Offload | None = None,
    swap: Path | None = None,
) -> dict[str, Any]:
    """Fill in what the run decides.

    Args:
        offload: None leaves it to the file.
        swap: directory of what goes to NVMe, where the file names none.

    Raises:
        ValueError: where the file contradicts the run, naming the key and both values.
    """
    config = json.loads(json.dumps(base))
    config.pop(COMMENTS, None)
    for key, reason in REFUSED.items():
        if key in config:
            raise ValueError(f"the DeepSpeed configuration sets {key!r}, but {reason}; remove it")
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": gradient_accumulation,
        # DeepSpeed clips at 1.0 when this is left out.
        "gradient_clipping": float(clip_grad_norm or 0.0),
        "zero_optimization.stage": zero,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }
    if offload is not None:
        for key, device in zip(("offload_optimizer", "offload_param"), _DEVICES[offload], strict=True):
            if device != "none" or config.get("zero_optimization", {}).get(key):
                decided[f"zero_optimization.{key}.device"] = device
    for key, value in decided.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
        given = section.get(name, "auto")
        if given not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed configuration sets {key} to {given}, but the run says {value}; make them agree"
            )
        section[name] = value
    if config.pop("train_batch_size", "auto") != "auto":
        raise ValueError(
            "the DeepSpeed configuration sets train_batch_size; batches are set by optim.batch_size; remove it"
        )
    for key in ("offload_optimizer", "offload_param"):
        section = config["zero_optimization"].get(key) or {}
        if section.get("device") == "nvme" and "nvme_path" not in section:
            if swap is None:
                raise ValueError(f"the DeepSpeed configuration lacks zero_optimization.{key}.nvme_path")
            section["nvme_path"] = str(swap)
    config.setdefault("steps_per_print", 10**9)
    # The optimizer is torch's AdamW, handed over ready made.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config
