"""The shipped DeepSpeed files work in DeepSpeed alone, and say what their settings are for."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import spawn

from egnscale.scaling.ds_config import COMMENTS, preset_names, read_ds_config

NVME = "zero3-offload-nvme"  # needs a compiled operator
HERE = [name for name in preset_names() if name != NVME]


def train_alone(world: Any, paths: list[str]) -> list[tuple[float, float]]:
    """Losses of a line fitted by DeepSpeed with nothing of ours but the file, before and after."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # torch is able to, on any CPU
    found = []
    for path in paths:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=path)
        dtype = next(engine.module.parameters()).dtype
        x = torch.linspace(-1, 1, 32, dtype=dtype).view(8, 4)
        losses = []
        for _ in range(25):
            loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found.append((losses[0], losses[-1]))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[float, float]]:
    paths = [str(files("egnscale.ds_configs").joinpath(f"{name}.json")) for name in HERE]
    return dict(zip(HERE, spawn(1, train_alone, paths)[0], strict=True))


@pytest.mark.parametrize("name", HERE)
def test_trains_in_deepspeed_alone(found: dict[str, tuple[float, float]], name: str) -> None:
    before, after = found[name]
    assert after < 0.2 * before


@pytest.mark.parametrize("name", preset_names())
def test_says_what_it_is_for(name: str) -> None:
    comments = read_ds_config(name)[COMMENTS]
    assert len(comments) > 1
    assert all(isinstance(line, str) and line.endswith(".") for line in comments)


def test_every_file_is_tried() -> None:
    on_disk = {path.stem for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json")}
    assert {*HERE, NVME} == on_disk


def test_deepspeed_speaks_on_standard_error() -> None:
    program = (
        "import egnscale.scaling.engine; from deepspeed.utils import logger, log_dist; "
        "logger.warning('careful'); log_dist('hear', ranks=[-1], level=40)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "careful" in done.stderr
