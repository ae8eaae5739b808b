"""One graph over several ranks: every verb is exact, and so are a model's energies, forces and gradients, in fp64.

Each world of P processes is started once and runs all checks; the tests look at what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import shared_graphs
import structures
import torch
from spawn import spawn
from torch import Tensor

from egnscale.data.batch import build_graph, cell_coordinates
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, GemNetT, build_model
from egnscale.models.graph import EdgeBuckets, LeavingEdges
from egnscale.models.scale_factors import fit_scale_factors
from egnscale.scaling import collectives, partition
from egnscale.scaling.partition import cut_by_edges, partition_by_owner

WORLDS = (1, 2, 3, 4)
TOLERANCE = 1e-10
SIZES = {
    "num_blocks": 2, "emb_size_atom": 8, "emb_size_edge": 12, "emb_size_trip": 6, "emb_size_bil_trip": 5,
    "num_radial": 8, "emb_size_rbf": 4, "emb_size_cbf": 4, "num_spherical": 3,
}  # fmt: skip
#: Wide atoms are projected before they are exchanged, narrow ones after.
WIDTHS = {"narrow atoms": {}, "wide atoms": {"emb_size_atom": 20}}


def cases() -> dict[str, list[Sample]]:
    return shared_graphs.cases() | {
        "large slab": [structures.slab(size=(14, 14, 5))],
        "fewer atoms than ranks": [structures.water(periodic=True)],
        "one atom and its images": [structures.crystal()],
    }


def whole_graph(samples: list[Sample]) -> ExtendedGraph:
    large = any(sample.num_atoms > 500 for sample in samples)
    graph = build_graph(samples, GraphSpec(3.0 if large else 4.0, 20), torch.float64)
    return replace(graph, leaving=LeavingEdges.build(graph.source, graph.reverse, graph.num_atoms))


def one_way(graph: ExtendedGraph) -> ExtendedGraph:
    """Two thirds of a graph's edges, so that many have no reverse edge."""
    kept = torch.randperm(graph.num_edges, generator=torch.Generator().manual_seed(1)) % 3 > 0
    row = torch.where(kept, torch.cumsum(kept, 0) - 1, -1)
    source, target = graph.source[kept], graph.target[kept]
    reverse = row[graph.reverse[kept]]
    return replace(
        graph, source=source, target=target, shift=graph.shift[kept], reverse=reverse,
        buckets=EdgeBuckets.build(torch.bincount(target, minlength=graph.num_atoms)),
        leaving=LeavingEdges.build(source, reverse, graph.num_atoms),
    )  # fmt: skip


def part_of(mesh: Any, samples: list[Sample]) -> ExtendedGraph:
    return shared_graphs.part_of(mesh, whole_graph(samples), samples)


def model(widths: str = "narrow atoms") -> GemNetT:
    torch.manual_seed(0)
    return build_model(**{**SIZES, **WIDTHS[widths]}, cutoff=4.0).double()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-3))


def largest_error(mesh: Any, samples: list[Sample], widths: str) -> float:
    return shared_graphs.largest_error(mesh, model(widths), whole_graph(samples), samples, floor=1e-3)


# The verbs


