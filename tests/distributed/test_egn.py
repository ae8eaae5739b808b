"""An EGN on ranks that share its graph, by either partition, gives what one process gives, second order included.

In fp64. The processes of each world size are started once and run everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import structures
import torch
import torch.distributed as dist
from ase.build import fcc111
from spawn import spawn
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import EGN, ExtendedGraph
from egnscale.models.graph import Triplets
from egnscale.scaling import all_reduce, partition
from egnscale.scaling.all_reduce import bytes_per_block, partition_by_triplets
from egnscale.scaling.collectives import GraphGroup, sum_over_parts
from egnscale.scaling.layout import Mesh, ParallelLayout
from egnscale.scaling.partition import Route, partition_by_owner

WORLDS = (1, 2, 3, 4)
PARTITIONS = ("owner", "all_reduce")
TOLERANCE = 1e-10
WIDTHS = {"node": 6, "edge": 7, "triplet": 5}


def large_slab() -> Sample:
    atoms = fcc111("Cu", (12, 12, 7), vacuum=8.0)
    atoms.rattle(0.05, seed=0)
    return Sample.from_atoms(atoms)


#: Name -> (structures, cutoff in A).
CASES: dict[str, tuple[Callable[[], list[Sample]], float]] = {
    "slab": (lambda: [structures.slab()], 4.0),
    "mixed": (
        lambda: [
            structures.far_apart("O", "H"),
            structures.slab("fcc211", size=(3, 1, 3), seed=1),
            structures.water(periodic=False),
            structures.crystal(),
        ],
        4.0,
    ),
    "fewer atoms than ranks": (lambda: [structures.water(periodic=True)], 5.5),
    "one atom": (lambda: [structures.crystal()], 4.0),
    "no edge": (lambda: [structures.far_apart("O", "H", "Cu"), structures.far_apart("N")], 4.0),
    "1,008 atoms": (lambda: [large_slab()], 3.0),
}
SMALL = [name for name in CASES if name != "1,008 atoms"]


def whole_graph(case: str) -> ExtendedGraph:
    make, cutoff = CASES[case]
    graph = build_graph(make(), GraphSpec(cutoff, max_neighbors=None), torch.float64)
    return replace(graph, triplets=Triplets.build(graph.target, graph.num_atoms))


def model_for(case: str) -> EGN:
    torch.manual_seed(0)
    widths = WIDTHS if case in SMALL else dict.fromkeys(WIDTHS, 3)
    return EGN(**widths, glob=4, num_radial=6, num_spherical=3, cutoff=CASES[case][1]).double()


def weights(graph: ExtendedGraph) -> tuple[Tensor, Tensor]:
    """(B,), (V, 1): those of a loss in which every structure and every atom counts differently."""
    generator = torch.Generator().manual_seed(0)
    sizes = (graph.num_systems,), (graph.num_atoms, 1)
    of_system, of_atom = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in sizes)
    return of_system, of_atom


def part_of(graph: ExtendedGraph, kind: str, mesh: Mesh) -> tuple[ExtendedGraph, Tensor]:
    """This rank's part, and the atoms that it holds."""
    group = mesh.graph_group
    assert group is not None
    if kind == "all_reduce":
        part, atoms = partition_by_triplets(graph, group.size, group.rank), torch.arange(graph.num_atoms)
    else:
        part, atoms = partition_by_owner(graph, graph.positions, group.size, group.rank)
    return mesh.place(part), atoms


