"""Long-run hygiene over two ranks, under every ZeRO stage and in a pipeline: norms, what is not finite, rollbacks."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import spawn
from toy import make_dataset, samples, write_config

from egnscale.data.store import write_store
from egnscale.launch.config import load_config
from egnscale.launch.layer_watch import layers_of_parameters, named_tensors
from egnscale.models import gemnet
from egnscale.models.layered import inside

#: Name, overrides.
CONSERVATIVE = ["model.forces=conservative", "task.normalizer={energy_mean: 0, energy_std: 1, force_std: 1}"]
NORMS: dict[str, list[str]] = {
    "zero 0, graph 2": ["parallel={zero: 0, graph: 2}"],
    "zero 1, graph 2": ["parallel={zero: 1, graph: 2, recompute: selective}"],
    "zero 2, graph 2": ["parallel={zero: 2, graph: 2, recompute: block}"],
    "zero 3, graph 2": ["parallel={zero: 3, graph: 2, recompute: block}"],
    "zero 2, data 2": ["parallel={zero: 2}", "optim.batch_size=1"],
    "zero 3, data 2": ["parallel={zero: 3}", "optim.batch_size=1"],
    "conservative, zero 1": [*CONSERVATIVE, "parallel={zero: 1, graph: 2, recompute: block}"],
}
PIPELINES: dict[str, list[str]] = {
    "zero 1, pipe 2": ["parallel={zero: 1, pipe: 2, recompute: selective}"],
    "conservative, pipe 2": [*CONSERVATIVE, "parallel={zero: 1, pipe: 2, recompute: block}"],
}
COMMON = [
    "model.num_blocks=2",
    "optim.max_steps=1",
    "optim.gradient_accumulation=2",
    "optim.clip_grad_norm=0.01",
    "data.workers=0",
    "data.val={}",
    "task.log_norms=1",
]


def trainer(world: Any, root: Path, name: str, *overrides: str) -> Any:
    from egnscale.launch.trainer import Trainer

    class Unfitted(Trainer):
        """Scale factors depend on how structures are put together in batches."""

        def _fit_scale_factors(self) -> None:
            pass

    output = root / name.replace(" ", "_").replace(",", "")
    config = load_config(root / "config.yaml", [*COMMON, f"task.output={output}", *overrides])
    return Unfitted(config, world)


def table(run: Path) -> dict[tuple[str, str], float]:
    with open(run / "norms.csv") as file:
        return {(row["layer"], row["quantity"]): float(row["value"]) for row in csv.DictReader(file)}


def expected(world: Any, root: Path, name: str, *overrides: str) -> dict[tuple[str, str], float]:
    """The norms of the first step in plain torch: hooks of modules, `.grad` and nothing of DeepSpeed's."""
    made = trainer(world, root, name, *overrides)
    model, objective = made.objective.model, made.objective
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, args: Any, result: Any) -> None:
            given = {x.data_ptr() for _, x in named_tensors(args) if x is not None}
            for field, x in named_tensors(result):
                if x is not None and x.is_floating_point() and x.data_ptr() not in given:
                    seen.setdefault((number, field), []).append(x.detach().flatten())

        return hook

    for number, layer in enumerate(model.layers[:-1]):
        layer.register_forward_hook(keep(number))
    batches = list(islice(made._batches(), 2))
    counts = sum(torch.tensor([graph.num_systems, int((~atoms.fixed).sum())]) for graph, atoms in batches)
    for graph, atoms in batches:
        loss, prediction = objective(graph, atoms, counts)
        for field, x in prediction._asdict().items():
            seen.setdefault((len(model.layers) - 1, field), []).append(x.flatten())
        loss.backward()
    names = [f"{number} {type(layer).__name__}" for number, layer in enumerate(model.layers)]
    found = {
        (names[n], f"rms of {field}"): float(torch.cat(xs).square().mean().sqrt()) for (n, field), xs in seen.items()
    }
    layer_of = layers_of_parameters(objective, model)
    for number, name in enumerate(names):
        own = [p for key, p in objective.named_parameters() if layer_of(key) == number]
        if own:
            found[name, "gradient norm"] = float(torch.cat([p.grad.flatten() for p in own]).norm())
            found[name, "weight norm"] = float(torch.cat([p.detach().flatten() for p in own]).norm())
    return found


def poisoned(world: Any, root: Path, name: str, how: str, *overrides: str) -> str:
    """The error of a run of which one block goes wrong, on the last rank alone."""
    made = trainer(world, root, f"{how} {name}", *overrides)
    blocks = made.objective.model.blocks
    forward = gemnet.Block.forward

    def poisonous(self: Any, state: Any, graph: Any) -> Any:
        if self is not inside(blocks[1]):
            return forward(self, state, graph)
        factor = torch.nan if world.rank == world.size - 1 else 1.0
        if how == "gradient" and state.m.requires_grad:
            m = state.m * 1
            m.register_hook(lambda grad: grad * factor)
            state = state._replace(m=m)
        state = forward(self, state, graph)
        return state._replace(energy=state.energy * factor) if how == "output" else state

    if how == "weight":
        parts = {
            n: torch.full_like(x, torch.nan) for n, x in made.engine.held() if "blocks.1.interaction.dense_ca" in n
        }
        made.engine.write_held(parts)
    gemnet.Block.forward = poisonous  # type: ignore[method-assign]
    try:
        made.run(progress=False)
    except ValueError as error:
        return str(error)
    finally:
        gemnet.Block.forward = forward  # type: ignore[method-assign]
    return ""