def verbs(graph: ExtendedGraph) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """(verb, number of its input rows)"""
    torch.manual_seed(5)
    narrower, wider = torch.randn(2, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    part = graph.partition
    return {
        "gather_sources": (lambda h: part.gather_sources(h).wait(), graph.num_atoms),
        "gather_sources, narrower": (lambda h: part.gather_sources(h, narrower).wait(), graph.num_atoms),
        "gather_sources, wider": (lambda h: part.gather_sources(h, wider).wait(), graph.num_atoms),
        "swap": (lambda x: part.swap(x).wait(), graph.num_edges),
        "to_targets": (lambda x: part.to_targets(x).wait(), len(graph.leaving.source)),
        "to_sources": (lambda x: part.to_sources(x).wait(), graph.num_edges),
        "aggregate": (part.aggregate, graph.num_edges),
        "total": (part.total, graph.num_atoms),
        "reduce": (lambda x: part.reduce(x.sum(0)), graph.num_edges),
    }


def check_verb(verb: Callable[[Tensor], Tensor], rows: int, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Errors of transpose, of the transpose's transpose, of the jvp and its gradient, and of second derivatives."""
    generator = torch.Generator().manual_seed(11 + rows)

    def random(like: Tensor | None = None) -> Tensor:
        shape = (rows, 3) if like is None else like.shape
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return total((a.detach() * b.detach()).sum())

    x = random()
    ax = verb(x)
    y = random(ax)
    (aty,) = torch.autograd.grad(ax, x, y, create_graph=True)
    (again,) = torch.autograd.grad(aty, y, x)
    found = {"transpose": abs(float(dot(ax, y) - dot(x, aty))), "twice": float((again - ax).norm())}

    t = random()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), t)
        tangent = torch.autograd.forward_ad.unpack_dual(verb(dual)).tangent
        (through_jvp,) = torch.autograd.grad(tangent, t, y)
    found |= {"jvp": float((tangent - verb(t)).norm()), "gradient of jvp": float((through_jvp - aty).norm())}

    # Second derivatives of sum(y A(x^2)^3), along a direction, against central differences of the gradient.
    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        return torch.autograd.grad((y.detach() * verb(x * x) ** 3).sum(), x, create_graph=create_graph)[0]

    direction = random().detach()
    (second,) = torch.autograd.grad(gradient(x, create_graph=True), x, direction)
    step = 1e-5
    ahead, behind = (gradient((x + s * direction).detach().requires_grad_()) for s in (step, -step))
    difference = (ahead - behind) / (2 * step)
    found["second derivative"] = float(total((second - difference).square().sum()).sqrt()) / (
        1 + float(total(second.square().sum()).sqrt())
    )
    return found


def definition_errors(mesh: Any, samples: list[Sample]) -> dict[str, float]:
    """Atom-shaped results against the whole graph's."""
    whole, graph = whole_graph(samples), part_of(mesh, samples)
    torch.manual_seed(2)
    h = torch.randn(whole.num_atoms, 3, dtype=torch.float64)
    mine = torch.arange(whole.num_atoms)[:, None].double()
    own = mesh_rows(mesh, samples)
    assert torch.equal(mesh.collect(mine[own], graph), mine)

    def by_atom(g: ExtendedGraph, h: Tensor) -> Tensor:
        """Goes through every verb: sources to edges, edges to their reverses, to their other end and back, to atoms."""
        x = g.partition.gather_sources(h).wait() * (1 + g.shift.square())
        x = g.partition.swap(x).wait() + x.square()
        assert g.leaving is not None
        x = x + g.partition.to_targets(h.index_select(0, g.leaving.source) * g.partition.to_sources(x).wait()).wait()
        return g.partition.aggregate(x) + g.partition.total(h).index_select(0, g.system)

    found = {"definition": error(mesh.collect(by_atom(graph, h[own]), graph), by_atom(whole, h))}

    def one_way_sums(g: ExtendedGraph, h: Tensor) -> Tensor:
        """Without `swap`, which edges without a reverse do not have."""
        assert g.leaving is not None
        x = g.partition.to_sources(g.partition.gather_sources(h).wait() + g.shift).wait()
        return g.partition.aggregate(g.partition.to_targets(x * h.index_select(0, g.leaving.source)).wait())

    directed = one_way(whole)
    part, own = partition_by_owner(directed, cell_coordinates(samples), mesh.layout.graph, mesh.graph_rank)
    part = mesh.place(part)
    assert int((part.reverse < 0).sum()) == int((directed.reverse < 0)[torch.isin(directed.target, own)].sum())
    found["one way"] = error(mesh.collect(one_way_sums(part, h[own]), part), one_way_sums(directed, h))
    return found


def mesh_rows(mesh: Any, samples: list[Sample]) -> Tensor:
    whole = whole_graph(samples)
    return partition_by_owner(whole, cell_coordinates(samples), mesh.layout.graph, mesh.graph_rank)[1]


# What a world does


def forget_the_halo(self: Any, h: Tensor, weight: Tensor | None = None) -> Any:
    """A verb whose backward leaves out what others owe: right values, wrong gradients."""
    h = h if weight is None else h @ weight.t()
    way = self.halo.post(h, self.group, "gather_sources")
    rows = torch.cat([h, way.wait().detach()]).index_select(0, self.own.source)
    return partition._Pending(lambda: rows)