def direct(model: EGN, graph: ExtendedGraph, of_system: Tensor, of_atom: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, forces along edges, and a loss of both."""
    energy, forces = model(graph)
    squares = graph.partition.total(of_atom * forces.square().sum(-1, keepdim=True))
    return energy, forces, (of_system * energy).sum() + squares.sum()


def conservative(model: EGN, graph: ExtendedGraph, of_system: Tensor, of_atom: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with forces -dE/dx: the loss's gradient is of second order."""
    positions = graph.positions.clone().requires_grad_()
    graph = replace(graph, positions=positions)
    energy, along_edges = model(graph)
    (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
    verbs = graph.partition
    # Every rank asked for the gradient of the same energy: it came as many times as there are ranks.
    if isinstance(verbs, all_reduce.AllReducePartition):
        gradient = sum_over_parts(gradient, verbs.group, "positions") / verbs.group.size
    elif isinstance(verbs, partition.OwnerPartition):
        gradient = gradient / verbs.group.size
    # Direct forces only so that every parameter has a part in the loss.
    squares = verbs.total(of_atom * (gradient.square() + along_edges.square()).sum(-1, keepdim=True))
    return energy, -gradient, (of_system * energy).sum() + squares.sum()


LOSSES = {"direct": direct, "conservative": conservative}


def results(case: str, loss_of: str, graph: ExtendedGraph, of_system: Tensor, of_atom: Tensor) -> dict[str, Tensor]:
    """Energies, forces, and the gradient of every parameter; the latter two as this process has them."""
    model = model_for(case)
    energy, forces, loss = LOSSES[loss_of](model, graph, of_system, of_atom)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)  # raises if a parameter has none
    return {"energy": energy.detach(), "forces": forces.detach(), **dict(zip(names, gradients, strict=True))}


# --- on the ranks ---


def mesh_of(world: Any) -> Mesh:
    if world.size > 1:
        return Mesh.of_world(world.device, graph=world.size)
    # One rank would have whole graphs; here it is a group of one, to run the same code.
    group = GraphGroup((0,), 0, dist.new_group([0]), dist.new_group([0], backend="gloo"))
    return Mesh(ParallelLayout(), 0, world.device, None, group)


def on_rank(mesh: Mesh, case: str, kind: str, loss_of: str) -> dict[str, Tensor]:
    graph = whole_graph(case)
    of_system, of_atom = weights(graph)
    part, atoms = part_of(graph, kind, mesh)
    found = results(case, loss_of, part, of_system, of_atom[atoms])
    return {**found, "forces": mesh.collect(found["forces"], part), "held": torch.tensor(part.num_atoms)}


@contextmanager
def wrong_backward(kind: str) -> Iterator[None]:
    """Forward as it was; backward without the all-reduce, or without what flows back from the halo."""

    def sum_without_transpose(x: Tensor, group: GraphGroup, verb: str) -> Tensor:
        return x + (sum_over_parts(x.detach(), group, verb) - x.detach())

    post = Route.post
    if kind == "all_reduce":
        change = mock.patch.object(all_reduce, "sum_over_parts", sum_without_transpose)
    else:
        change = mock.patch.object(Route, "post", lambda way, x, *args: post(way, x.detach(), *args))
    with change:
        yield


def adjoint(mesh: Mesh) -> dict[str, tuple[float, float, float]]:
    """For each verb <A x, y>, <x, A' y> and <A'' x, y>, summed over ranks whose x and y differ; A'' is by jvp."""
    graph = whole_graph("mixed")
    part, _ = part_of(graph, "all_reduce", mesh)
    assert part.triplets is not None
    rows = {
        "gather_sources": part.num_atoms,
        "swap": part.num_edges,
        "aggregate_triplets": len(part.triplets.sender),
        "aggregate": part.num_edges,
        "total": part.num_atoms,
        "reduce": 1,
    }
    found = {}
    for verb, count in rows.items():

        def apply(x: Tensor, verb: str = verb) -> Tensor:
            y = getattr(part.partition, verb)(x)
            return y if isinstance(y, Tensor) else y.wait()

        torch.manual_seed(mesh.rank)
        x = torch.randn(count, 2, dtype=torch.float64, requires_grad=True)
        ax = apply(x)
        y = torch.randn_like(ax, requires_grad=True)
        (aty,) = torch.autograd.grad(ax, x, y, create_graph=True)
        (again,) = torch.autograd.grad(aty, y, x)
        torch.testing.assert_close(again, ax, rtol=1e-12, atol=1e-12)
        _, tangent = torch.func.jvp(apply, (torch.zeros_like(x),), (x.detach(),))
        products = torch.stack([(ax * y).sum(), (x * aty).sum(), (tangent * y).sum()]).detach()
        dist.all_reduce(products)
        found[verb] = tuple(products.tolist())
    return found


def traffic(mesh: Mesh, kind: str) -> dict[tuple[str, str], int]:
    """{(verb, direction): bytes that this rank sent} of the second block, in a training step."""
    graph, group = whole_graph("mixed"), mesh.graph_group
    assert group is not None
    of_system, of_atom = weights(graph)
    part, atoms = part_of(graph, kind, mesh)
    model = model_for("mixed")
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: setattr(group.traffic, "layer", str(number)))
    group.traffic.read()
    direct(model, part, of_system, of_atom[atoms])[-1].backward()
    return {
        (site.verb, site.direction): tally.bytes for site, tally in group.traffic.read().items() if site.layer == "2"
    }


def reduced(mesh: Mesh, kind: str) -> tuple[int, int]:
    """Atoms and edges of the graph, as a model would count them."""
    part, _ = part_of(whole_graph("mixed"), kind, mesh)
    atoms, edges = part.partition.reduce(torch.tensor([part.num_atoms, part.num_edges])).tolist()
    return atoms, edges


def other_batch(mesh: Mesh, kind: str) -> str:
    """What is said where the last rank holds another batch."""
    assert mesh.graph_group is not None
    last = mesh.graph_group.rank == mesh.graph_group.size - 1
    try:
        part_of(whole_graph("slab" if last else "mixed"), kind, mesh)
    except ValueError as error:
        return str(error)
    return ""


