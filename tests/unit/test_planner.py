"""The planner against what is known: traces against hand counts, torch's counters and saved tensors; refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from kept import kept_bytes
from small_models import GEMNET
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import make_dataset, write_config

from egnscale.data.batch import build_graph
from egnscale.launch import planning
from egnscale.launch.cli import main
from egnscale.launch.config import load_config
from egnscale.launch.loading import graph_spec
from egnscale.launch.planning import Planner, available_memory, out_of_memory, settle, surely_fits
from egnscale.models import build_model, model_config
from egnscale.scaling.allocators import MIB, CudaCache, Pages
from egnscale.scaling.combinations import Combination
from egnscale.scaling.layout import ParallelLayout
from egnscale.scaling.memory_trace import Allocation, GradientReady, StepTrace, trace_step
from egnscale.scaling.planner import GIB, MACHINES, Machine, explained, ranked, read_size
from egnscale.scaling.rank_memory import (
    ACTIVATIONS,
    AVERAGES,
    MASTERS,
    OPTIMIZER,
    PARAMETERS,
    Peak,
    States,
    peak_of_run,
)

ROWS, WIDTH = 1000, 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=8, val=3)


def mlp_trace(device: str) -> tuple[nn.Module, StepTrace]:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False))
        x = torch.ones(ROWS, WIDTH)
    return model, trace_step(model, lambda: model(x).sum(), {"0": model[0], "2": model[2]}, [x])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_an_mlp_as_counted_by_hand(device: str) -> None:
    _, trace = mlp_trace(device)
    size, weight = ROWS * WIDTH * 4, WIDTH * WIDTH * 4
    forward = [e for e in trace.events if isinstance(e, Allocation) and e.made.phase == "forward"]
    # First product, freed once ReLU has its result; ReLU's result; second product; the sum.
    assert [e.size for e in forward if e.size > 0] == [size, size, size, 4]
    assert [e.name for e in trace.events if isinstance(e, GradientReady)] == ["2.weight", "0.weight"]
    # In backward, gradients of two results beside the one that is kept, or of a weight.
    assert 3 * size <= trace.peak() <= 3 * size + 2 * weight + 64
    # Two products forward; of the gradients, both of the second layer and the weight's of the first.
    assert trace.total.total_flops == (2 + 3) * 2 * ROWS * WIDTH * WIDTH


def gemnet(how: str, device: str = "meta") -> tuple[Any, Any]:
    from egnscale.scaling.recompute import set_recompute

    with torch.device(device):
        model = build_model(**GEMNET)
    set_recompute(model, how)  # type: ignore[arg-type]
    return model, build_graph([structures.slab()], graph_spec(model.config)).to(device)


@pytest.mark.parametrize("how", ["none", "selective", "block"])
def test_gemnet_keeps_what_autograd_keeps_and_computes_what_torch_counts(how: str) -> None:
    model, graph = gemnet(how)
    tensors: list[torch.Tensor] = []
    graph.map(lambda x: tensors.append(x) or x)

    def loss() -> torch.Tensor:
        prediction = model(graph)
        return prediction.energy.sum() + prediction.forces.sum()

    trace = trace_step(model, loss, {}, tensors)
    first_backward = next(
        i for i, e in enumerate(trace.events) if isinstance(e, Allocation) and e.made.phase == "backward"
    )
    alive = sum(trace.alive_at(first_backward - 1).values())
    assert alive == pytest.approx(kept_bytes(model, graph), rel=0.02)
    with FlopCounterMode(display=False) as flops:
        loss().backward()
    assert trace.total.total_flops == flops.get_total_flops()


def test_recomputation_lowers_the_peak_and_adds_operations() -> None:
    traces = {}
    for how in ("none", "block"):
        model, graph = gemnet(how)
        traces[how] = trace_step(model, lambda m=model, g=graph: m(g).forces.sum(), {})
    assert traces["block"].peak() < 0.7 * traces["none"].peak()
    assert traces["block"].total.total_flops > 1.2 * traces["none"].total.total_flops


def test_the_cuda_cache_keeps_what_it_had() -> None:
    cache = CudaCache()
    cache.allocate(0, 30 * MIB)
    cache.allocate(1, 100)
    assert cache.taken == 32 * MIB  # a segment of its own, and one of 2 MiB for small ones
    cache.free(0)
    cache.allocate(2, 10 * MIB)  # fits into what is free
    assert cache.taken == 32 * MIB
    cache.allocate(3, 25 * MIB)  # does not
    assert cache.taken == cache.peak == 58 * MIB
    pages = Pages()
    pages.allocate(0, 1)
    pages.free(0)
    assert (pages.taken, pages.peak) == (0, 4096)


SIDE = 1000


def peak_of_square(zero: int, ranks: int, **changes: Any) -> Peak:
    """Of a run of one square matrix on two rows."""
    with torch.device("meta"):
        model = nn.Linear(SIDE, SIDE, bias=False)
        x = torch.ones(2, SIDE)
    trace = trace_step(model, lambda: model(x).sum(), {}, [x])
    combination = Combination(zero=zero)
    return peak_of_run(
        States(parameters={"weight": SIDE**2}, ranks=ranks, ds_config={}, combination=combination, **changes), trace
    )


def test_states_without_zero_are_whole() -> None:
    weight = 4 * SIDE**2
    plain = peak_of_square(0, 1)
    assert plain.kinds[PARAMETERS] == weight
    assert plain.kinds[OPTIMIZER] == 2 * weight
    assert peak_of_square(0, 1, amsgrad=True).kinds[OPTIMIZER] == 3 * weight


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_are_sharded_as_zero_says(zero: int) -> None:
    weight = 4 * SIDE**2
    peak = peak_of_square(zero, 8, averaged=True)
    assert peak.kinds[OPTIMIZER] == 2 * weight / 8
    assert peak.kinds[MASTERS] == peak.kinds[AVERAGES] == weight / 8
    assert peak.kinds[PARAMETERS] == (weight / 8 if zero == 3 else weight)


def planner(data: Path, *words: str) -> Planner:
    config = load_config(
        write_config(data / "config.yaml", data, data / "run"),
        ["optim.batch_size=2", f"data.train={data}/s2ef/train", *words],
    )
    return Planner.of_config(config, MACHINES["cpu"])


def test_layouts_are_legal_and_keep_the_global_batch(data: Path) -> None:
    plans = planner(data).layouts(2, 2)
    assert {plan.layout.graph for plan in plans} == {1, 2}
    assert {plan.combination.zero for plan in plans} == {0, 1, 2, 3}
    for plan in plans:
        assert plan.combination.why_not() is None
        assert plan.micro_batch * plan.accumulation * plan.layout.data == 2 * 2
        assert plan.sent > 0 or plan.layout.graph == 1
    best = ranked(plans, 10 * GIB)[0]
    assert best.times.total <= min(plan.times.total for plan in plans) * 1.1
    some = sorted(plan.needed for plan in plans)[3]
    order = ranked(plans, some)
    fits = [plan.fits(some) for plan in order]
    assert fits == sorted(fits, reverse=True)
    assert 1 <= sum(fits) < len(fits)
    assert "layouts fit" in explained(order, some)
    assert "nothing fits" in explained(ranked(plans, 1000), 1000)


def test_a_run_that_does_not_fit_is_refused_with_what_would(data: Path) -> None:
    big = planner(data, "model.num_blocks=4", "model.emb_size_edge=512", "model.emb_size_atom=64", "optim.batch_size=8")
    layout, combination = ParallelLayout(data=1), Combination()
    plan = big.plan(layout, combination, 8, 1)
    block = big.plan(layout, replace(combination, recompute="block"), 8, 1)
    assert block.needed < plan.needed
    with pytest.raises(ValueError, match=r"would not fit.*parallel.recompute=block needs") as error:
        settle(big, layout, combination, block.needed, lambda line: None)
    assert "\n" not in str(error.value)
    chosen, forecast = settle(big, layout, combination, plan.needed + 1, lambda line: None)
    assert chosen == combination
    assert forecast is not None
    assert "try next: parallel.recompute=" in out_of_memory(forecast, plan.foretold)
    assert "was not foretold" in out_of_memory(None, GIB)


def test_small_runs_are_not_traced(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = planner(data)
    monkeypatch.setattr(planning, "_trace", lambda *args: pytest.fail("traced"))
    assert surely_fits(small, ParallelLayout(), 10 * GIB)
    assert settle(small, ParallelLayout(), Combination(), 10 * GIB, lambda line: None)[1] is None


def test_the_coarse_bound_is_one(data: Path) -> None:
    for words in ([], ["model.emb_size_edge=512"], ["model.forces=conservative", "task.normalizer=auto"]):
        one = planner(data, *words)
        plan = one.plan(ParallelLayout(), Combination(forces=one.model.forces), 2, 1)
        assert not surely_fits(one, ParallelLayout(), plan.foretold)


@pytest.mark.parametrize(("margin", "expected"), [(1.2, "double_backward"), (0.999, "reverse_over_forward")])
def test_the_faster_second_order_that_fits_is_chosen(data: Path, margin: float, expected: str) -> None:
    one = planner(
        data,
        *("model.forces=conservative", "parallel.recompute=block", "model.num_blocks=4", "model.emb_size_edge=512"),
        "optim.batch_size=2",
    )
    auto = Combination(forces="conservative", recompute="block")
    ways = {
        way: one.plan(ParallelLayout(), replace(auto, second_order=way), 2, 1)  # type: ignore[arg-type]
        for way in ("double_backward", "reverse_over_forward")
    }
    double, reverse = ways["double_backward"], ways["reverse_over_forward"]
    assert reverse.needed < double.needed
    assert double.times.total < reverse.times.total
    said: list[str] = []
    chosen, _ = settle(one, ParallelLayout(), auto, int(double.needed * margin), said.append)
    assert chosen.second_order == expected
    assert said
    assert expected in said[0]


def test_most_memory_is_activations_and_is_told_by_layer(data: Path) -> None:
    wide = planner(data, "model.emb_size_edge=256", "optim.batch_size=8")
    peak = wide.plan(ParallelLayout(), Combination(), 8, 1).peak
    assert peak.kinds.most_common(1)[0][0] == ACTIVATIONS
    assert sum(peak.layers.values()) == peak.kinds[ACTIVATIONS]
    assert {"0 Embedding", "1 Block"} <= set(peak.layers)
    assert sum(peak.kinds.values()) == peak.alive


def test_plan_prints_one_json_object(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(data / "config.yaml", data, data / "run")
    arguments = ["plan", str(config), "optim.batch_size=1", "--machine", "cpu", "--gpu-memory", "4GiB"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][0]["fits"]
    assert found["plans"][0]["flops"] > 0
    assert main([*arguments, "--atoms", "20", "--cpu-memory", "8GiB"]) == 0
    printed = capsys.readouterr().out
    for word in ("optimizer states", "1 Block", "safety allowance", "layouts fit"):
        assert word in " ".join(printed.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "which configuration"),
        (["CONFIG", "--nodes", "0"], "--nodes is 0"),
        (["CONFIG", "--gpu-memory", "many"], "no amount of memory"),
        (["CONFIG", "--atoms", "3"], "at least 20"),
        (["CONFIG", "--machine", "CONFIG"], "no machine description"),
        (["CONFIG", "parallel.graph=3", "--gpus-per-node", "2"], "does not divide"),
    ],
)
def test_bad_input_is_one_line(data: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str) -> None:
    config = str(write_config(data / "config.yaml", data, data / "run"))
    assert main(["plan", *(config if word == "CONFIG" else word for word in words)]) != 0
    said = capsys.readouterr().err.strip()
    assert reason in said
    assert len(said.splitlines()) == 1


def test_train_refuses_what_does_not_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "config.yaml", data, tmp_path / "run"))
    monkeypatch.setattr("egnscale.launch.trainer.available_memory", lambda device: GIB // 8)
    words = ["train", config, "data.workers=0", "optim.max_steps=1", "--json"]
    assert main(words) == 1
    assert "would not fit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*words, "parallel.check_memory=false"]) == 0


def test_memory_that_runs_out_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "config.yaml", data, tmp_path / "run"))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("egnscale.launch.trainer.Trainer.run", fail)
    assert main(["train", config, "data.workers=0", "--json"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert "out of memory: this rank had" in said[-1]
    assert "try next" in said[-1]


def test_machines_are_measured_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egnscale.launch.bench_machine.SIZE", 64)
    file = tmp_path / "here.json"
    assert main(["bench", "machine", str(file), "--json"]) == 0
    machine = Machine.read(file)
    assert machine.name == "here"
    assert machine.rate(torch.float32) > 1e6
    assert "measured" in machine.source


def test_sizes() -> None:
    assert (read_size("80GiB"), read_size("1.5 GB"), read_size("1e3")) == (80 * GIB, 1_500_000_000, 1000)
    for text in ("-1GiB", "GiB", "3 apples", "nan"):
        with pytest.raises(ValueError, match="no amount of memory"):
            read_size(text)


def test_there_is_memory() -> None:
    assert available_memory(torch.device("cpu")) > 2**24


def test_model_sizes_do_not_matter_to_time_of_planning() -> None:
    """The largest preset is planned without its memory."""
    config = model_config("gemnet-2.5b")
    work = planning.workload([structures.slab()], config)
    traced = planning.trace(config, "s2ef", Combination(recompute="block"), "double_backward", work)
    assert sum(traced.parameters.values()) > 2.5e9


CONSERVATIVE = {"forces": "conservative"}
DIMENET = {
    "num_blocks": 3, "hidden_channels": 12, "out_emb_channels": 10, "int_emb_size": 6, "basis_emb_size": 4,
    "num_radial": 4, "num_spherical": 3, "cutoff": 4.0, "max_neighbors": 20,
}  # fmt: skip


@pytest.mark.parametrize("graph", [1, 2])
@pytest.mark.parametrize(
    "config", [GEMNET | {"num_blocks": 3}, GEMNET | CONSERVATIVE, DIMENET], ids=["direct", "conservative", "dimenet"]
)
def test_stages_do_together_what_a_model_does(data: Path, config: dict[str, Any], graph: int) -> None:
    """Every operation of a step is in one stage's trace, and besides the geometry that all stages but one make anew."""
    model = model_config(**config)
    planner = planner_of(data, model)
    layout = ParallelLayout(pipe=3, graph=graph)
    combination = Combination(forces=model.forces, pipe=3, zero=1)
    work = planner.workload(2, layout, 4)
    whole = planning.trace(model, "s2ef", combination, combination.chosen_second_order, work)
    bounds = planner.bounds(layout, combination, 2, 4)
    assert bounds[0] == 0
    assert bounds[-1] == model.num_blocks + 2
    stages = [planning._trace_stage(model, "s2ef", "none", "fp32", begin, end, work) for begin, end in pairwise(bounds)]
    anew = sum(stage.step.total.total_flops for stage in stages) - whole.step.total.total_flops
    assert anew % 2 == 0
    assert 0 < anew < 0.07 * whole.step.total.total_flops
    assert sum(sum(stage.parameters.values()) for stage in stages) == sum(whole.parameters.values())
    if graph > 1:  # positions are exchanged by each stage that makes its own geometry
        assert sum(stage.exchanges for stage in stages) >= whole.exchanges > 0
    assert all((stage.sent > 0) == (number < 2) for number, stage in enumerate(stages))


