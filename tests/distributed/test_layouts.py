"""Twenty optimizer steps give the same losses however ranks are shared out: graph x data, under every ZeRO stage,
whatever is recomputed.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from spawn import spawn
from toy import samples

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.data.sampler import deal
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.tasks import S2EF, Normalizer
from egnscale.models import build_model
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.recompute import Recompute, set_recompute

GEMNET = {
    "num_blocks": 2, "emb_size_atom": 8, "emb_size_edge": 12, "emb_size_trip": 6, "emb_size_bil_trip": 5,
    "num_radial": 8, "emb_size_rbf": 4, "emb_size_cbf": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
DIMENET = {
    "num_blocks": 2, "hidden_channels": 12, "out_emb_channels": 10, "int_emb_size": 6, "basis_emb_size": 4,
    "num_radial": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
MODELS = {"gemnet": GEMNET, "gemnet, conservative": GEMNET | {"forces": "conservative"}, "dimenet": DIMENET}
NORMALIZER = Normalizer(1.0, 2.0, 2.0)
STEPS = 20
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}


class Case(NamedTuple):
    graph: int
    data: int
    zero: int
    optimizer: str
    clip: float | None
    model: str = "gemnet"
    second_order: str = "double_backward"
    recompute: Recompute = "none"

    @property
    def name(self) -> str:
        clip = "clipped" if self.clip else "not clipped"
        layout = f"graph {self.graph} x data {self.data}, ZeRO-{self.zero}"
        how = f"{self.second_order}, recompute {self.recompute}"
        return f"{self.model}, {layout}, {self.optimizer}, {clip}, {how}"


#: The gradient's norm is between 2 and 40 in these runs: 0.5 always clips.
FULL = [Case(*case) for case in product((1, 2), (1, 2), range(4), ("sgd", "adamw"), (None, 0.5))]
#: Every stage, optimizer and clipping meets every layout with more than one rank at least once.
QUICK = [
    Case(graph, data, zero, optimizer, clip)
    for graph, data in ((2, 1), (1, 2), (2, 2))
    for zero, (optimizer, clip) in enumerate(
        (("adamw", 0.5), ("sgd", None), ("adamw", None), ("sgd", 0.5))
        if data == 1
        else (("sgd", 0.5), ("adamw", 0.5), ("sgd", None), ("adamw", 0.5))
    )
] + [Case(1, 1, 1, "adamw", 0.5)]

CONSERVATIVE = [
    Case(graph, data, zero, optimizer, clip, model)
    for model in ("gemnet, conservative", "dimenet")
    for graph, data in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2))
    for zero in range(3)
    for optimizer, clip in (("sgd", None), ("sgd", 0.5), ("adamw", None))
]
#: Every stage and layout, and both models, at least once.
QUICK_CONSERVATIVE = [
    Case(2, 1, 0, "sgd", None, "dimenet"),
    Case(2, 1, 2, "sgd", 0.5, "dimenet"),
    Case(2, 1, 1, "sgd", None, "gemnet, conservative"),
    Case(1, 2, 2, "sgd", None, "gemnet, conservative"),
    Case(3, 1, 1, "sgd", None, "dimenet"),
    Case(3, 1, 2, "sgd", 0.5, "gemnet, conservative"),
]

HOWS: tuple[Recompute, ...] = ("selective", "block")
RECOMPUTE = [
    Case(graph, data, zero, optimizer, None, recompute=how)
    for graph, data, zero, optimizer, how in product((1, 2), (1, 2), range(4), ("sgd", "adamw"), HOWS)
] + [
    Case(graph, data, zero, "sgd", None, model, recompute=how)
    for model in ("gemnet, conservative", "dimenet")
    for graph, data, zero, how in product((1, 2), (1, 2), range(3), HOWS)
]
#: Every stage, and every layout with more than one rank, with both; ZeRO-3 gathers parameters again for a replay.
QUICK_RECOMPUTE = [
    *(Case(2, 1, zero, "sgd", None, recompute="block") for zero in range(4)),
    *(Case(1, 2, zero, "sgd", None, recompute="selective") for zero in range(4)),
    Case(1, 2, 3, "adamw", 0.5, recompute="block"),
    Case(2, 1, 3, "adamw", 0.5, recompute="selective"),
    Case(2, 2, 3, "sgd", 0.5, recompute="block"),
    Case(2, 1, 2, "sgd", None, "gemnet, conservative", recompute="block"),
    Case(2, 1, 1, "sgd", None, "dimenet", recompute="block"),
    Case(1, 2, 1, "sgd", None, "dimenet", recompute="selective"),
]


#: Reverse over forward has every stage.
DUAL = [
    Case(graph, data, zero, optimizer, clip, model, "reverse_over_forward", how)
    for model in ("gemnet, conservative", "dimenet")
    for graph, data in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2))
    for zero in range(4)
    for optimizer, clip, how in (("sgd", None, "none"), ("sgd", 0.5, "block"), ("adamw", None, "selective"))
]
QUICK_DUAL = [
    Case(1, 2, 3, "sgd", None, "dimenet", "reverse_over_forward"),
    Case(2, 1, 3, "sgd", 0.5, "dimenet", "reverse_over_forward", "block"),
    Case(2, 1, 3, "sgd", None, "gemnet, conservative", "reverse_over_forward"),
    Case(2, 1, 1, "sgd", None, "dimenet", "reverse_over_forward"),
    Case(1, 2, 2, "sgd", None, "gemnet, conservative", "reverse_over_forward", "block"),
    Case(3, 1, 0, "sgd", None, "dimenet", "reverse_over_forward"),
]


@cache
def structures_of(step: int) -> list[Sample]:
    return samples(4, seed=step)


def objective(model: str, second_order: str = "double_backward") -> S2EF:
    torch.manual_seed(3)
    network = build_model(**MODELS[model])
    for name, parameter in network.named_parameters():
        if name.endswith("output.lin.weight"):  # starts at zero, and would leave nothing to compare in the first steps
            torch.nn.init.normal_(parameter, std=0.1)
    return S2EF(network, NORMALIZER, force_coefficient=10.0, second_order=second_order)


def collate_of(model: torch.nn.Module) -> Collate:
    return Collate(graph_spec(model.config))


def make_optimizer(name: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":  # at five times this rate the unclipped run is unstable, and makes 1e-5 of a rounding error
        return torch.optim.SGD(module.parameters(), lr=2e-4, momentum=0.9)
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)


def run(world: Any, case: Case, wrong: bool = False) -> list[float]:
    """Losses of a DeepSpeed run. `wrong`: take each rank's loss of its own atoms for the loss, as one might."""
    from egnscale.scaling.engine import Engine, sum_over_ranks
    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=case.graph)
    assert mesh.layout.data == case.data
    module = objective(case.model, case.second_order)
    if case.zero == 3 and case.second_order == "reverse_over_forward":
        flatten_layers(module.model)
    set_recompute(module.model, case.recompute, mesh.graph_group)
    collate = PartCollate(collate_of(module.model), case.graph, mesh.graph_rank)
    config = complete_ds_config(
        read_ds_config(f"zero{case.zero}"),
        zero=case.zero,
        precision="fp32",
        gradient_accumulation=1,
        clip_grad_norm=case.clip,
    )
    engine = Engine(module, make_optimizer(case.optimizer, module), config, world)
    losses = []
    for step in range(STEPS):
        chosen = structures_of(step)
        mine = deal(torch.tensor([sample.num_atoms for sample in chosen]).numpy(), case.data)[mesh.data_rank]
        graph, labels = collate([chosen[i] for i in mine])
        graph = mesh.place(graph)
        structures = graph.num_systems if mesh.graph_rank == 0 else 0
        total = sum_over_ranks(torch.tensor([structures, int((~labels.fixed).sum())], dtype=torch.float64))
        if wrong:
            type(graph.partition).total = _own_total  # type: ignore[method-assign]
        loss, _ = engine(graph, labels, total / case.data)
        engine.backward(loss)
        engine.step()
        losses.append(float(sum_over_ranks(loss.detach().double())) / world.size)
    return losses