def everything(world: Any) -> dict:
    mesh = mesh_of(world)
    found: dict = {}
    for kind in PARTITIONS:
        found[kind, "reduced"] = reduced(mesh, kind)
        found[kind, "other batch"] = other_batch(mesh, kind)
        for case in CASES:
            found[kind, case, "direct"] = on_rank(mesh, case, kind, "direct")
        for case in SMALL:
            found[kind, case, "conservative"] = on_rank(mesh, case, kind, "conservative")
        with wrong_backward(kind):
            found[kind, "slab", "wrong"] = on_rank(mesh, "slab", kind, "direct")
        found[kind, "traffic"] = traffic(mesh, kind)
    found["adjoint"] = adjoint(mesh)
    return found


# --- here ---


@pytest.fixture(scope="module", params=WORLDS, ids=lambda size: f"{size} ranks")
def found(request: pytest.FixtureRequest) -> list[dict]:
    """What each rank found."""
    return spawn(request.param, everything)


@pytest.fixture(scope="module")
def wanted() -> Callable[[str, str], dict[str, Tensor]]:
    known: dict[tuple[str, str], dict[str, Tensor]] = {}

    def of(case: str, loss_of: str) -> dict[str, Tensor]:
        if (case, loss_of) not in known:
            graph = whole_graph(case)
            known[case, loss_of] = results(case, loss_of, graph, *weights(graph))
        return known[case, loss_of]

    return of


def differences(ranks: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative: energies and forces of the worst rank, and the mean over ranks of each parameter's gradient."""
    found = {}
    for name, value in wanted.items():
        theirs = torch.stack([rank[name] for rank in ranks])
        candidates = theirs if name in ("energy", "forces") else theirs.mean(0, keepdim=True)
        worst = max(float((candidate - value).norm()) for candidate in candidates)
        found[name] = worst / max(float(value.norm()), 1e-5)  # forces on an atom among its images vanish
    return found


WHICH = [("direct", case) for case in CASES] + [("conservative", case) for case in SMALL]


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("loss_of, case", WHICH, ids=[f"{case}, {loss_of}" for loss_of, case in WHICH])
def test_parts_give_what_the_whole_gives(found: list[dict], wanted: Any, kind: str, loss_of: str, case: str) -> None:
    ranks = [rank[kind, case, loss_of] for rank in found]
    found_differences = differences(ranks, wanted(case, loss_of))
    assert max(found_differences.values()) < TOLERANCE, found_differences
    if kind == "owner" and case == "one atom":
        assert sorted(int(rank["held"]) for rank in ranks) == [0] * (len(found) - 1) + [1], "some own nothing"


@pytest.mark.parametrize("kind", PARTITIONS)
def test_control_a_wrong_backward_is_noticed(found: list[dict], wanted: Any, kind: str) -> None:
    ranks = [rank[kind, "slab", "wrong"] for rank in found]
    of_all = differences(ranks, wanted("slab", "direct"))
    assert max(of_all.pop("energy"), of_all.pop("forces")) < TOLERANCE, "forward is what it was"
    if len(found) > 1:
        assert max(of_all.values()) > 1e-3
    else:
        assert max(of_all.values()) < TOLERANCE, "there is nobody to forget"


def test_backward_of_an_all_reduce_verb_is_its_transpose(found: list[dict]) -> None:
    for verb, (forward, backward, tangent) in found[0]["adjoint"].items():
        assert forward != 0, verb
        assert backward == pytest.approx(forward, rel=1e-11), verb
        assert tangent == pytest.approx(forward, rel=1e-11), verb


@pytest.mark.parametrize("kind", PARTITIONS)
def test_reduce_sums_over_the_graph_what_each_holds(found: list[dict], kind: str) -> None:
    graph = whole_graph("mixed")
    assert all(rank[kind, "reduced"] == (graph.num_atoms, graph.num_edges) for rank in found)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_ranks_with_different_batches_are_told(found: list[dict], kind: str) -> None:
    for rank in found:
        assert ("disagree about the batch" in rank[kind, "other batch"]) == (len(found) > 1)


def test_bytes_of_a_block_are_those_predicted(found: list[dict]) -> None:
    graph = whole_graph("mixed")
    predicted = bytes_per_block(graph, len(found), **WIDTHS, dtype=torch.float64)
    assert min(predicted.values()) > 0 or len(found) == 1
    for rank in found:
        counted = rank["all_reduce", "traffic"]
        assert counted == {(verb, way): sent for verb, sent in predicted.items() for way in ("forward", "backward")}


def test_owners_send_less(found: list[dict]) -> None:
    of_owners, of_all_reduce = (max(sum(rank[kind, "traffic"].values()) for rank in found) for kind in PARTITIONS)
    assert of_owners < of_all_reduce or len(found) == 1
