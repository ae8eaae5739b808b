"""Learning-rate schedules, as factors on the initial learning rate.

A schedule knows no optimizer: the trainer sets lr = lr_initial * schedule.factor(step) before each step, and calls
`schedule.observe(metric)` after each evaluation. Every schedule begins with the same linear warm-up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

#: An improvement smaller than this, relatively, is none: the default of torch's ReduceLROnPlateau, used for OC20.
PLATEAU_THRESHOLD = 1e-4


class Schedule:
    """A constant rate after a linear warm-up; the base of the others.

    Args:
        warmup_steps: steps over which the factor rises linearly to 1; 0 for none.
        warmup_factor: the factor at step 0.
    """

    name = "constant"

    def __init__(self, *, warmup_steps: int = 0, warmup_factor: float = 0.2) -> None:
        self.warmup_steps = warmup_steps
        self.warmup_factor = warmup_factor

    def factor(self, step: int) -> float:
        """What to multiply lr_initial with for the update number `step`, counted from 0."""
        return self._warmup(step) * self._decay(step)

    def observe(self, metric: float) -> None:
        """Take note of a validation metric; lower is better. Only the plateau schedule listens."""

    def state_dict(self) -> dict[str, Any]:
        """What `factor` depends on besides the step, as plain JSON types."""
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: if the state is that of another schedule.
        """
        if state.get("name") != self.name:
            raise ValueError(f"the saved learning-rate schedule is {state.get('name')!r}, this run's is {self.name!r}")

    def _warmup(self, step: int) -> float:
        if step >= self.warmup_steps:
            return 1.0
        return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps

    def _decay(self, step: int) -> float:
        return 1.0


class CosineSchedule(Schedule):
    """Half a cosine from 1, at the end of the warm-up, to `min_factor` at `total_steps`, and there it stays."""

    name = "cosine"

    def __init__(self, *, total_steps: int, min_factor: float = 0.0, **warmup: Any) -> None:
        super().__init__(**warmup)
        self.total_steps = total_steps
        self.min_factor = min_factor

    def _decay(self, step: int) -> float:
        span = max(self.total_steps - self.warmup_steps, 1)
        progress = min(max((step - self.warmup_steps) / span, 0.0), 1.0)
        return self.min_factor + (1 - self.min_factor) * (1 + math.cos(math.pi * progress)) / 2


class MultiStepSchedule(Schedule):
    """The factor is multiplied by `gamma` at each milestone, a number of steps."""

    name = "multistep"

    def __init__(self, *, milestones: Sequence[int], gamma: float = 0.1, **warmup: Any) -> None:
        super().__init__(**warmup)
        self.milestones = sorted(milestones)
        self.gamma = gamma

    def _decay(self, step: int) -> float:
        return self.gamma ** bisect_right(self.milestones, step)


class ExponentialSchedule(Schedule):
    """The factor is multiplied by `gamma` after each epoch: 0.95 is the paper's fine-tuning for IS2RE."""

    name = "exponential"

    def __init__(self, *, steps_per_epoch: int, gamma: float = 0.95, **warmup: Any) -> None:
        super().__init__(**warmup)
        self.steps_per_epoch = steps_per_epoch
        self.gamma = gamma

    def _decay(self, step: int) -> float:
        return self.gamma ** (step // self.steps_per_epoch)


class PlateauSchedule(Schedule):
    """The factor is multiplied by `factor` once more than `patience` evaluations in a row brought no improvement.

    The same as torch's ReduceLROnPlateau(mode="min"), but free of an optimizer and with a state that JSON can hold.
    """

    name = "plateau"

    def __init__(self, *, factor: float = 0.8, patience: int = 3, min_factor: float = 0.0, **warmup: Any) -> None:
        super().__init__(**warmup)
        self.shrink = factor
        self.patience = patience
        self.min_factor = min_factor
        self.scale = 1.0
        self.best: float | None = None
        self.bad = 0  #: evaluations since the best, or since the last reduction

    def observe(self, metric: float) -> None:
        # NaN is never smaller, hence never an improvement. The absolute value is there for metrics below zero, where
        # torch's best * (1 - threshold) would take a small step back for progress.
        if metric < (math.inf if self.best is None else self.best - PLATEAU_THRESHOLD * abs(self.best)):
            self.best, self.bad = metric, 0
            return
        self.bad += 1
        if self.bad > self.patience:
            self.scale, self.bad = max(self.scale * self.shrink, self.min_factor), 0

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "scale": self.scale, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scale, self.best, self.bad = state["scale"], state["best"], state["bad"]

    def _decay(self, step: int) -> float:
        return self.scale


SCHEDULES = {
    schedule.name: schedule
    for schedule in (Schedule, CosineSchedule, ExponentialSchedule, MultiStepSchedule, PlateauSchedule)
}


def build_schedule(name: str, total_steps: int, steps_per_epoch: int = 1, **settings: Any) -> Schedule:
    """A schedule by name.

    Args:
        name: one of `SCHEDULES`.
        total_steps: length of the run; only the cosine needs it.
        steps_per_epoch: only the exponential needs it.
        settings: the arguments of the schedule, warm-up included.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}; known: {', '.join(sorted(SCHEDULES))}")
    if name == CosineSchedule.name:
        settings["total_steps"] = total_steps
    if name == ExponentialSchedule.name:
        settings["steps_per_epoch"] = steps_per_epoch
    return SCHEDULES[name](**settings)
