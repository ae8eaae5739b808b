"""Schedules, against torch's own and against the formulas of the published runs."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from egnscale.launch.schedules import build_schedule


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_that_of_torch(patience: int, seed: int) -> None:
    optimizer = _optimizer()
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.8, patience, min_lr=0.05, eps=0.0)
    ours = build_schedule("plateau", 1000, factor=0.8, patience=patience, min_factor=0.05)
    rng = random.Random(seed)
    metric, seen = 1.0, set()
    for step in range(150):
        # Falls, stalls within the threshold, rises; once it is no number at all.
        metric *= rng.choice([0.9, 1 - 5e-5, 1.0, 1.05])
        value = math.nan if step == 40 else metric
        theirs.step(value)
        ours.observe(value)
        assert ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        seen.add(ours.factor(step))
    assert len(seen) > 5, "the rate must have fallen for this to be a test"


def test_plateau_of_a_metric_below_zero() -> None:
    """Minus a fraction within threshold is minimised, too: a small step back is no progress."""
    schedule = build_schedule("plateau", 10, patience=0)
    schedule.observe(-0.5)
    schedule.observe(-0.49999)
    assert schedule.factor(0) == 0.8


def test_plateau_resumes() -> None:
    values = [1.0, 0.9, 0.95, 0.93, 0.92, 0.94, 0.91, 0.97, 0.9, 0.9, 0.9, 0.9, 0.9]
    whole = build_schedule("plateau", 100, patience=2)
    for value in values:
        whole.observe(value)
    for cut in range(len(values)):
        first = build_schedule("plateau", 100, patience=2)
        for value in values[:cut]:
            first.observe(value)
        second = build_schedule("plateau", 100, patience=2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for value in values[cut:]:
            second.observe(value)
        assert second.state_dict() == whole.state_dict()
    assert whole.factor(0) < 1


@pytest.mark.parametrize("min_factor", [0.0, 0.1])
def test_cosine_is_that_of_torch(min_factor: float) -> None:
    optimizer = _optimizer()
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=min_factor)
    ours = build_schedule("cosine", 50, min_factor=min_factor, warmup_steps=10, warmup_factor=1.0)
    for step in range(40):
        assert ours.factor(step + 10) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert ours.factor(10) == 1
    assert ours.factor(50) == ours.factor(500) == min_factor


def test_multistep_is_that_of_torch() -> None:
    optimizer = _optimizer()
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9, 20], gamma=0.3)
    ours = build_schedule("multistep", 30, milestones=[20, 5, 9], gamma=0.3)
    for step in range(30):
        assert ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_published_warm_up() -> None:
    """OC20's rule for DimeNet++: linear from 0.2 to 1 over the warm-up, then gamma at each milestone."""
    ours = build_schedule("multistep", 100, milestones=[40, 60], gamma=0.1, warmup_steps=20, warmup_factor=0.2)
    for step in range(100):
        if step <= 20:
            expected = 0.2 * (1 - step / 20) + step / 20
        else:
            expected = 0.1 ** sum(step >= milestone for milestone in (40, 60))
        assert ours.factor(step) == pytest.approx(expected, rel=1e-12)


def test_warm_up_goes_with_every_schedule() -> None:
    for name, settings in {"constant": {}, "cosine": {}, "plateau": {}, "multistep": {"milestones": [50]}}.items():
        schedule = build_schedule(name, 100, warmup_steps=4, warmup_factor=0.5, **settings)
        assert [schedule.factor(step) for step in range(5)] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0])
        schedule.observe(1.0)
        build_schedule(name, 100, **settings).load_state_dict(json.loads(json.dumps(schedule.state_dict())))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'cosin'; known: constant, cosine"):
        build_schedule("cosin", 10)
    with pytest.raises(ValueError, match="saved learning-rate schedule is 'cosine', this run's is 'plateau'"):
        build_schedule("plateau", 10).load_state_dict(build_schedule("cosine", 10).state_dict())