def do_not_add_up(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """The backward of an all-reduce as some libraries have it."""
    return grad, None, None


def on_rank(world: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from egnscale.scaling.layout import Mesh

    mesh = Mesh.of_world(world.device, graph=world.size)

    def total(x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    found: dict[str, Any] = {"models": {}, "verbs": {}, "sizes": {}, "controls": {}}
    for name, samples in cases().items():
        for widths in WIDTHS if name != "large slab" else ["narrow atoms"]:
            found["models"][f"{name}, {widths}"] = largest_error(mesh, samples, widths)
        if world.size == 1:
            continue
        graph = part_of(mesh, samples)
        found["sizes"][name] = (graph.exchange.sizes, graph.exchange.edges)
        if name == "large slab":
            continue
        found["verbs"][name] = {verb: check_verb(*how, total) for verb, how in verbs(graph).items()}
        found["verbs"][name]["all"] = definition_errors(mesh, samples)
    mixed, slab = cases()["mixed batch"], cases()["small slab"]
    network = model()
    found["scale factors"] = fit_scale_factors(network, [part_of(mesh, mixed), part_of(mesh, slab)])
    if world.size > 1:
        kept = partition.OwnerPartition.gather_sources
        partition.OwnerPartition.gather_sources = forget_the_halo  # type: ignore[method-assign]
        found["controls"]["halo"] = largest_error(mesh, slab, "narrow atoms")
        partition.OwnerPartition.gather_sources = kept  # type: ignore[method-assign]
        kept_backward = collectives._Sum.backward
        collectives._Sum.backward = do_not_add_up  # type: ignore[assignment]
        found["controls"]["sum"] = largest_error(mesh, mixed, "narrow atoms")
        h = verbs(part_of(mesh, mixed))["total"]
        found["controls"]["transpose"] = check_verb(*h, total)["transpose"]
        collectives._Sum.backward = kept_backward  # type: ignore[method-assign]
        found["refusals"] = refusals(mesh, mixed)
    return found


def refusals(mesh: Any, samples: list[Sample]) -> dict[str, str]:
    """What ranks that disagree are told."""
    told = {}

    def message(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except ValueError as problem:
            told[name] = str(problem)

    other = samples if mesh.rank else [*samples[:-1], structures.slab(size=(2, 2, 4), seed=4)]
    message("batch", lambda: part_of(mesh, other))
    whole, where = whole_graph(samples), cell_coordinates(samples) * (1 if mesh.rank else -1)
    cut = partition_by_owner(whole, where, mesh.layout.graph, mesh.graph_rank)[0]
    message("cut", lambda: mesh.place(cut))
    graph = part_of(mesh, samples)
    dtype = torch.float64 if mesh.rank else torch.bfloat16
    message("dtype", lambda: graph.partition.swap(torch.ones(graph.num_edges, 7, dtype=dtype)).wait())
    message("width", lambda: graph.partition.total(torch.ones(graph.num_atoms, 8 + mesh.rank)))
    return told


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[dict[str, Any]]]:
    return {size: spawn(size, on_rank) for size in WORLDS}


@pytest.mark.parametrize("size", WORLDS)
def test_energies_forces_and_gradients_are_those_of_one_process(worlds: dict, size: int) -> None:
    for found in worlds[size]:
        assert {name: e for name, e in found["models"].items() if not e < TOLERANCE} == {}


@pytest.mark.parametrize("size", WORLDS[1:])
def test_verbs_are_exact(worlds: dict, size: int) -> None:
    for found in worlds[size]:
        for case, of_case in found["verbs"].items():
            for verb, errors in of_case.items():
                limits = {name: 1e-6 if name == "second derivative" else 1e-11 for name in errors}
                assert {n: e for n, e in errors.items() if not e < limits[n]} == {}, (case, verb)


@pytest.mark.parametrize("size", WORLDS[1:])
def test_cases_are_what_they_claim(worlds: dict, size: int) -> None:
    sizes = worlds[size][0]["sizes"]
    assert max(sizes["large slab"][0]) > 950 / size
    assert 0 in sizes["one atom and its images"][0]
    assert sum(sizes["isolated atoms"][1]) == 0
    assert min(sizes["isolated atoms"][0]) > 0, "atoms without edges are shared out as well"
    assert sum(sizes["nothing"][0]) == 0
    if size == 4:
        assert min(sizes["fewer atoms than ranks"][0]) == 0


@pytest.mark.parametrize("size", WORLDS[1:])
def test_wrong_backwards_are_noticed(worlds: dict, size: int) -> None:
    for found in worlds[size]:
        assert found["controls"]["halo"] > 1e-4
        assert found["controls"]["sum"] > 1e-4
        assert found["controls"]["transpose"] > 1e-4


@pytest.mark.parametrize("size", WORLDS)
def test_scale_factors_are_those_of_one_process(worlds: dict, size: int) -> None:
    network = model()
    graphs = [whole_graph(cases()[name]) for name in ("mixed batch", "small slab")]
    wanted = fit_scale_factors(network, graphs)
    for found in worlds[size]:
        assert found["scale factors"] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("size", WORLDS[1:])
def test_ranks_that_disagree_are_named(worlds: dict, size: int) -> None:
    for found in worlds[size]:
        told = found["refusals"]
        assert "disagree about the batch" in told["batch"]
        assert "disagree about the batch" in told["cut"]
        assert "rank 0: " in told["batch"]
        assert "rank 1: " in told["batch"]
        assert "bfloat16" in told["dtype"]
        assert "float64" in told["dtype"]
        assert "disagree about the rows of `total`" in told["width"]


def test_a_part_alone_says_what_is_missing() -> None:
    samples = cases()["small slab"]
    part, _ = partition_by_owner(whole_graph(samples), cell_coordinates(samples), 2, 0)
    with pytest.raises(ValueError, match=r"Mesh\.place"):
        model()(part)


# The cut


def test_parts_have_equal_numbers_of_edges() -> None:
    slab = structures.slab(size=(4, 4, 5))
    graph = build_graph([slab], GraphSpec(), torch.float64)
    edges = partition_by_owner(graph, cell_coordinates([slab]), 8, 0)[0].exchange.edges  # type: ignore[union-attr]
    assert max(edges) <= 1.06 * sum(edges) / 8
    slabs = [structures.slab(kind, size=(3, 3, layers)) for kind in ("fcc111", "fcc211") for layers in range(2, 6)] * 4
    graph = build_graph(slabs, GraphSpec(), torch.float64)
    edges = partition_by_owner(graph, cell_coordinates(slabs), 8, 0)[0].exchange.edges  # type: ignore[union-attr]
    assert len(slabs) == 32
    assert max(edges) <= 1.01 * sum(edges) / 8


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_every_atom_has_one_owner_and_systems_stay_together(parts: int) -> None:
    samples = cases()["mixed batch"]
    graph = whole_graph(samples)
    order, sizes = cut_by_edges(graph, cell_coordinates(samples), parts)
    assert torch.equal(order.sort().values, torch.arange(graph.num_atoms))
    assert len(sizes) == parts
    assert sum(sizes) == graph.num_atoms
    assert (graph.system[order].diff() >= 0).all()


@pytest.mark.parametrize("parts", range(1, 7))
def test_the_largest_part_is_as_small_as_it_can_be(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    for count in (1, 2, 5, 8):
        cost = torch.randint(0, 9, (count,), generator=generator)
        sizes = partition._even_cut(cost, parts)
        assert max(part.sum() for part in cost.split(sizes)) == _best_by_trying(cost.tolist(), parts)


def _best_by_trying(cost: list[int], parts: int) -> int:
    if parts == 1:
        return sum(cost)
    return min(max(sum(cost[:cut]), _best_by_trying(cost[cut:], parts - 1)) for cut in range(len(cost) + 1))


def test_no_part_holds_anothers_edges() -> None:
    samples = cases()["large slab"]
    graph = whole_graph(samples)
    parts = [partition_by_owner(graph, cell_coordinates(samples), 4, part)[0] for part in range(4)]
    assert sum(part.num_edges for part in parts) == graph.num_edges
    assert max(part.num_edges for part in parts) < 1.01 * graph.num_edges / 4
    for i, mine in enumerate(parts):
        for j, other in enumerate(parts):
            assert mine.exchange.halo.sent[j] == other.exchange.halo.received[i]  # type: ignore[union-attr]
            assert mine.exchange.cut.sent[j] == other.exchange.cut.received[i]  # type: ignore[union-attr]
