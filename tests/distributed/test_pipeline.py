"""Pipelines of two and four stages, with graph and data parallelism, take the steps of one plain process.

That process goes through a step's micro-batches one by one, with double backward where forces are derivatives, and
without DeepSpeed. Micro-batches are of unequal sizes, and models have an odd number of blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from matrix import covering, difference, marked, measured_together
from toy import samples

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.tasks import S2EF, Normalizer
from egnscale.models import AtomModelConfig, build_model, model_config
from egnscale.models.stage import only_layers
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.recompute import set_recompute
from egnscale.scaling.stages import stage_bounds

GEMNET = {
    "num_blocks": 3, "emb_size_atom": 8, "emb_size_edge": 12, "emb_size_trip": 6, "emb_size_bil_trip": 5,
    "num_radial": 8, "emb_size_rbf": 4, "emb_size_cbf": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
DIMENET = {
    "num_blocks": 3, "hidden_channels": 12, "out_emb_channels": 10, "int_emb_size": 6, "basis_emb_size": 4,
    "num_radial": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip
MODELS = {"gemnet": GEMNET, "gemnet, conservative": GEMNET | {"forces": "conservative"}, "dimenet": DIMENET}
NORMALIZER = Normalizer(1.0, 2.0, 2.0)
STEPS = 20
#: Structures of each micro-batch of a step and replica.
MICRO_BATCHES = (1, 3, 2)
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
#: A wrong gradient must show as so many times what is allowed.
NOTICED = 100
#: The gradient's norm is larger than the first in every step of these runs, and never reaches the second.
CLIP = {"active": 0.5, "inactive": 1e4}


class Case(NamedTuple):
    """A run to compare."""

    model: str
    layout: tuple[int, int, int]  #: pipe x data x graph
    optimizer: str = "sgd"
    recompute: str = "none"
    clip: str = "inactive"
    wrong: str = ""  #: a control

    @property
    def name(self) -> str:
        words = [self.model, "x".join(map(str, self.layout)), self.optimizer, self.recompute, f"clipping {self.clip}"]
        return ", ".join([*words, *([f"control: {self.wrong}"] if self.wrong else [])])

    @property
    def ranks(self) -> int:
        pipe, data, graph = self.layout
        return pipe * data * graph

    @property
    def choices(self) -> tuple:
        return self.model, self.layout, self.optimizer, self.recompute, self.clip


LAYOUTS = ((2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 2, 2))
MATRIX = [
    Case(*case)
    for case in product(MODELS, LAYOUTS, ("sgd", "adamw"), ("none", "selective", "block"), ("active", "inactive"))
]
#: By default: every two values on two ranks, and each way to divide four of them (which takes a minute on two cores).
QUICK = [
    *covering([case for case in MATRIX if case.layout == (2, 1, 1)]),
    Case("gemnet", (2, 2, 1), "adamw", "selective", "active"),
    Case("dimenet", (2, 1, 2), "sgd", "block", "active"),
    Case("gemnet, conservative", (4, 1, 1), "sgd", "none", "inactive"),
]
CONTROLS = [
    Case("gemnet", (2, 1, 1), wrong="nothing goes back to the first stage"),
    Case("gemnet, conservative", (2, 1, 1), wrong="forces through the last stage alone"),
    Case("dimenet", (2, 1, 1), wrong="forces through the last stage alone"),
    Case("dimenet", (2, 1, 1), wrong="no tangent reaches the last stage"),
]


@cache
def structures_of(step: int, replica: int) -> list[list[Sample]]:
    """Micro-batches of a step."""
    mine = samples(2 * sum(MICRO_BATCHES), seed=step)[replica::2]
    found = []
    for size in MICRO_BATCHES:
        found.append(mine[:size])
        mine = mine[size:]
    return found


def objective(config: AtomModelConfig) -> S2EF:
    torch.manual_seed(3)
    network = build_model(config)
    for name, parameter in network.named_parameters():
        # Start at zero, and would leave nothing to compare in the first steps.
        if name.endswith("output.lin.weight") and not parameter.is_meta:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    order = "reverse_over_forward" if config.forces == "conservative" else "double_backward"
    return S2EF(network, NORMALIZER, force_coefficient=10.0, second_order=order)


def make_optimizer(name: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if not p.is_meta]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    return torch.optim.SGD(parameters, lr=2e-4, momentum=0.9)


@cache
def one_process(
    model: str, replicas: int, optimizer_name: str, clip: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of plain steps, and the parameters after them."""
    config = model_config(**MODELS[model])
    module = objective(config)
    module.second_order = "double_backward"
    collate = Collate(graph_spec(config))
    optimizer = make_optimizer(optimizer_name, module)
    losses = []
    for step in range(STEPS):
        batches = [collate(chosen) for replica in range(replicas) for chosen in structures_of(step, replica)]
        structures = sum(graph.num_systems for graph, _ in batches)
        atoms = sum(int((~labels.fixed).sum()) for _, labels in batches)
        optimizer.zero_grad()
        total = 0.0
        for graph, labels in batches:
            loss = module(graph, labels, torch.tensor([structures, atoms]))[0]
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP[clip]))
        assert (norm > CLIP[clip]) == (clip == "active")
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach() for name, p in module.named_parameters()}


