"""The verbs of a graph on one rank, and the bucketed layout of its edges: linear maps and their exact transposes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import structures
import torch
from torch import Tensor

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.models import ExtendedGraph
from egnscale.models.graph import EdgeBuckets, segment_sum

Linear = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def graph() -> ExtendedGraph:
    samples = [structures.far_apart("O"), structures.slab(), structures.water(periodic=False), structures.crystal()]
    return build_graph(samples, GraphSpec(cutoff=3.0), torch.float64)


VERBS = ("gather_sources", "swap", "aggregate", "total")


def rows_in(verb: str, graph: ExtendedGraph) -> int:
    return graph.num_atoms if verb in ("gather_sources", "total") else graph.num_edges


def expected(verb: str, graph: ExtendedGraph, x: Tensor) -> Tensor:
    """The definition of each verb, row by row."""
    if verb == "gather_sources":
        return torch.stack([x[s] for s in graph.source.tolist()])
    if verb == "swap":
        return torch.stack([x[r] for r in graph.reverse.tolist()])
    index, rows = (graph.target, graph.num_atoms) if verb == "aggregate" else (graph.system, graph.num_systems)
    out = torch.zeros(rows, x.shape[1], dtype=x.dtype)
    for row, to in zip(x, index.tolist(), strict=True):
        out[to] += row
    return out


def apply(graph: ExtendedGraph, verb: str) -> Linear:
    def call(x: Tensor) -> Tensor:
        y = getattr(graph.partition, verb)(x)
        return y if isinstance(y, Tensor) else y.wait()

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_do_what_they_say(graph: ExtendedGraph, verb: str) -> None:
    x = torch.randn(rows_in(verb, graph), 2, dtype=torch.float64)
    torch.testing.assert_close(apply(graph, verb)(x), expected(verb, graph, x))


def test_sources_are_projected(graph: ExtendedGraph) -> None:
    h, weight = torch.randn(graph.num_atoms, 3).double(), torch.randn(2, 3).double()
    found = graph.partition.gather_sources(h, weight).wait()
    torch.testing.assert_close(found, h[graph.source] @ weight.t())


def assert_adjoint(apply: Linear, rows: int) -> None:
    """<A x, y> = <x, A' y> for A' = backward, <A x, y> again through backward of backward, and A x = jvp."""
    x = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    ax = apply(x)
    y = torch.randn_like(ax, requires_grad=True)
    (aty,) = torch.autograd.grad(ax, x, y, create_graph=True)
    torch.testing.assert_close((ax * y).sum(), (x * aty).sum(), rtol=1e-12, atol=1e-12)
    (again,) = torch.autograd.grad(aty, y, x)
    torch.testing.assert_close(again, ax, rtol=1e-12, atol=1e-12)
    _, tangent = torch.func.jvp(apply, (torch.zeros_like(x),), (x,))
    torch.testing.assert_close(tangent, ax, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("verb", VERBS)
def test_backward_of_a_verb_is_its_transpose(graph: ExtendedGraph, verb: str) -> None:
    assert_adjoint(apply(graph, verb), rows_in(verb, graph))


def test_a_wrong_transpose_is_noticed(graph: ExtendedGraph) -> None:
    with pytest.raises(AssertionError):
        assert_adjoint(lambda x: graph.partition.swap(x).wait() + (x - x.detach()), graph.num_edges)


def test_swap_leads_back_through_the_same_image(graph: ExtendedGraph) -> None:
    ends = torch.stack([graph.source, graph.target], dim=1)
    assert torch.equal(graph.partition.swap(ends).wait(), ends.flip(1))
    assert torch.equal(graph.partition.swap(graph.shift).wait(), -graph.shift)
    edges = torch.arange(graph.num_edges)
    assert torch.equal(graph.reverse[graph.reverse], edges)
    assert (graph.reverse != edges).all()


def test_number_of_triplets(graph: ExtendedGraph) -> None:
    same_target = graph.target[:, None] == graph.target[None, :]
    assert graph.num_triplets == int(same_target.sum()) - graph.num_edges > 0


def test_moving_a_graph_converts_floats_only(graph: ExtendedGraph) -> None:
    moved = graph.to("cpu", torch.float32)
    assert moved.positions.dtype == moved.shift.dtype == torch.float32
    assert torch.equal(moved.buckets.rows, graph.buckets.rows)
    assert moved.buckets.mask.dtype == torch.bool
    assert moved.buckets.shapes == graph.buckets.shapes
    assert graph.to("meta").partition.swap(torch.ones(graph.num_edges, 1, device="meta")).wait().is_meta


def test_half_precision_rows_are_summed_in_fp32() -> None:
    x, index = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.int64)
    assert segment_sum(x, index, 2).tolist() == [[1000.0], [0.0]]  # bf16 would stop at 256
    assert segment_sum(x, index, 2).dtype == torch.float32


# --- buckets ---

DEGREES = {
    "mixed": [3, 0, 8, 9, 1, 0, 41, 16, 17, 2],
    "even": [8, 8, 8],
    "one edge": [0, 1],
    "no edge": [0, 0],
    "no atom": [],
}


@pytest.fixture(params=DEGREES)
def degree(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(DEGREES[request.param], dtype=torch.int64)


def test_buckets_hold_each_atom_s_edges_side_by_side(degree: Tensor) -> None:
    buckets = EdgeBuckets.build(degree)
    target = torch.repeat_interleave(torch.arange(len(degree)), degree)
    edges = torch.arange(len(target))
    assert torch.equal(buckets.unpad(buckets.pad(edges)), edges)
    assert int(buckets.mask.sum()) == len(edges)
    for slots, mask in zip(buckets.split(buckets.slots), buckets.split(buckets.mask), strict=True):
        d = slots.shape[1]
        assert d % 8 == 0
        if len(slots):
            atoms = target[slots]
            assert torch.equal(atoms, atoms[:, :1].expand_as(atoms)), "a row of a bucket mixes atoms"
            assert torch.equal(mask.sum(1), degree[atoms[:, 0]])
            assert ((d - mask.sum(1) >= 0) & (d - mask.sum(1) < 8)).all()


def test_pad_and_unpad_are_transposes_where_padding_has_no_weight(degree: Tensor) -> None:
    buckets = EdgeBuckets.build(degree)
    mask = buckets.mask[:, None].double()
    assert_adjoint(lambda x: buckets.pad(x) * mask, int(degree.sum()))
    assert_adjoint(lambda x: buckets.unpad(x * mask), len(mask))
    if not buckets.mask.all():
        with pytest.raises(AssertionError):
            assert_adjoint(buckets.pad, int(degree.sum()))
