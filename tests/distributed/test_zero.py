"""Two ranks under every ZeRO stage take the steps that one plain process takes with both ranks' structures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spawn import spawn
from toy import samples

from egnscale.data.batch import Collate
from egnscale.data.neighbors import GraphSpec
from egnscale.launch.tasks import S2EF, Normalizer
from egnscale.models import build_model
from egnscale.scaling.ds_config import complete_ds_config, preset_name, read_ds_config
from egnscale.scaling.ema import ExponentialMovingAverage

SIZES = {
    "num_blocks": 2, "emb_size_atom": 8, "emb_size_edge": 12, "emb_size_trip": 6, "emb_size_bil_trip": 5,
    "num_radial": 8, "emb_size_rbf": 4, "emb_size_cbf": 4, "num_spherical": 3, "cutoff": 4.0,
}  # fmt: skip
NORMALIZER = Normalizer(1.0, 2.0, 2.0)
COLLATE = Collate(GraphSpec(4.0, 20))
STEPS, CLIP, DECAY = 4, 0.5, 0.8


def batch(step: int, rank: int | None) -> tuple:
    """Three structures on rank 0, one on rank 1; all four without ranks."""
    chosen = samples(4, seed=step)
    return COLLATE({None: chosen, 0: chosen[:3], 1: chosen[3:]}[rank])


def objective() -> S2EF:
    torch.manual_seed(3)
    return S2EF(build_model(**SIZES), NORMALIZER, force_coefficient=10.0)


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)


def on_rank(
    world: Any, stage: int, precision: Any, clip: float | None, offload: Any = "none"
) -> tuple[list[float], dict, dict]:
    """Losses, final weights and averaged weights of a DeepSpeed run."""
    from egnscale.scaling.engine import Engine, sum_over_ranks

    module = objective()
    base = read_ds_config(preset_name(stage, offload))
    if precision == "fp16":
        base["fp16"] = {"initial_scale_power": 8}  # at DeepSpeed's 16 the first step overflows and is skipped
    config = complete_ds_config(
        base,
        zero=stage,
        precision=precision,
        gradient_accumulation=1,
        clip_grad_norm=clip,
        offload=offload,
    )
    engine = Engine(module, adamw(module), config, world)
    ema = ExponentialMovingAverage(engine, DECAY)
    losses = []
    for step in range(STEPS):
        graph, labels = batch(step, world.rank)
        total = sum_over_ranks(torch.tensor([graph.num_systems, int((~labels.fixed).sum())], dtype=torch.float64))
        loss, _ = engine(graph, labels, total / world.size)
        engine.backward(loss)
        engine.step()
        ema.update()
        losses.append(float(sum_over_ranks(loss.detach().double())) / world.size)
    weights = dict(engine.whole_masters())
    before = {name: part.clone() for name, part in engine.held()}
    averaged = dict(ema.whole())
    with ema.applied():
        inside = {name: part.clone() for name, part in engine.held()}
    assert all(torch.equal(before[name], part) for name, part in engine.held())
    for name, part in inside.items():
        wanted = averaged[name].to(part.dtype)
        if stage == 3:  # shards, the last one padded
            wanted = engine.part(name, wanted)
            part = part[: len(wanted)]
        assert torch.equal(part, wanted)
    return losses, weights, averaged


def reference(clip: float | None) -> tuple[list[float], dict, dict]:
    module = objective()
    optimizer = adamw(module)
    shadow = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    losses = []
    for step in range(STEPS):
        graph, labels = batch(step, None)
        counts = torch.tensor([graph.num_systems, int((~labels.fixed).sum())])
        loss, _ = module(graph, labels, counts)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in module.named_parameters():
            shadow[name].lerp_(parameter.detach(), 1 - DECAY)
    return losses, {name: parameter.detach() for name, parameter in module.named_parameters()}, shadow


def distance(found: dict, wanted: dict) -> float:
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


OFFLOADED = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
CASES: list[tuple] = [
    *((stage, "fp32", CLIP) for stage in range(4)),
    *((stage, "fp32", CLIP, offload) for stage, offload in OFFLOADED),
    *((stage, "bf16", CLIP) for stage in (1, 3)),
    *((stage, "fp16", CLIP) for stage in range(4)),
    (1, "fp32", None),
]


def all_cases(world: Any) -> dict:
    from deepspeed.accelerator import get_accelerator

    # torch computes in fp16 on a CPU, slowly, whatever DeepSpeed thinks of it.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    return {case: on_rank(world, *case) for case in CASES}


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """Results of both ranks, by case; one start of the processes serves all."""
    return spawn(2, all_cases)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_take_the_steps_of_one(found: list[dict], stage: int) -> None:
    losses, weights, averaged = reference(CLIP)
    for rank in found:
        result = rank[stage, "fp32", CLIP]
        assert result[0] == pytest.approx(losses, rel=1e-5)
        assert distance(result[1], weights) < 2e-5
        assert distance(result[2], averaged) < 2e-5


def test_control_other_clipping_is_noticed(found: list[dict]) -> None:
    """The comparison above fails where the gradient is clipped otherwise."""
    assert distance(found[0][1, "fp32", None][1], reference(CLIP)[1]) > 1e-4


@pytest.mark.parametrize(("stage", "offload"), OFFLOADED)
def test_offloading_changes_nothing(found: list[dict], stage: int, offload: str) -> None:
    losses, weights, averaged = reference(CLIP)
    for rank in found:
        result = rank[stage, "fp32", CLIP, offload]
        assert result[0] == pytest.approx(losses, rel=1e-5)
        assert distance(result[1], weights) < 2e-5
        assert distance(result[2], averaged) < 2e-5


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "bf16"), (3, "bf16"), (0, "fp16"), (1, "fp16"), (2, "fp16"), (3, "fp16")]
)
def test_half_precision_stays_close(found: list[dict], stage: int, precision: str) -> None:
    losses, weights, _ = reference(CLIP)
    result = found[0][stage, precision, CLIP]
    assert result[0] == pytest.approx(losses, rel=0.05)
    assert distance(result[1], weights) < 0.05