def test_a_pipeline_needs_less_memory_and_more_time_than_its_stages(data: Path) -> None:
    planner = planner_of(data, model_config(**(GEMNET | {"num_blocks": 7, "emb_size_edge": 256})))
    one = planner.plan(ParallelLayout(), Combination(zero=1), 2, 4)
    four = planner.plan(ParallelLayout(pipe=4), Combination(zero=1, pipe=4), 2, 4)
    states = (PARAMETERS, MASTERS, OPTIMIZER)
    assert sum(four.peak.kinds[kind] for kind in states) < 0.4 * sum(one.peak.kinds[kind] for kind in states)
    # The first stage has a quarter of the layers, and the activations of four micro-batches.
    assert 0.6 < four.peak.kinds[ACTIVATIONS] / one.peak.kinds[ACTIVATIONS] < 1.1
    # Four micro-batches through four stages: seven turns of a quarter at least.
    assert 7 / 16 < four.times.compute / one.times.compute < 1
    assert four.settings["parallel.pipe"] == 4


def planner_of(data: Path, model: Any) -> Planner:
    config = load_config(None, [f"data.train={data}/s2ef/train", "task.output=run", *WORDS])
    return Planner(config, model, MACHINES["h100"], planning.open_data(config.data.train))


WORDS = ["model.preset=gemnet-dt", "optim.batch_size=2", "optim.max_steps=3", "optim.lr_initial=1e-3"]
WORDS += ["optim.weight_decay=0", "optim.gradient_accumulation=4"]
