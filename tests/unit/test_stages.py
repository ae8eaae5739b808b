"""Cuts, messages and stages, in one process: stages behind each other are the model, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from small_models import BATCHES, conservative, gemnet, graph_for
from torch import Tensor

from egnscale.models import EGN, build_model, model_config
from egnscale.models.dual import dual_energies
from egnscale.models.graph import Triplets
from egnscale.models.stage import Stage, only_layers
from egnscale.scaling.packing import pack, read_entries, unpack, write_entries
from egnscale.scaling.stages import cut, imbalance


def test_cuts_are_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        layers = int(torch.randint(1, 9, (), generator=generator))
        weights = torch.randint(0, 9, (layers,), generator=generator).tolist()
        for stages in range(1, layers + 1):
            found = cut(weights, stages)
            assert found[0] == 0
            assert found[-1] == layers
            assert all(a < b for a, b in pairwise(found))

            def heaviest(bounds: Any, weights: list[int] = weights) -> int:
                return max(sum(weights[a:b]) for a, b in pairwise(bounds))

            every = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
            assert heaviest(found) == min(map(heaviest, every))
    assert cut([1, 1, 1, 1, 1, 1], 3) == [0, 2, 4, 6]
    assert imbalance([1, 1, 2], [0, 2, 3]) == 1.0
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        cut([1, 1], 3)


TENSORS = [
    torch.randn(3, 5, dtype=torch.float64),
    None,
    torch.randn(7).bfloat16(),
    torch.randn(0, 4),
    torch.arange(5),
    torch.tensor([True, False, True]),
    torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
]


def test_messages_keep_every_bit() -> None:
    flat, entries = pack(TENSORS)
    assert flat.dtype == torch.float32
    assert read_entries(write_entries(entries)) == entries
    for before, after in zip(TENSORS, unpack(flat, entries), strict=True):
        if before is None:
            assert after is None
            continue
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert after.view(torch.uint8).equal(before.view(torch.uint8)) if before.dim() else after.equal(before)
    assert len(pack([torch.empty(0, 3)])[0]) == 1, "something is sent where there is nothing"


def test_gradients_come_back_in_their_own_precision() -> None:
    made = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5).bfloat16(), torch.arange(2), torch.randn(2)]
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in made]
    flat, entries = pack(given)
    arrived = flat.detach().requires_grad_()
    double, half, _, unused = unpack(arrived, entries)
    seeds = torch.randn(4, 3, dtype=torch.float64) * 1e-200, torch.randn(5).bfloat16()
    torch.autograd.backward([double, half], seeds)
    assert arrived.grad is not None
    flat.backward(arrived.grad)
    assert given[0].grad.equal(seeds[0])
    assert given[1].grad.equal(seeds[1])
    assert given[2].grad is None
    assert not given[3].grad.any(), "what nobody used has a gradient of zero"
    assert unused is not None


def through_stages(model: Any, graph: Any, bounds: list[int]) -> Any:
    leaves = None
    for begin, end in pairwise(bounds):
        stage = Stage(model, begin, end)
        state = stage.state(graph, leaves)
        if stage.last:
            return stage.prediction(state, graph)
        flat, entries = pack(stage.leaves(state))
        leaves = unpack(flat, entries)
    raise AssertionError("no last stage")


def with_its_graph(name: str, batch: str) -> tuple[Any, Any]:
    if name == "gemnet":
        model: Any = gemnet(num_blocks=3)
        return model, graph_for(model, *BATCHES[batch]())
    torch.manual_seed(0)
    graph = graph_for(gemnet(cutoff=4.0), *BATCHES[batch]())
    return EGN(3, cutoff=4.0).double(), replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms))


@pytest.mark.parametrize("batch", ["molecules", "no edge", "no structure"])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 1, 5], [0, 2, 3, 5], [0, 1, 2, 3, 5]], ids=str)
@pytest.mark.parametrize("name", ["gemnet", "egn"])
def test_stages_are_the_model(name: str, bounds: list[int], batch: str) -> None:
    """Values and gradients are the same bits."""
    model, graph = with_its_graph(name, batch)
    found: list[list[Tensor]] = []
    for run in (model, lambda graph: through_stages(model, graph, bounds)):
        model.zero_grad()
        prediction = run(graph)
        (prediction.energy.sum() + prediction.forces.square().sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([prediction.energy, prediction.forces, *gradients])
    assert len(found[0]) == len(found[1]) > 10
    for one, two in zip(*found, strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("name", ["gemnet_t", "dimenetplusplus"])
def test_dual_stages_are_the_dual_model(name: str) -> None:
    model = conservative(name, num_blocks=3)
    graph = graph_for(model, *BATCHES["molecules"]())
    displacement = torch.randn(graph.positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = None
    for begin, end in pairwise([0, 2, 3, 5]):
        stage = Stage(model, begin, end)
        state = stage.dual_state(graph, displacement, leaves)
        if not stage.last:
            flat, entries = pack(stage.dual_leaves(state))
            leaves = unpack(flat, entries)
    found = stage.dual_energies(state, graph)
    for one, two in zip(found, dual_energies(model, graph, displacement), strict=True):
        assert torch.allclose(one, two, rtol=1e-13, atol=1e-13)


def test_a_stage_is_built_with_the_weights_of_the_whole_model() -> None:
    config = model_config(num_blocks=3, emb_size_atom=8, emb_size_edge=12, emb_size_trip=6, emb_size_bil_trip=5)
    torch.manual_seed(5)
    whole = dict(build_model(config).named_parameters())
    seen: set[str] = set()
    for begin, end in pairwise([0, 1, 3, 5]):
        torch.manual_seed(5)
        with only_layers(begin, end, 5):
            model = build_model(config)
        assert dict(model.named_parameters()).keys() == whole.keys()
        assert not any(buffer.is_meta for buffer in model.buffers())
        mine = {name for name, p in model.named_parameters() if not p.is_meta}
        assert not mine & seen
        seen |= mine
        for name, parameter in model.named_parameters():
            assert parameter.shape == whole[name].shape
            assert name not in mine or parameter.equal(whole[name])
    assert seen == whole.keys()
    torch.manual_seed(5)
    assert not any(p.is_meta for p in build_model(config).parameters()), "the hook is gone"


def test_stages_without_parameters_are_refused() -> None:
    model = gemnet(num_blocks=1)
    for begin, end in ((2, 3), (0, 4), (1, 1)):
        with pytest.raises(ValueError, match="are no stage"):
            Stage(model, begin, end)
