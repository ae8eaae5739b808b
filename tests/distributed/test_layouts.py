"""Every legal combination of forces, second order, ZeRO and recomputation, on every layout of ranks: twenty optimizer
steps give the losses, and one backward the gradient in fp64, of one plain process without DeepSpeed.

A subset in which every pair of values meets runs by default, all of it in `make test-all`. Ranks are started once for
all the selected cases of a world.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from matrix import covering, difference, marked, measured_together
from torch import Tensor
from toy import samples

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.data.sampler import deal
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.tasks import S2EF, Normalizer
from egnscale.models import build_model
from egnscale.scaling.combinations import Combination, SecondOrder, every_combination
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.flat import flatten_layers
from egnscale.scaling.recompute import set_recompute

GEMNET = {
    "num_blocks": 2, "emb_size_atom": 8, "emb_size_edge": 12, "emb_size_trip": 6, "emb_size_bil_trip": 5,
    "num_radial": 8, "emb_size_rbf": 4, "emb_size_cbf": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
DIMENET = {
    "num_blocks": 2, "hidden_channels": 12, "out_emb_channels": 10, "int_emb_size": 6, "basis_emb_size": 4,
    "num_radial": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
MODELS = {"gemnet": GEMNET, "gemnet, conservative": GEMNET | {"forces": "conservative"}, "dimenet": DIMENET}
MODELS_WITH = {"direct": ("gemnet",), "conservative": ("gemnet, conservative", "dimenet")}
NORMALIZER = Normalizer(1.0, 2.0, 2.0)
STEPS = 20
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
GRADIENT_TOLERANCE = 1e-10
#: A wrong gradient must show as so many times what is allowed.
NOTICED = 100


class Case(NamedTuple):
    """A run to compare."""

    model: str
    combination: Combination
    graph: int
    data: int
    optimizer: str = ""  #: none: one backward in fp64 in place of optimizer steps
    clip: float | None = None
    wrong: bool = False  #: a control: takes each rank's loss of its own atoms for the loss, as one might

    @property
    def second_order(self) -> SecondOrder:
        return self.combination.chosen_second_order

    @property
    def name(self) -> str:
        one = self.combination
        words = [self.model, *([self.second_order] if one.forces == "conservative" else [])]
        words += [f"ZeRO-{one.zero}", one.recompute, f"graph {self.graph} x data {self.data}", self.optimizer or "fp64"]
        return ", ".join(words + ["clipped"] * bool(self.clip) + ["control"] * self.wrong)

    @property
    def ranks(self) -> int:
        return self.graph * self.data

    @property
    def choices(self) -> tuple:
        """The values of which every two are to meet."""
        one, layout = self.combination, (self.graph, self.data)
        return (self.model, self.second_order), one.zero, one.recompute, layout, (self.optimizer, self.clip)


#: `auto` stands for one of the others.
LEGAL = [
    one
    for one in every_combination(
        forces=("direct", "conservative"),
        second_order=("auto", "double_backward", "reverse_over_forward"),
        zero=range(4),
        recompute=("none", "selective", "block"),
    )
    if one.why_not() is None and (one.forces == "direct" or one.second_order != "auto")
]
RUNS = [(model, one) for one in LEGAL for model in MODELS_WITH[one.forces]]
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
MATRIX = [Case(*run, *layout, optimizer) for run, layout, optimizer in product(RUNS, LAYOUTS, ("sgd", "adamw"))]
#: The gradient's norm is between 2 and 40 in these runs: 0.5 always clips.
CLIPPED = [
    Case(model, one, *layout, optimizer, 0.5)
    for (model, one), layout, optimizer in product(RUNS, LAYOUTS, ("sgd", "adamw"))
    if one.recompute == "none" and (one.forces == "direct" or optimizer == "sgd")
]
THREE = [Case(*run, 3, 1, "sgd") for run in RUNS]
GRADIENTS = [Case(*run, *layout) for run, layout in product(RUNS, LAYOUTS)]
#: For every way to a gradient, in steps and in fp64.
CONTROLS = [
    Case(model, Combination(forces=forces, second_order=how, zero=1), 2, 1, optimizer, wrong=True)
    for model, forces, how in (
        ("gemnet", "direct", "auto"),
        ("gemnet, conservative", "conservative", "double_backward"),
        ("dimenet", "conservative", "reverse_over_forward"),
    )
    for optimizer in ("sgd", "")
]


@cache
def structures_of(step: int) -> list[Sample]:
    return samples(4, seed=step)


def objective(model: str, second_order: SecondOrder = "double_backward") -> S2EF:
    torch.manual_seed(3)
    network = build_model(**MODELS[model])
    for name, parameter in network.named_parameters():
        if name.endswith("output.lin.weight"):  # starts at zero, and would leave nothing to compare in the first steps
            torch.nn.init.normal_(parameter, std=0.1)
    return S2EF(network, NORMALIZER, force_coefficient=10.0, second_order=second_order)


def collate_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Collate:
    return Collate(graph_spec(model.config), dtype=dtype)


def make_optimizer(name: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
    # At five times this rate the unclipped run is unstable, and makes 1e-5 of a rounding error.
    return torch.optim.SGD(module.parameters(), lr=2e-4, momentum=0.9)


# One process, no DeepSpeed, nothing recomputed, double backward


@cache
def losses_of_one_process(optimizer_name: str, clip: float | None, model: str) -> list[float]:
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


@cache
def gradient_of_one_process(model: str) -> dict[str, Tensor]:
    module = objective(model).double()
    graph, labels = collate_of(module.model, torch.float64)(structures_of(0))
    loss, _ = module(graph, labels, torch.tensor([graph.num_systems, int((~labels.fixed).sum())]))
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# On the ranks of a world


def set_up(world: Any, case: Case, dtype: torch.dtype) -> tuple[S2EF, Any, Callable[[int], tuple]]:
    """The objective, whatever is called in its place, and what it is called with in each step."""
    from egnscale.scaling.engine import Engine, sum_over_ranks
    from egnscale.scaling.layout import Mesh

    one, mesh = case.combination, Mesh.of_world(world.device, graph=case.graph)
    assert mesh.layout.data == case.data
    module = objective(case.model, case.second_order).to(dtype)
    if one.zero == 3 and one.forces == "conservative":
        flatten_layers(module.model)
    set_recompute(module.model, one.recompute, mesh.graph_group)
    collate = PartCollate(collate_of(module.model, dtype), case.graph, mesh.graph_rank)

    def batch(step: int) -> tuple:
        chosen = structures_of(step)
        mine = deal(torch.tensor([sample.num_atoms for sample in chosen]).numpy(), case.data)[mesh.data_rank]
        graph, labels = collate([chosen[i] for i in mine])
        graph = mesh.place(graph)
        structures = graph.num_systems if mesh.graph_rank == 0 else 0
        total = sum_over_ranks(torch.tensor([structures, int((~labels.fixed).sum())], dtype=torch.float64))
        return graph, labels, total / case.data

    if one.zero == 0 and dtype == torch.float64:
        return module, None, batch
    config = complete_ds_config(
        read_ds_config(f"zero{one.zero}"),
        zero=one.zero,
        precision="fp32",
        gradient_accumulation=1,
        clip_grad_norm=case.clip,
    )
    return module, Engine(module, make_optimizer(case.optimizer, module), config, world), batch


def losses_of(world: Any, case: Case) -> list[float]:
    """Of twenty steps with DeepSpeed in fp32."""
    from egnscale.scaling.engine import sum_over_ranks

    _, engine, batch = set_up(world, case, torch.float32)
    losses = []
    for step in range(STEPS):
        loss, _ = engine(*batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(sum_over_ranks(loss.detach().double())) / world.size)
    return losses


def gradient_error(world: Any, case: Case) -> float:
    """The largest relative error of a parameter's fp64 gradient.

    DeepSpeed keeps fp32 masters at every stage, so no step of it is exact in fp64. Compared is what its module gives to
    each parameter, gathered or not, before DeepSpeed reduces it: 1 to 3 take fp64 gradients. ZeRO-0 refuses them, so
    the module is called without DeepSpeed there.
    """
    from egnscale.scaling.engine import sum_over_ranks

    module, engine, batch = set_up(world, case, torch.float64)
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: found.update({name: gradient.detach().clone()}))
    loss, _ = (engine or module)(*batch(0))
    (engine.backward if engine else Tensor.backward)(loss)
    errors = []
    for name, wanted in gradient_of_one_process(case.model).items():
        assert found[name].dtype == torch.float64
        mean = sum_over_ranks(found[name]) / world.size
        errors.append(float((mean - wanted).norm() / wanted.norm().clamp(min=1e-6)))
    return max(errors)


def measure(world: Any, cases: list[Case]) -> list[Any]:
    from egnscale.scaling.partition import OwnerPartition

    found: list[Any] = []
    right = OwnerPartition.total
    for case in cases:
        if case.wrong:
            OwnerPartition.total = _own_total  # type: ignore[method-assign]
        found.append(losses_of(world, case) if case.optimizer else gradient_error(world, case))
        OwnerPartition.total = right  # type: ignore[method-assign]
    return found


def _own_total(self: Any, x: Tensor) -> Tensor:
    """An all-reduce whose backward passes gradients through: right values, wrong gradients."""
    from egnscale.scaling.collectives import sum_over_parts

    whole = self.own.total(x)
    return whole + (sum_over_parts(whole, self.group, "total") - whole).detach()


# The test


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Any]:
    return measured_together(request, measure)


ALL = MATRIX + CLIPPED + THREE


@pytest.mark.timeout(7200)  # the first of a batch waits for all of it
@pytest.mark.parametrize(
    "case", marked([*ALL, *GRADIENTS, *CONTROLS], [*covering(ALL), *covering(GRADIENTS), *CONTROLS])
)
def test_every_legal_combination_is_one_process(
    case: Case, measured: Callable[[Case], Any], record_property: Callable[[str, Any], None]
) -> None:
    if case.optimizer:
        wanted = losses_of_one_process(case.optimizer, case.clip, case.model)
        error, allowed = difference(measured(case), wanted), TOLERANCE[case.optimizer]
        if case.clip:
            unclipped = losses_of_one_process(case.optimizer, None, case.model)
            assert difference(wanted, unclipped) > NOTICED * allowed, "clipping, too, would go unnoticed"
    else:
        error, allowed = measured(case), GRADIENT_TOLERANCE
    record_property("deviation", error)
    assert error > NOTICED * allowed if case.wrong else error < allowed