def _own_total(self: Any, x: torch.Tensor) -> torch.Tensor:
    """An all-reduce whose backward passes gradients through: right values, wrong gradients."""
    whole = self.own.total(x)
    from egnscale.scaling.collectives import sum_over_parts

    return whole + (sum_over_parts(whole, self.group, "total") - whole).detach()


def all_cases(world: Any, cases: list[Case]) -> dict[str, list[float]]:
    found = {case.name: run(world, case) for case in cases if case.graph * case.data == world.size}
    if world.size == 2 and "gemnet" in {case.model for case in cases}:
        found["control"] = run(world, Case(2, 1, 1, "sgd", None), wrong=True)
    return found


@cache
def reference(optimizer_name: str, clip: float | None, model: str = "gemnet") -> list[float]:
    """One plain process, no DeepSpeed."""
    module = objective(model)
    collate = collate_of(module.model)
    optimizer = make_optimizer(optimizer_name, module)
    losses = []
    for step in range(STEPS):
        graph, labels = collate(structures_of(step))
        loss, _ = module(graph, labels, torch.tensor([graph.num_systems, int((~labels.fixed).sum())]))
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            assert float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip)) > clip
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(cases: list[Case]) -> dict[str, list[float]]:
    """Losses of each case, and of a control where there is one."""
    found: dict[str, list[float]] = {}
    for size in sorted({case.graph * case.data for case in cases}):
        found |= spawn(size, all_cases, cases, timeout=900)[0]
    errors = {}
    for case in cases:
        wanted = reference(case.optimizer, case.clip, case.model)
        error = max(abs(a - b) / abs(b) for a, b in zip(found[case.name], wanted, strict=True))
        if not error < TOLERANCE[case.optimizer]:
            errors[case.name] = error
    assert errors == {}
    return found


def check_with_controls(cases: list[Case]) -> None:
    found = check(cases)
    wanted = reference("sgd", None)
    control = max(abs(a - b) / abs(b) for a, b in zip(found["control"], wanted, strict=True))
    assert control > 100 * TOLERANCE["sgd"], "a wrong gradient goes unnoticed"
    clipped = reference("sgd", 0.5)
    assert max(abs(a - b) / abs(b) for a, b in zip(clipped, wanted, strict=True)) > 100 * TOLERANCE["sgd"]


def test_twenty_steps_are_those_of_one_process() -> None:
    check_with_controls(QUICK)


def test_twenty_conservative_steps_are_those_of_one_process() -> None:
    check(QUICK_CONSERVATIVE)


def test_twenty_steps_with_recomputation_are_those_of_one_process_without() -> None:
    check(QUICK_RECOMPUTE)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_steps_of_every_layout() -> None:
    check_with_controls(FULL)


def test_twenty_steps_of_reverse_over_forward_are_those_of_double_backward() -> None:
    check(QUICK_DUAL)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_steps_of_reverse_over_forward_in_every_layout() -> None:
    check(DUAL)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_conservative_steps_of_every_layout() -> None:
    check(CONSERVATIVE)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_twenty_steps_with_recomputation_of_every_layout() -> None:
    check(RECOMPUTE)