# On the ranks of a world


def set_up(world: Any, case: Case) -> tuple[Any, S2EF, Any, Any]:
    """Mesh, objective, engine and what makes a step with them."""
    from egnscale.launch.pipelining import StagedModel
    from egnscale.launch.steps import StagedComputation, WholeModel
    from egnscale.scaling.engine import Engine
    from egnscale.scaling.layout import Mesh
    from egnscale.scaling.pipeline import Pipeline

    pipe, data, graph = case.layout
    mesh = Mesh.of_world(world.device, graph=graph, pipe=pipe)
    assert mesh.layout.data == data
    ds = complete_ds_config(
        read_ds_config("zero1"), zero=1, precision="fp32", gradient_accumulation=len(MICRO_BATCHES),
        clip_grad_norm=CLIP[case.clip],
    )  # fmt: skip
    config = model_config(**MODELS[case.model])
    bounds = stage_bounds([*[1.0] * (config.num_blocks + 1), 0.0], pipe)
    begin, end = bounds[mesh.stage : mesh.stage + 2]
    with only_layers(begin, end, bounds[-1]):
        module = objective(config)
    set_recompute(module.model, case.recompute, mesh.graph_group)  # type: ignore[arg-type]
    optimizer = make_optimizer(case.optimizer, module)
    if pipe == 1:
        engine = Engine(module, optimizer, ds, world)
        return mesh, module, engine, WholeModel(module, engine, mesh)
    model: Any = module.model
    pipeline = Pipeline(module, model.layers[begin:end], optimizer, ds, world, pipe)
    return mesh, module, pipeline, StagedComputation(module, pipeline, mesh, StagedModel(model, bounds, mesh, pipeline))


def losses_of(world: Any, case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of twenty steps, and the parameters after them."""
    from egnscale.launch.steps import count

    mesh, module, engine, computation = set_up(world, case)
    collate = PartCollate(Collate(graph_spec(module.model.config)), mesh.layout.graph, mesh.graph_rank)
    losses = []
    for step in range(STEPS):
        read = [collate(chosen) for chosen in structures_of(step, mesh.data_rank)]
        computed = computation.backward(read, count(read, module, mesh), None)
        engine.step()
        mean = torch.stack([one.loss.double() for one in computed]).mean()
        losses.append(float(mesh.sum_over_data(mean)) / mesh.layout.data)
    return losses, dict(engine.whole_masters())


def measure(world: Any, cases: list[Case]) -> list[Any]:
    found = {}
    # DeepSpeed keeps a pipeline's grid for the whole process: no engine without one can be made after it.
    for case in sorted(cases, key=lambda case: case.layout[0]):
        with _wrong(case.wrong):
            found[case] = losses_of(world, case)
    return [found[case] for case in cases]


@contextmanager
def _wrong(what: str) -> Iterator[None]:
    from egnscale.launch.pipelining import StagedModel
    from egnscale.models.stage import Stage
    from egnscale.scaling import packing

    class Dropped(packing._Unpack):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor, None]:
            return torch.zeros(ctx.size), None

    def of_last_stage(self: Any, graphs: Any, known: Any, *, forces: bool) -> Any:
        last = self.stage.last
        return share(self, graphs, known if last else [p._replace(forces=0 * p.forces) for p in known], forces=forces)

    def without_tangent(self: Any, state: Any) -> Any:
        value, tangent = state
        return leaves(self, (value, tangent._replace(energy=torch.zeros_like(tangent.energy))))

    share, leaves, unpack = StagedModel._shared, Stage.dual_leaves, packing._Unpack
    if what.startswith("nothing goes back"):
        packing._Unpack = Dropped  # type: ignore[misc]
    if what.startswith("forces through"):
        StagedModel._shared = of_last_stage  # type: ignore[method-assign]
    if what.startswith("no tangent"):
        Stage.dual_leaves = without_tangent  # type: ignore[method-assign]
    try:
        yield
    finally:
        StagedModel._shared, Stage.dual_leaves, packing._Unpack = share, leaves, unpack  # type: ignore[method-assign,misc]


# The test


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Any]:
    return measured_together(request, measure)


@pytest.mark.timeout(7200)  # the first of a batch waits for all of it
@pytest.mark.parametrize("case", marked([*MATRIX, *CONTROLS], [*QUICK, *CONTROLS]))
def test_a_pipeline_is_one_process(
    case: Case, measured: Callable[[Case], Any], record_property: Callable[[str, Any], None]
) -> None:
    losses, parameters = measured(case)
    wanted, after = one_process(case.model, case.layout[1], case.optimizer, case.clip)
    assert parameters.keys() == after.keys()
    deviation = difference(losses, wanted)
    distance = float(
        torch.stack([(parameters[name] - p).norm() for name, p in after.items()]).norm()
        / torch.stack([p.norm() for p in after.values()]).norm()
    )
    record_property("deviation of losses", deviation)
    record_property("deviation of parameters", distance)
    allowed = TOLERANCE[case.optimizer]
    if case.wrong:
        assert deviation > NOTICED * allowed
    else:
        assert deviation < allowed
        assert distance < allowed
