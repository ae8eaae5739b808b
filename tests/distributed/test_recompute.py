"""Replays among ranks that share a graph: all in step, and every rank's gradients are the bits that it has without.

Each world of P processes is started once and runs all checks; the tests look at what it found.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import shared_graphs
import small_models
import structures
import torch
from kept import Made, kept_bytes
from spawn import spawn
from torch import Tensor

from egnscale.data.sample import Sample
from egnscale.models import AtomModel, ExtendedGraph, count_parameters
from egnscale.scaling import collectives
from egnscale.scaling.ds_config import complete_ds_config, read_ds_config
from egnscale.scaling.recompute import set_recompute

WORLDS = (2, 3)
HOWS = ("selective", "block")
SIZES: dict[str, Any] = {"cutoff": 4.5, "max_neighbors": 20}


def models() -> dict[str, AtomModel]:
    return {
        "gemnet": small_models.gemnet(**SIZES),
        "gemnet, wide atoms": small_models.gemnet(emb_size_atom=20, **SIZES),
        "gemnet, conservative": small_models.gemnet(forces="conservative", **SIZES),
        "dimenet": small_models.dimenet(**SIZES),
        "dimenet, energies": small_models.dimenet(forces="none", **SIZES),
    }


def part_of(mesh: Any, network: AtomModel, samples: list[Sample]) -> ExtendedGraph:
    return shared_graphs.part_of(mesh, small_models.graph_for(network, *samples), samples)


def gradients(network: AtomModel, graph: ExtendedGraph) -> dict[str, Tensor]:
    return shared_graphs.gradients(network, graph)[1]


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name in wanted if not torch.equal(found[name], wanted[name])]


def nothing_comes(flight: Any) -> Tensor:
    """Rows that have arrived, but in a replay nothing but zeros: what gradients are if ranks do not replay in step."""
    rows = ARRIVE(flight)
    return torch.zeros_like(rows) if flight.site.direction == "replay" else rows


ARRIVE = collectives._Flight.arrive


def on_rank(world: Any) -> dict[str, Any]:
    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)
    group = mesh.graph_group
    assert group is not None
    wrong: dict[str, list[str]] = {}
    sent: dict[str, Counter[str]] = {}
    for name, network in models().items():
        mesh.name_layers(network.layers)
        for case, samples in shared_graphs.cases().items():
            graph = part_of(mesh, network, samples)
            set_recompute(network, "none")
            wanted = gradients(network, graph)
            for how in HOWS:
                mesh.traffic()
                set_recompute(network, how, group)
                wrong[f"{name}, {case}, {how}"] = differing(gradients(network, graph), wanted)
                if case == "small slab":
                    of_blocks = sent[f"{name}, {how}"] = Counter()
                    for site, tally in mesh.traffic().items():
                        of_blocks[site.direction] += tally.calls if site.layer.endswith(" Block") else 0
    network = models()["gemnet"]
    graph = part_of(mesh, network, shared_graphs.cases()["small slab"])
    wanted = gradients(network, graph)
    set_recompute(network, "block", group)
    collectives._Flight.arrive = nothing_comes  # type: ignore[method-assign]
    control = differing(gradients(network, graph), wanted)
    collectives._Flight.arrive = ARRIVE  # type: ignore[method-assign]
    return {"wrong": wrong, "sent": sent, "control": control}


@pytest.mark.parametrize("size", WORLDS)
def test_gradients_are_the_same_bits(size: int) -> None:
    for found in spawn(size, on_rank):
        assert {name: names for name, names in found["wrong"].items() if names} == {}
        assert found["control"], "replays that receive nothing go unnoticed"
        for name, calls in found["sent"].items():
            derivatives = 2 if "conservative" in name or name.startswith("dimenet, block") else 1
            assert calls["replay"] == (derivatives * calls["forward"] if name.endswith("block") else 0), name


# ZeRO-3


def kept_under_zero3(world: Any) -> dict[str, tuple[float, float]]:
    """Bytes that are alive after the first forward, and those of activations, over the model's size."""
    from egnscale.scaling.engine import Engine

    found = {}
    for how in ("none", *HOWS):
        network = small_models.gemnet(emb_size_edge=128, emb_size_trip=32, **SIZES).float()
        graph = small_models.graph_for(network, structures.water(periodic=False)).to("cpu", torch.float32)
        set_recompute(network, how)  # type: ignore[arg-type]
        activations, size = kept_bytes(network, graph), 4 * count_parameters(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        config = complete_ds_config(
            read_ds_config("zero3"), zero=3, precision="fp32", gradient_accumulation=1, clip_grad_norm=None
        )
        engine = Engine(network, optimizer, config, world)
        with Made() as made:
            prediction = engine(graph)
        assert not any(parameter.numel() for parameter in network.parameters()), "DeepSpeed has put some back"
        found[how] = (sum(made.alive().values()) / size, activations / size)
        engine.backward(prediction.energy.sum() + prediction.forces.sum())
    return found


def test_no_parameters_are_kept_for_the_backward_pass() -> None:
    for found in spawn(2, kept_under_zero3):
        alive, activations = found.pop("none")
        assert alive - activations > 0.9, "autograd keeps those that ZeRO-3 has gathered"
        for how, (alive, activations) in found.items():
            assert alive - activations < 0.1, how
