"""Making activations again gives the same bits, and keeps as little as it promises."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from kept import kept_bytes, saved_bytes
from small_models import BATCHES, dimenet, gemnet, graph_for
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointError
from toy import make_dataset, write_config

from egnscale.data.batch import build_graph, cell_coordinates
from egnscale.data.neighbors import GraphSpec
from egnscale.launch.cli import main
from egnscale.launch.loading import graph_spec
from egnscale.launch.run_files import WEIGHTS
from egnscale.launch.weights import read_weights
from egnscale.models import EGN, ExtendedGraph, build_model
from egnscale.models.graph import Triplets
from egnscale.models.layered import call
from egnscale.models.layers import Dense
from egnscale.models.remake import cheap, remaking
from egnscale.models.scale_factors import fit_scale_factors
from egnscale.scaling.checkpoint import find_checkpoint
from egnscale.scaling.collectives import CountedGroup
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.partition import partition_by_owner
from egnscale.scaling.recompute import set_recompute

HOWS = ("selective", "block")
MODELS: dict[str, Callable[[], Any]] = {
    "gemnet": gemnet,
    "gemnet, harmonic": lambda: gemnet(triplet_form="harmonic"),
    "gemnet, energies": lambda: gemnet(forces="none"),
    "gemnet, conservative": lambda: gemnet(forces="conservative"),
    "dimenet": dimenet,
    "dimenet, energies": lambda: dimenet(forces="none"),
}


def gradients(model: nn.Module, graph: ExtendedGraph) -> dict[str, Tensor]:
    """Energies, forces, and gradients of something that weighs them all."""
    prediction = model(graph)
    outputs = {name: x for name, x in prediction._asdict().items() if x is not None}
    generator = torch.Generator().manual_seed(0)
    loss = sum((torch.rand(x.shape, dtype=x.dtype, generator=generator) * (x + x**2)).sum() for x in outputs.values())
    model.zero_grad()
    loss.backward()
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


# The same bits


@pytest.mark.parametrize("batch", ["slabs", "isolated atoms beside others", "no edge", "no structure"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name: str, batch: str) -> None:
    model = MODELS[name]()
    graph = graph_for(model, *BATCHES[batch]())
    wanted = gradients(model, graph)
    for how in HOWS:
        set_recompute(model, how)
        assert differing(gradients(model, graph), wanted) == [], how
    set_recompute(model, "none")
    assert differing(gradients(model, graph), wanted) == []


def test_those_of_a_model_with_four_levels_too() -> None:
    torch.manual_seed(0)
    model = EGN(node=6, edge=7, triplet=5, glob=4, cutoff=4.0).double()
    graph = build_graph([structures.slab()], GraphSpec(4.0, None), torch.float64)
    graph = replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms))
    wanted = gradients(model, graph)
    for how in HOWS:
        set_recompute(model, how)
        assert differing(gradients(model, graph), wanted) == [], how


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_lower_precisions_too(precision: torch.dtype, how: str) -> None:
    model = gemnet().to(precision)
    graph = graph_for(model, structures.slab()).to("cpu", torch.float32)
    wanted = gradients(model, graph)
    set_recompute(model, how)
    assert differing(gradients(model, graph), wanted) == []


@pytest.mark.parametrize("how", HOWS)
def test_a_graph_can_be_gone_through_twice(how: str) -> None:
    model = gemnet()
    graph = graph_for(model, structures.slab())
    set_recompute(model, how)
    energy = model(graph).energy.sum()
    parameters = [p for name, p in model.named_parameters() if "force" not in name]
    first = torch.autograd.grad(energy, parameters, retain_graph=True)
    second = torch.autograd.grad(energy, parameters)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_a_derivative_along_a_direction(how: str) -> None:
    """Reverse over forward, with the dual numbers inside what is run: only plain tensors go in and come out."""

    class Dual(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
            with forward_ad.dual_level():
                made = forward_ad.unpack_dual(self.layer(forward_ad.make_dual(x, tangent)))
            return made.primal, made.tangent

    torch.manual_seed(0)
    layers = [Dual(nn.Sequential(*(Dense(6, 6, activation=True) for _ in range(3))).double()) for _ in range(2)]
    model = Model([*layers, nn.Identity()])
    x, direction = torch.randn(2, 9, 6, dtype=torch.float64)

    def found() -> tuple[Tensor, ...]:
        pair = (x, direction)
        for layer in layers:
            pair = model.run(layer, layer, *pair)
        return torch.autograd.grad(pair[0].sum() + pair[1].square().sum(), list(model.parameters()))

    wanted = found()
    set_recompute(model, how)
    assert all(map(torch.equal, found(), wanted))


# Controls


class Model(nn.Module):
    """Any layers, run as models run theirs."""

    remaking = staticmethod(remaking)

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = call


class SideEffect(nn.Module):
    """Gives something else each time that it is called: the replay is not what forward was."""

    def __init__(self, *, shape: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls, self.shape = 0, shape

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return ((x[self.calls :] if self.shape else x * self.calls) * self.weight).exp()


def test_a_layer_that_changes_its_shape_is_noticed() -> None:
    layer = SideEffect(shape=True)
    model = Model([layer])
    set_recompute(model, "block")
    loss = model.run(layer, layer, torch.ones(9, 3)).sum()
    with pytest.raises(CheckpointError, match="different metadata"):
        loss.backward()


def test_control_a_layer_that_changes_its_values_has_other_gradients() -> None:
    """What the comparisons above would show."""

    def gradient(how: str) -> Tensor:
        layer = SideEffect(shape=False)
        model = Model([layer])
        set_recompute(model, how)
        return torch.autograd.grad(model.run(layer, layer, torch.ones(9, 3)).sum(), layer.weight)[0]

    assert torch.equal(gradient("selective"), gradient("none"))
    assert not torch.equal(gradient("block"), gradient("none"))


def test_control_what_is_called_cheap_and_is_not_the_same_again_has_other_gradients() -> None:
    calls = []

    def impure(x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    x = torch.ones(3, requires_grad=True)
    with remaking():
        loss = cheap(impure, x).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert len(calls) == 2
    assert torch.equal(gradient, torch.full((3,), 4.0)), "2 (1 x) from forward, of what is now 2 x"


def test_views_of_what_is_made_again_are_made_again() -> None:
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    made = []

    def doubled(x: Tensor) -> Tensor:
        made.append(1)
        return 2 * x

    with remaking():
        y = cheap(doubled, x).t()[1:]
        loss = (y * y.detach()).sum() + cheap(torch.Tensor.sin, y).square().sum()
    assert len(made) == 1
    (gradient,) = torch.autograd.grad(loss, x)
    assert len(made) > 1
    y = 2 * x.detach()
    wanted = 2 * (y + 2 * y.sin() * y.cos())
    wanted[:, 0] = 0
    torch.testing.assert_close(gradient, wanted)


def test_an_input_given_back_is_kept() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    with remaking():
        same = cheap(lambda y: y, y)
        (gradient,) = torch.autograd.grad((same * same).sum(), x)
    assert torch.equal(gradient, torch.full((3,), 8.0))


# Where nothing is made again


def calls_of(model: Any, graph: ExtendedGraph) -> Counter[str]:
    calls: Counter[str] = Counter()
    hooks = [
        layer.register_forward_hook(lambda layer, *_: calls.update([type(layer).__name__])) for layer in model.layers
    ]
    prediction = model(graph)
    if torch.is_grad_enabled():
        sum(x.sum() for x in prediction if x is not None).backward()
    for hook in hooks:
        hook.remove()
    return calls


def test_every_layer_but_the_last_is_run_again() -> None:
    model = gemnet()
    graph = graph_for(model, structures.slab())
    set_recompute(model, "block")
    assert calls_of(model, graph) == {"Embedding": 2, "Block": 4, "Readout": 1}
    set_recompute(model, "selective")
    assert calls_of(model, graph) == {"Embedding": 1, "Block": 2, "Readout": 1}


def test_two_derivatives_run_it_twice_more() -> None:
    model = gemnet(forces="conservative")
    set_recompute(model, "block")
    assert calls_of(model, graph_for(model, structures.slab())) == {"Embedding": 3, "Block": 6}


@pytest.mark.parametrize("how", HOWS)
def test_without_gradients_nothing_is(how: str) -> None:
    model = gemnet()
    graph = graph_for(model, structures.slab())
    set_recompute(model, how)
    with torch.no_grad():
        assert calls_of(model, graph) == {"Embedding": 1, "Block": 2, "Readout": 1}


@pytest.mark.parametrize("how", HOWS)
def test_scale_factors_are_the_same(how: str) -> None:
    model, other = gemnet(fitted=False), gemnet(fitted=False)
    graphs = [graph_for(model, structures.slab())]
    set_recompute(other, how)
    assert fit_scale_factors(model, graphs) == fit_scale_factors(other, graphs)


# How much is kept


def kept_of(preset: str, **hyperparameters: Any) -> dict[str, float]:
    """Of a slab of 82 atoms, at the model's full sizes; over what `none` keeps."""
    with torch.device("meta"):
        model = build_model(preset, **hyperparameters)
    graph = build_graph([structures.slab(size=(4, 4, 5))], graph_spec(model.config)).to("meta")
    found = {}
    for how in ("none", *HOWS):
        set_recompute(model, how)
        found[how] = kept_bytes(model, graph)
    set_recompute(model, "none")
    seen_by_hooks = saved_bytes(model, graph)
    if model.config.forces != "conservative":  # elsewhere gradients are kept as well, and are no saved tensors
        assert found["none"] == pytest.approx(seen_by_hooks, rel=0.02)
    return {how: size / found["none"] for how, size in found.items()}


