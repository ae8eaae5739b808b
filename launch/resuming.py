"""Whether there is a run to continue, and whether a configuration continues it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from egnscale.launch.run_files import read_run, recorded_model
from egnscale.models import AtomModelConfig
from egnscale.scaling.checkpoint import LATEST, find_checkpoint, verify_checkpoint
from egnscale.scaling.engine import once

#: What may change when a run is resumed, of what a run says of its layout.
FREE_IN_LAYOUT = {"ranks", "replicas", "pipe", "zero", "precision"}


def find_resumed(run: Path, checkpoints: Path, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, and its run.json; None where a run begins. Collective.

    Raises:
        ValueError: where there is a run, and none is to be continued.
    """
    exists = (checkpoints / LATEST).is_file()
    if exists and not resume:
        raise ValueError(f"{run} already holds a run; continue it with --resume, or choose another task.output")
    if not exists:
        return None
    checkpoint = find_checkpoint(checkpoints)
    once(lambda: verify_checkpoint(checkpoint))
    return checkpoint, read_run(checkpoint)


def check_resumed(
    checkpoint: Path, run: dict[str, Any], model: AtomModelConfig, layout: dict[str, Any], batch_size: int
) -> None:
    """Whether a configuration is that of the run to continue, where it matters.

    Args:
        run: the checkpoint's run.json.
        model, layout: of the configuration, the latter as run.json has it.
        batch_size: `optim.batch_size`.

    Raises:
        ValueError: naming what differs, and the way out.
    """
    was = recorded_model(run, checkpoint)
    for name in ("name", *asdict(model)):
        before, value = getattr(was, name, None), getattr(model, name)
        if before != value:
            raise ValueError(f"cannot resume {checkpoint}: model.{name} was {before}, the configuration says {value}")
    then = run["layout"]
    batch, replicas = then["global_batch"], layout["replicas"]
    if batch != layout["global_batch"]:
        way_out = (
            f"set optim.batch_size={batch // replicas}"
            if batch % replicas == 0
            else f"start a number of replicas that divides {batch}"
        )
        raise ValueError(
            f"cannot resume {checkpoint}: the global batch was {batch} "
            f"({batch // then['replicas']} x {then['replicas']} replicas) and would become {layout['global_batch']} "
            f"({batch_size} x {replicas}); {way_out}"
        )
    for name, value in layout.items():
        if name not in FREE_IN_LAYOUT and then.get(name) != value:
            raise ValueError(
                f"cannot resume {checkpoint}: {name} was {then.get(name)}, this run has {value}; start it the same way"
            )
