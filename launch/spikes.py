"""When the loss leaps up: which step it was, and what a run has skipped because of it (`task.rollback`).

A step is a spike if its loss is more than `factor` times the median of the last `window` losses, or not finite. The run
then goes back to a checkpoint from before, and on with the batches that come after the spike: none is read twice.

What was skipped is part of every checkpoint, and of `rollbacks.json` in the run's directory: a run killed between a
rollback and the next checkpoint comes back to the same batches.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from egnscale.scaling.checkpoint import write_text

ROLLBACKS = "rollbacks.json"


class SpikeGuard:
    """What a run remembers of its losses and of its rollbacks. All ranks have the same.

    Args:
        factor: above 1.
        window: losses whose median is the measure; nothing finite is a spike before there are so many.
        max: rollbacks that are made before the run stops.
    """

    def __init__(self, factor: float, window: int, max: int) -> None:
        self.factor, self.max = factor, max
        self.losses: deque[float] = deque(maxlen=window)
        self.rollbacks: list[dict[str, Any]] = []

    def spike(self, loss: float) -> str | None:
        """Why this loss is a spike, in words."""
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        usual = self._usual()
        if usual is None or loss <= self.factor * usual:
            return None
        return f"the loss is {loss:.4g}, {loss / usual:.3g} times the median of the last {len(self.losses)} steps"

    def add(self, loss: float) -> None:
        """Remember the loss of a step that stays."""
        self.losses.append(loss)

    @property
    def uneasy(self) -> bool:
        """Whether the last loss may be the beginning of a spike: above the root of `factor` times the median.

        A checkpoint of such a step might hold what makes the next ones bad.
        """
        usual = self._usual()
        return usual is not None and self.losses[-1] > math.sqrt(self.factor) * usual

    def _usual(self) -> float | None:
        if len(self.losses) < (self.losses.maxlen or 0):
            return None
        return median(self.losses) or None

    @property
    def skipped_batches(self) -> int:
        """Micro-batches of each replica that were passed over so far."""
        return sum(rollback["skipped_batches"] for rollback in self.rollbacks)

    def choose(self, steps: Sequence[int]) -> int:
        """Which of the checkpoints at these steps, in ascending order, to go back to.

        The newest; an older one where that was tried before, since the spike may have begun before it was written.
        """
        tried = {rollback["to_step"] for rollback in self.rollbacks}
        return next((step for step in reversed(steps) if step not in tried), steps[-1])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self.losses), "rollbacks": self.rollbacks}

    def load(self, state: dict[str, Any], directory: Path, step: int) -> None:
        """Take what a checkpoint of this step holds, and the rollbacks to it, which are newer than it is."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.rollbacks = list(state["rollbacks"])
        known, newer = len(self.rollbacks), read_rollbacks(directory)
        if newer[:known] == self.rollbacks and newer[known:] and newer[-1]["to_step"] == step:
            self.rollbacks = newer

    def write(self, directory: Path) -> None:
        """Write `rollbacks.json`, by one process."""
        write_text(directory / ROLLBACKS, json.dumps(self.rollbacks, indent=1))


def read_rollbacks(directory: Path) -> list[dict[str, Any]]:
    """What `rollbacks.json` of a run says; nothing where there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    path = directory / ROLLBACKS
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        return [{key: one[key] for key in ("step", "to_step", "skipped_batches", "reason")} for one in found]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