def test_what_gemnet_xl_keeps() -> None:
    kept = kept_of("gemnet-xl")
    assert kept["block"] <= 1 / 20
    assert kept["selective"] <= 0.7


@pytest.mark.parametrize(
    ("preset", "hyperparameters", "selective", "block"),
    [
        ("gemnet-dt", {}, 0.75, 0.1),
        ("gemnet-960m", {}, 0.7, 0.05),
        ("dimenet++-xl", {"forces": "none"}, 0.9, 0.15),
    ],
)
def test_what_others_keep(preset: str, hyperparameters: dict, selective: float, block: float) -> None:
    kept = kept_of(preset, **hyperparameters)
    assert kept["selective"] <= selective
    assert kept["block"] <= block


def test_conservative_models_keep_the_graph_of_their_forces() -> None:
    """What the first derivative makes again is kept for the second: `block` gives little back, as is documented."""
    kept = kept_of("gemnet-dt", forces="conservative")
    assert 0.5 < kept["block"] < 1


# Exchanges


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_replayed_exchanges_are_counted_as_such(forces: str) -> None:
    def exchanged(how: str) -> dict[tuple[str, str], Counter[str]]:
        with torch.device("meta"):
            model = build_model("gemnet-dt", forces=forces)
        samples = [structures.slab(size=(4, 4, 5))]
        whole = build_graph(samples, GraphSpec())
        part, _ = partition_by_owner(whole, cell_coordinates(samples), 2, 0)
        group = CountedGroup(2, 0)
        set_recompute(model, how, group)
        group.traffic.name_layers(model.layers)
        calls_of(model, replace(part, exchange=part.exchange.join(group)).to("meta"))  # type: ignore[union-attr]
        found: dict[tuple[str, str], Counter[str]] = {}
        for site, tally in group.traffic.read().items():
            found.setdefault((site.layer, site.verb), Counter())[site.direction] += tally.bytes
        return found

    plain, selective, block = map(exchanged, ("none", *HOWS))
    assert selective == plain
    replays = 1 if forces == "direct" else 2
    for (layer, verb), sent in plain.items():
        replayed = {"replay": replays * sent["forward"]} if "Readout" not in layer and layer else {}
        assert block[layer, verb] == sent | replayed, (layer, verb)


# The run


def test_training_is_the_same_bits(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    found = {}
    for how in ("none", *HOWS):
        run = tmp_path / how
        words = [f"parallel.recompute={how}", "data.workers=0"]
        assert main(["train", str(write_config(tmp_path / f"{how}.yaml", data, run)), *words]) == 0
        with (run / "log.csv").open() as file:
            log = [{key: row[key] for key in ("step", "loss", "lr")} for row in csv.DictReader(file)]
        found[how] = (log, read_weights(find_checkpoint(run / "checkpoints") / WEIGHTS))
    for how in HOWS:
        assert found[how][0] == found["none"][0]
        assert differing(found[how][1], found["none"][1]) == []


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute is 'all'; choose none, selective, block"):
        set_recompute(gemnet(), "all")  # type: ignore[arg-type]
    config = read_ds_config("zero1") | {"activation_checkpointing": {"partition_activations": True}}
    with pytest.raises(ValueError, match=r"'activation_checkpointing', but .*parallel\.recompute.*remove it"):
        complete_ds_config(config, zero=1, precision="fp32", gradient_accumulation=1, clip_grad_norm=None)