POISONED = {
    "zero 0, graph 2": NORMS["zero 0, graph 2"],
    "zero 1, data 2": ["parallel={zero: 1}", "optim.batch_size=1"],
    "zero 3, graph 2": NORMS["zero 3, graph 2"],
    "conservative, zero 2": [*CONSERVATIVE, "parallel={zero: 2, graph: 2}"],
}
NAMED = {
    "output": "the first output that is not finite is energy of 2 Block, whose inputs and parameters are finite",
    "weight": "blocks.1.interaction.dense_ca.weight of 2 Block was not finite before the step",
    "gradient": "not finite is 2 Block",
}


def rolled_back(world: Any, root: Path, zero: int, graph: int, pipe: int = 1) -> tuple[list[dict], dict, bool]:
    """A run of which one structure has an infinite label: its rollbacks, its end, whether its weights are finite."""
    made = trainer(
        world, root, f"back {zero} {pipe}", f"data.train={root}/corrupt",
        f"parallel={{zero: {zero}, graph: {graph}, pipe: {pipe}}}", f"optim.batch_size={graph * pipe}",
        "optim.max_steps=6", CONSERVATIVE[1], "task.checkpoint_every=1",
        "task.rollback={window: 50, max: 4}", "optim.gradient_accumulation=1",
    )  # fmt: skip
    result = made.run(progress=False)
    finite = all(bool(torch.isfinite(x).all()) for _, x in made.engine.masters())
    return made.guard.rollbacks, {"step": result["step"], "loss": result["loss"]}, finite


def on_rank(world: Any, root: Path) -> dict[str, Any]:
    for name, overrides in NORMS.items():
        trainer(world, root, name, *overrides).run(progress=False)
    named = {
        (how, name): poisoned(world, root, name, how, *overrides)
        for name, overrides in POISONED.items()
        for how in NAMED
    }
    return {"named": named, "back": {z: rolled_back(world, root, z, g) for z, g in ((0, 2), (1, 1), (2, 2), (3, 2))}}


def in_pipeline(world: Any, root: Path) -> dict[str, Any]:
    """DeepSpeed keeps a pipeline's grid for the whole process, so these have their own."""
    for name, overrides in PIPELINES.items():
        trainer(world, root, name, *overrides).run(progress=False)
    named = {
        (how, name): poisoned(world, root, name, how, *overrides)
        for name, overrides in PIPELINES.items()
        for how in NAMED
    }
    return {"named": named, "back": {"pipe": rolled_back(world, root, 1, 1, pipe=2)}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("long")
    make_dataset(place / "data", train=8, val=2)
    write_config(place / "config.yaml", place / "data", place / "run")
    made = samples(8)
    object.__setattr__(made[3], "energy", 1e300)  # infinite in single precision
    write_store(place / "corrupt", made)
    return place


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, Any]]:
    merged = spawn(2, on_rank, root)
    for rank, more in zip(merged, spawn(2, in_pipeline, root), strict=True):
        rank["named"] |= more["named"]
        rank["back"] |= more["back"]
    return merged


def comparable(norms: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Without the angular factors, of which there is a tensor for each bucket of degrees that a part of a graph has."""
    return {key: value for key, value in norms.items() if "angular" not in key[1]}


@pytest.mark.parametrize("kind", ["zero", "conservative"])
def test_norms_are_those_of_plain_torch(found: list[dict], root: Path, kind: str) -> None:
    from egnscale.scaling.engine import start_world

    wanted = expected(start_world(), root, f"plain {kind}", *(CONSERVATIVE if kind == "conservative" else []))
    assert {"rms of h", "rms of m", "gradient norm"} < {quantity for _, quantity in wanted}
    for name in {**NORMS, **PIPELINES}:
        if name.startswith(kind):
            logged = table(root / name.replace(" ", "_").replace(",", ""))
            assert comparable(logged) == pytest.approx(comparable(wanted), rel=2e-4), name


@pytest.mark.parametrize("how", NAMED)
@pytest.mark.parametrize("name", [*POISONED, *PIPELINES])
def test_what_is_not_finite_is_named(found: list[dict], root: Path, name: str, how: str) -> None:
    for rank in found:
        error = rank["named"][how, name]
        assert NAMED[how] in error
        assert "\n" not in error
        assert "the last checkpoint is untouched" in error
    assert not list(root.glob(f"{how}_{name.split(',')[0].replace(' ', '_')}*/checkpoints/*"))


def test_flattened_layers(root: Path) -> None:
    """Conservative forces under ZeRO-3, on one rank: dual numbers, and modules that DeepSpeed does not see."""
    from egnscale.scaling.engine import start_world

    world, overrides = start_world(), [*CONSERVATIVE, "parallel={zero: 3, recompute: block}"]
    trainer(world, root, "flat", *overrides).run(progress=False)
    assert table(root / "flat") == pytest.approx(expected(world, root, "plain flat", *CONSERVATIVE), rel=2e-4)
    for how in NAMED:
        assert NAMED[how] in poisoned(world, root, "flat", how, *overrides)


@pytest.mark.parametrize("zero", [0, 1, 2, 3, "pipe"])
def test_all_ranks_go_back_together(found: list[dict], zero: int | str) -> None:
    for rollbacks, end, finite in (rank["back"][zero] for rank in found):
        assert [one["step"] - one["to_step"] for one in rollbacks] == [1] * len(rollbacks)
        assert len(rollbacks) in (1, 2)
        assert "the loss became inf" in rollbacks[0]["reason"]
        assert end["step"] == 6
        assert end["loss"] < 1e3
        assert finite
    assert found[0]["back"][zero] == found[1]["back"][zero]
    assert json.dumps(found[0]["back"][zero])
