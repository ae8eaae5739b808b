"""A checkpoint written under one layout goes on under another: ranks, ZeRO stage and precision may change.

Every source runs 8 steps on 2 ranks (or one) and keeps its checkpoint of step 4; that is resumed under other layouts,
whose losses of steps 5 to 8 must be the source's own. With AMSGrad, averaged weights, active clipping, gradient
accumulation and an epoch that ends within the resumed part.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spawn import spawn
from toy import make_dataset, write_config

from egnscale.launch.weights import read_weights
from egnscale.scaling.checkpoint import find_checkpoint, verify_checkpoint
from egnscale.scaling.training_state import plan_files

STEPS, GLOBAL_BATCH, CLIP = 8, 4, 0.5
Layout = tuple[int, int, str]  # ranks, ZeRO stage, precision (with "+": one of DEEPSPEED's files)
#: Other ways in which DeepSpeed keeps the state, by the precision's name here.
DEEPSPEED: dict[str, dict[str, Any]] = {
    "fp32+sub_groups": {"zero_optimization": {"sub_group_size": 500}},
    "fp32+round_robin": {"zero_optimization": {"round_robin_gradients": True}},
    "fp32+offload": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "fp32+parameters": {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    },
    "bf16+fp32_gradients": {"data_types": {"grad_accum_dtype": "fp32"}},
    "bf16+states": {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
}

#: Source, target. Every stage is both, to fewer ranks, to more, and to as many.
PAIRS: list[tuple[Layout, Layout]] = [
    ((2, 0, "fp32"), (2, 1, "fp32")),
    ((2, 1, "fp32"), (2, 3, "fp32")),
    ((2, 2, "fp32"), (2, 0, "fp32")),
    ((2, 3, "fp32"), (2, 2, "fp32")),
    ((2, 0, "fp32"), (1, 2, "fp32")),
    ((2, 1, "fp32"), (1, 3, "fp32")),
    ((2, 3, "fp32"), (1, 0, "fp32")),
    ((1, 0, "fp32"), (2, 3, "fp32")),
    ((1, 3, "fp32"), (2, 1, "fp32")),
    ((2, 3, "bf16"), (2, 1, "bf16")),
    ((2, 0, "bf16"), (1, 2, "bf16")),
    ((2, 3, "bf16"), (2, 0, "fp32")),
    ((2, 3, "fp32+sub_groups"), (2, 2, "fp32+round_robin")),
    ((2, 2, "fp32+round_robin"), (2, 3, "fp32+sub_groups")),
    ((2, 2, "fp32+offload"), (2, 3, "fp32+offload")),
    ((2, 1, "bf16+fp32_gradients"), (1, 1, "bf16")),
    ((2, 3, "bf16"), (2, 1, "bf16+fp32_gradients")),
    ((2, 3, "fp32+parameters"), (2, 1, "fp32")),
    ((2, 1, "fp32"), (1, 3, "fp32+parameters")),
    ((2, 3, "bf16+states"), (1, 3, "bf16+states")),
]
SAME: list[Layout] = [
    (2, 1, "fp32"), (2, 3, "fp32"), (2, 0, "bf16"), (2, 3, "bf16"), (2, 3, "fp32+sub_groups"),
    (2, 1, "bf16+fp32_gradients"),
]  # fmt: skip
EVERY = [(ranks, zero, precision) for ranks in (1, 2) for zero in range(4) for precision in ("fp32", "bf16")]
ALL_PAIRS = [(source, target) for source in EVERY for target in EVERY if source[2] == target[2]] + [
    ((4, 3, "fp32"), (1, 1, "fp32")),
    ((2, 2, "bf16"), (4, 3, "bf16")),
    ((1, 0, "fp32"), (4, 1, "fp32")),
]


def name(*layouts: Layout) -> str:
    return "-".join(f"{ranks}x{zero}{precision}" for ranks, zero, precision in layouts)


def words(config: str, layout: Layout) -> list[str]:
    ranks, zero, precision = layout
    deepspeed = []
    if precision in DEEPSPEED:
        file = Path(config).with_name(f"{precision}-rank{os.environ['RANK']}.json")
        file.write_text(json.dumps(DEEPSPEED[precision]))
        deepspeed = ["--deepspeed_config", str(file)]
    return [
        "train", config, f"task.output={Path(config).parent}", f"parallel.zero={zero}",
        f"parallel.precision={precision[:4]}", f"optim.batch_size={GLOBAL_BATCH // ranks}", f"optim.max_steps={STEPS}",
        "optim.gradient_accumulation=2", "optim.amsgrad=true", f"optim.clip_grad_norm={CLIP}", "data.workers=0",
        "task.eval_every=100", "task.eval_batches=1", "--debug", *deepspeed,
    ]  # fmt: skip


def train(world: Any, runs: list[tuple[str, Layout]]) -> None:
    """Begin or resume each run (configuration, layout) in turn; a resumed one first writes what it has just read."""
    from egnscale.launch.cli import main
    from egnscale.launch.trainer import Trainer
    from egnscale.scaling import training_state

    training_state.FILE_BYTES = 1 << 15  # several files for each rank
    run = Trainer.run

    def write_and_run(trainer: Trainer, **options: Any) -> dict[str, Any]:
        if trainer.step:
            again = trainer.directory / "again"
            if world.is_main:
                again.mkdir()
            torch.distributed.barrier()
            trainer.engine.save(again)
            masters = tensors(again)
            for parameter, part in trainer.engine.held():
                wanted = masters[f"{parameter}/fp32"].to(part.dtype)
                if trainer.engine.zero_stage == 3:
                    wanted = trainer.engine.part(parameter, wanted)
                    part = part[: len(wanted)]
                assert part.equal(wanted), "weights are not the masters'"
        return run(trainer, **options)

    Trainer.run = write_and_run  # type: ignore[method-assign]
    try:
        for config, layout in runs:
            assert main([*words(config, layout), "--resume"]) == 0
    finally:
        Trainer.run = run  # type: ignore[method-assign]


def on_ranks(runs: list[tuple[str, Layout]]) -> None:
    for ranks in sorted({layout[0] for _, layout in runs}):
        spawn(ranks, train, [(config, layout) for config, layout in runs if layout[0] == ranks])


def losses(run: Path) -> list[float]:
    with open(run / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    return [float(row["loss"]) for row in rows]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = (checkpoint / "training").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def from_step_4(source: Path, target: Path) -> Path:
    """A run that stands at step 4 of another; returns its configuration."""
    target.mkdir()
    (target / "checkpoints").mkdir()
    shutil.copytree(source / "checkpoints" / "step_00000004", target / "checkpoints" / "step_00000004")
    (target / "checkpoints" / "latest").write_text("step_00000004")
    for file in ("log.csv", "config.yaml"):
        shutil.copy(source / file, target / file)
    return target / "config.yaml"


def spoil(run: Path, change: Callable[[Path], None]) -> None:
    """Change the training state, and let the manifest fit it."""
    checkpoint = run / "checkpoints" / "step_00000004"
    change(checkpoint / "training")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file, entry in manifest["files"].items():
        content = (checkpoint / file).read_bytes()
        entry |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def forget_moments(training: Path) -> None:
    for file in training.glob("0*.safetensors"):
        kept = {key: tensor if key.endswith("/fp32") else tensor * 0 for key, tensor in load_file(file).items()}
        save_file(kept, file)


def miscount(training: Path) -> None:
    index = json.loads((training / "index.json").read_text())
    index["step"] += 1
    (training / "index.json").write_text(json.dumps(index))


CONTROLS = {"moments": forget_moments, "step": miscount}


def begin(root: Path, layouts: set[Layout]) -> None:
    """The uninterrupted runs."""
    data = make_dataset(root / "data", train=12, val=2)
    for layout in layouts:
        (root / name(layout)).mkdir()
        write_config(root / name(layout) / "config.yaml", data, root / name(layout))
    on_ranks([(str(root / name(layout) / "config.yaml"), layout) for layout in sorted(layouts)])


def resume(root: Path, pairs: list[tuple[Layout, Layout]]) -> list[tuple[str, Layout]]:
    return [
        (str(from_step_4(root / name(source), root / name(source, target))), target)
        for source, target in pairs
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    pairs = [*PAIRS, *((layout, layout) for layout in SAME)]
    begin(root, {source for source, _ in pairs} | {(2, 0, "fp32")})
    resumed = resume(root, pairs)
    for control, change in CONTROLS.items():
        config = from_step_4(root / name((2, 1, "fp32")), root / control)
        spoil(root / control, change)
        resumed.append((str(config), (1, 2, "fp32")))
    on_ranks(resumed)
    return root


def difference(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def same_state(source: Path, resumed: Path) -> None:
    """What the resumed run had read is what the source had written, bit for bit."""
    wanted, found = tensors(source / "checkpoints" / "step_00000004"), tensors(resumed / "again")
    assert wanted.keys() == found.keys()
    assert {key.rpartition("/")[2] for key in wanted} >= {"fp32", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for key, tensor in wanted.items():
        assert torch.equal(found[key].to(tensor.dtype), tensor), key
    before, after = (
        json.loads((path / "training" / "index.json").read_text())
        for path in (source / "checkpoints" / "step_00000004", resumed / "again")
    )
    assert before["step"] == after["step"] == 4
    assert before["counters"] == after["counters"]


def check(root: Path, source: Layout, target: Layout) -> None:
    """The state is the source's bit for bit, and so is what follows, up to the round-off of the target's precision."""
    whole, resumed = root / name(source), root / name(source, target)
    if source[2][:4] == target[2][:4]:
        same_state(whole, resumed)
    tolerance = {("fp32", "fp32"): 1e-5, ("bf16", "bf16"): 2e-4, ("bf16", "fp32"): 2e-3}[source[2][:4], target[2][:4]]
    assert difference(losses(resumed), losses(whole)) < tolerance
    if tolerance == 1e-5:
        found, wanted = (
            read_weights(run / "checkpoints" / "step_00000008" / "model.safetensors") for run in (resumed, whole)
        )
        assert max((found[key] - wanted[key]).norm() / wanted[key].norm() for key in wanted) < 1e-4


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda layout: name(layout))
def test_another_layout_goes_on(runs: Path, source: Layout, target: Layout) -> None:
    check(runs, source, target)


@pytest.mark.parametrize("layout", SAME, ids=lambda layout: name(layout))
def test_the_same_layout_goes_on_bit_for_bit(runs: Path, layout: Layout) -> None:
    whole, resumed = runs / name(layout), runs / name(layout, layout)
    same_state(whole, resumed)
    assert losses(resumed) == losses(whole)
    found, wanted = (tensors(run / "checkpoints" / "step_00000008") for run in (resumed, whole))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_are_noticed(runs: Path, control: str) -> None:
    """Without the moments, or with a step too many, the losses are others."""
    assert difference(losses(runs / control), losses(runs / name((2, 1, "fp32")))) > 1e-4


def test_the_gradient_is_clipped(runs: Path) -> None:
    with open(runs / name((2, 1, "fp32")) / "log.csv") as file:
        assert all(float(row["grad_norm"]) > CLIP for row in csv.DictReader(file))


def test_several_files_for_each_rank(runs: Path) -> None:
    training = runs / name((2, 3, "fp32")) / "checkpoints" / "step_00000004" / "training"
    assert len(list(training.glob("0*.safetensors"))) >= 4
    assert {file.suffix for file in training.iterdir()} == {".safetensors", ".json"}


def test_bf16_without_zero_takes_the_steps_of_zero(runs: Path) -> None:
    """DeepSpeed's empty first step there is undone: the optimizer's step is the number of steps."""
    found, wanted = (losses(runs / name((2, zero, "bf16"))) for zero in (0, 3))
    assert difference(found, wanted) < 2e-4


def refusals(world: Any, uneven: str, healthy: str) -> list[str]:
    """What this rank says where the runs cannot go on."""
    from egnscale.launch.cli import main
    from egnscale.scaling import training_state

    def said(config: str, *overrides: str) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            main([*words(config, (2, 1, "fp32")), "--resume", *overrides])
        return str(caught.value)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError("no such luck")

    lines = [said(uneven, "optim.batch_size=4"), said(uneven)]
    for function in ("safe_open", "_write_tensors"):
        working = getattr(training_state, function)
        if world.rank == 1:
            setattr(training_state, function, fail)
        lines.append(said(healthy))
        setattr(training_state, function, working)
    return lines


def test_what_cannot_go_on_says_why_on_every_rank(runs: Path, tmp_path: Path) -> None:
    """Where one rank fails to read or to write, all stop with its reason, and the checkpoint stays."""
    data = make_dataset(tmp_path / "data", train=13, val=2)
    (tmp_path / "uneven").mkdir()
    uneven = write_config(tmp_path / "uneven" / "config.yaml", data, tmp_path / "uneven")
    spawn(1, train, [(str(uneven), (1, 0, "fp32"))])
    healthy = from_step_4(runs / name((2, 1, "fp32")), tmp_path / "healthy")
    for batch, epoch, read, write in spawn(2, refusals, str(uneven), str(healthy)):
        assert "global batch was 4 (4 x 1 replicas) and would become 8 (4 x 2); set optim.batch_size=2" in batch
        assert "an epoch had 4 batches on 1 replicas and would have 3 on 2" in epoch
        assert "start at most 1 replicas" in epoch
        assert ".safetensors cannot be read: no such luck" in read
        assert "step_00000008 was not written" in write
        assert "no such luck" in write
    checkpoints = tmp_path / "healthy" / "checkpoints"
    assert {file.name for file in checkpoints.iterdir()} == {"latest", "step_00000004"}
    verify_checkpoint(find_checkpoint(checkpoints))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_pair_of_layouts(tmp_path: Path) -> None:
    begin(tmp_path, {source for source, _ in ALL_PAIRS})
    on_ranks(resume(tmp_path, ALL_PAIRS))
    for source, target in ALL_PAIRS:
        check(tmp_path, source, target)


@pytest.mark.parametrize("writers", [1, 3, 8])
def test_files_are_dealt_out_evenly(writers: int) -> None:
    sizes = {f"p{index}": 1 + index * index % 37 for index in range(60)} | {"large": 100}
    plan = plan_files(sizes, writers, limit=50)
    written = [one for round in plan for names in round for one in names]
    assert sorted(written) == sorted(sizes)
    assert all(len(round) == writers for round in plan)
    assert all(sum(sizes[one] for one in names) <= 50 or names == ["large"] for round in plan for names in round)
    loads = [sum(sizes[one] for round in plan for one in round[writer]) for writer in range(writers)]
    assert max(loads) - min(loads) <= max(sizes.values())
