"""The README's commands, its tour and the example configurations are what they claim to be."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from toy import make_dataset, make_relaxed_dataset

from egnscale.launch.cli import COMMANDS, _parse, main
from egnscale.launch.config import load_config
from egnscale.models import PRESETS, build_model, count_parameters
from egnscale.scaling.ds_config import preset_names, read_ds_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("egnscale ")]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of the quickstart's configuration on toy data."""
    root = tmp_path_factory.mktemp("quickstart")
    make_relaxed_dataset(make_dataset(root / "data", train=8, val=3), train=8, val=3)
    words = [f"data.train={root}/data/s2ef/train", f"data.val={root}/data/s2ef", f"task.output={root}/run"]
    config = ROOT / "examples" / "configs" / "quickstart.yaml"
    assert main(["train", str(config), *words, "optim.max_steps=3", "data.workers=0", "--json"]) == 0
    return root


def test_readme_has_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    _parse(shlex.split(line)[1:])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make ([a-z-]+)", README)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_tour_runs(quickstart: Path) -> None:
    names: dict = {}
    for block in blocks("python"):
        exec(block.replace("runs/quickstart", str(quickstart / "run")), names)
    assert names["graph"].num_edges > 0
    assert names["prediction"].forces.shape == (len(names["atoms"]), 3)


def test_tour_is_short() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 20


def test_parameter_table() -> None:
    import torch

    rows = dict(re.findall(r"^\| `((?:gemnet-|dimenet)[^`]+)` \|[^|]*\| ([\d,]+) \|", README, flags=re.MULTILINE))
    assert rows.keys() == PRESETS.keys()
    with torch.device("meta"):
        for preset, count in rows.items():
            assert count_parameters(build_model(preset)) == int(count.replace(",", ""))


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configurations_train(path: Path, quickstart: Path, tmp_path: Path) -> None:
    config = load_config(path)
    data = quickstart / "data"
    kind = config.task.name
    words = [f"data.train={data}/{kind}/train", f"data.val={data}/{kind}", f"task.output={tmp_path}/run"]
    words += ["data.workers=0", "parallel.graph=1"]
    if config.model.preset:
        # The published widths are for GPUs; the configuration is the same.
        sizes = [f"emb_size_{size}" for size in ("atom", "edge", "trip", "bil_trip")]
        sizes = ["hidden_channels", "out_emb_channels"] if "dimenet" in config.model.preset else sizes
        words += ["model.num_blocks=1", *(f"model.{size}=16" for size in sizes)]
    if config.task.init_from:
        words.append(f"task.init_from={quickstart / 'run'}")
    if config.optim.max_epochs:
        words.append("optim.max_epochs=null")
    assert main(["train", str(path), *words, "optim.max_steps=2", "optim.batch_size=2", "--json"]) == 0


@pytest.mark.parametrize("name", preset_names())
def test_deepspeed_files_are_valid_for_deepspeed(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = read_ds_config(name)
    assert DeepSpeedConfig(config).zero_optimization_stage == config["zero_optimization"]["stage"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert command in capsys.readouterr().out
