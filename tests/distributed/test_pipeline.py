"""Pipelines of two and four stages, with graph and data parallelism, take the steps of one plain process."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from spawn import spawn
from toy import samples

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.tasks import S2EF, Normalizer
from egnscale.models import build_model, model_config
from egnscale.models.stage import only_layers
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.recompute import set_recompute

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
#: Structures of each micro-batch of a step and replica: of unequal sizes.
MICRO_BATCHES = (1, 3, 2)
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}


class Case(NamedTuple):
    """A run to compare."""

    model: str
    pipe: int
    data: int
    graph: int
    optimizer: str = "sgd"
    clip: float | None = None
    recompute: str = "none"
    wrong: bool = False  #: a control: one stage's part of the forces, or of the gradient, is left out

    @property
    def name(self) -> str:
        words = [self.model, f"{self.pipe}x{self.data}x{self.graph}", self.optimizer, self.recompute]
        return ", ".join(words + ["clipped"] * bool(self.clip) + ["control"] * self.wrong)


@cache
def structures_of(step: int, replica: int) -> list[list[Sample]]:
    """Micro-batches of a step."""
    every = samples(2 * sum(MICRO_BATCHES), seed=step)
    mine = every[replica::2]
    found = []
    for size in MICRO_BATCHES:
        found.append(mine[:size])
        mine = mine[size:]
    return found


def objective(model: str) -> S2EF:
    torch.manual_seed(3)
    network = build_model(**MODELS[model])
    for name, parameter in network.named_parameters():
        # Start at zero, and would leave nothing to compare in the first steps.
        if name.endswith("output.lin.weight") and not parameter.is_meta:
            with torch.random.fork_rng():
                torch.manual_seed(len(name) + int(name.split(".")[1]) if "blocks" in name else 0)
                torch.nn.init.normal_(parameter, std=0.1)
    return S2EF(network, NORMALIZER, force_coefficient=10.0)


def make_optimizer(name: str, module: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if not p.is_meta]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    return torch.optim.SGD(parameters, lr=2e-4, momentum=0.9)


def counted(batches: list[tuple], replicas: int) -> torch.Tensor:
    """What each micro-batch's sums are divided by: a step's mean is over all of its structures and atoms."""
    atoms = sum(int((~labels.fixed).sum()) for _, labels in batches)
    structures = sum(graph.num_systems for graph, _ in batches)
    return torch.tensor([structures, atoms], dtype=torch.float64) / (replicas * len(MICRO_BATCHES))


@cache
def one_process(model: str, data: int, optimizer_name: str, clip: float | None) -> tuple[list[float], dict]:
    """Losses of plain steps, without DeepSpeed, and the parameters after them."""
    module = objective(model)
    collate = Collate(graph_spec(module.model.config))
    optimizer = make_optimizer(optimizer_name, module)
    losses = []
    for step in range(STEPS):
        batches = [collate(chosen) for replica in range(data) for chosen in structures_of(step, replica)]
        counts = counted(batches, data)
        optimizer.zero_grad()
        total = 0.0
        for graph, labels in batches:
            loss = module(graph, labels, counts)[0] / len(batches)
            loss.backward()
            total += loss.item()
        if clip is not None:
            assert float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip)) > clip
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach() for name, p in module.named_parameters()}


def losses_of(world: Any, case: Case) -> tuple[list[float], float]:
    """Of twenty steps through a pipeline; and how far the parameters are then from those of one process."""
    from egnscale.launch.pipelining import MicroBatch, StagedModel
    from egnscale.scaling.layout import Mesh
    from egnscale.scaling.pipeline import Pipeline
    from egnscale.scaling.stages import cut

    mesh = Mesh.of_world(world.device, graph=case.graph, pipe=case.pipe)
    assert mesh.layout.data == case.data
    config = model_config(**MODELS[case.model])
    bounds = cut([1.0] * (config.num_blocks + 1), case.pipe)
    bounds[-1] += 1  # the readout
    with only_layers(*bounds[mesh.stage : mesh.stage + 2], config.num_blocks + 2):
        module = objective(case.model)
    set_recompute(module.model, case.recompute, mesh.graph_group)
    ds = complete_ds_config(
        read_ds_config("zero1"), zero=1, precision="fp32", gradient_accumulation=len(MICRO_BATCHES),
        clip_grad_norm=case.clip,
    )  # fmt: skip
    layers = module.model.layers[slice(*bounds[mesh.stage : mesh.stage + 2])]
    pipeline = Pipeline(module, layers, make_optimizer(case.optimizer, module), ds, world, case.pipe)
    staged = StagedModel(module.model, bounds, mesh, pipeline)
    plain = Collate(graph_spec(config))
    collate = PartCollate(plain, case.graph, mesh.graph_rank)
    losses = []
    for step in range(STEPS):
        every = [plain(chosen) for replica in range(case.data) for chosen in structures_of(step, replica)]
        counts = counted(every, case.data)
        mine = [collate(chosen) for chosen in structures_of(step, mesh.data_rank)]
        outcomes = staged.backward(module, [MicroBatch(mesh.place(graph), labels, counts) for graph, labels in mine])
        pipeline.step()
        mean = torch.stack([outcome.loss.double() for outcome in outcomes]).mean()
        losses.append(float(mesh.sum_over_data(mean)) / case.data)
    found = dict(pipeline.whole_masters())
    wanted = one_process(case.model, case.data, case.optimizer, case.clip)[1]
    distance = max(float((found[name] - p).norm() / p.norm().clamp(min=1e-6)) for name, p in wanted.items())
    return losses, distance


def measure(world: Any, cases: list[Case]) -> list[Any]:
    return [losses_of(world, case) for case in cases]


CASES = [Case("gemnet", 2, 1, 1), Case("gemnet, conservative", 2, 1, 1), Case("dimenet", 2, 1, 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_pipeline_is_one_process(case: Case) -> None:
    losses, distance = spawn(case.pipe * case.data * case.graph, measure, [case])[0][0]
    wanted, _ = one_process(case.model, case.data, case.optimizer, case.clip)
    error = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    print(error, distance)
    assert error < TOLERANCE[case.optimizer]
    assert distance < TOLERANCE[case.optimizer]
