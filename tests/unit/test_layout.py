"""Layouts of ranks: who is where, who is together, and what is refused."""

from __future__ import annotations

import pytest

from egnscale.scaling.layout import ParallelLayout


def test_graph_ranks_are_consecutive() -> None:
    layout = ParallelLayout(pipe=2, data=2, graph=3)
    assert layout.graph_groups() == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]


def test_data_ranks_hold_the_same_part_of_other_graphs() -> None:
    layout = ParallelLayout(pipe=2, data=2, graph=3)
    assert layout.data_groups() == [(0, 3), (1, 4), (2, 5), (6, 9), (7, 10), (8, 11)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 4), (1, 4, 1), (2, 3, 4), (4, 1, 2)])
def test_every_rank_has_one_place(sizes: tuple[int, int, int]) -> None:
    layout = ParallelLayout(*sizes)
    places = [layout.place(rank) for rank in range(layout.size)]
    assert len(set(places)) == layout.size
    assert [layout.rank(*place) for place in places] == list(range(layout.size))
    for groups in (layout.graph_groups(), layout.data_groups()):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
    # Two ranks are together in at most one group of each axis.
    for rank in range(layout.size):
        (graph,) = (group for group in layout.graph_groups() if rank in group)
        (data,) = (group for group in layout.data_groups() if rank in group)
        assert set(graph) & set(data) == {rank}
    with pytest.raises(ValueError, match="no rank"):
        layout.place(layout.size)


def test_the_data_axis_is_what_remains() -> None:
    assert ParallelLayout.of_world(8, graph=4) == ParallelLayout(pipe=1, data=2, graph=4)
    assert ParallelLayout.of_world(12, graph=2, pipe=3) == ParallelLayout(pipe=3, data=2, graph=2)


@pytest.mark.parametrize(
    ("size", "graph", "pipe", "message"),
    [
        (
            16,
            3,
            1,
            r"pipe\(1\) x graph\(3\) = 3 does not divide 16 ranks; try parallel.graph=1 or 2, or start 18 ranks",
        ),
        (1, 2, 1, r"= 2 does not divide 1 rank; try parallel.graph=1, or start 2 ranks"),
        (8, 16, 1, r"= 16 does not divide 8 ranks; try parallel.graph=2 or 4 or 8, or start 16 ranks"),
        (12, 4, 2, r"= 8 does not divide 12 ranks; try parallel.graph=1 or 2 or 3, or start 16 ranks"),
        (5, 2, 2, r"= 4 does not divide 5 ranks; try another number of ranks, or start 8 ranks"),
        (4, 0, 1, r"parallel.graph is 0; it must be at least 1"),
    ],
)
def test_impossible_layouts_are_refused_with_a_way_out(size: int, graph: int, pipe: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelLayout.of_world(size, graph=graph, pipe=pipe)


def test_advice_can_be_followed() -> None:
    for size in range(1, 25):
        for graph in range(1, 13):
            try:
                ParallelLayout.of_world(size, graph=graph)
            except ValueError as problem:
                advice = str(problem).split("try parallel.graph=")[1].split(",")[0]
                for better in advice.split(" or "):
                    ParallelLayout.of_world(size, graph=int(better))


def test_the_table_shows_real_ranks() -> None:
    assert ParallelLayout(data=2, graph=4).table().splitlines() == [
        "pipe 1 x data 2 x graph 4 = 8 ranks",
        "          graph 0  graph 1  graph 2  graph 3",
        "  data 0        0        1        2        3",
        "  data 1        4        5        6        7",
    ]
    assert ParallelLayout(pipe=2, data=1, graph=2).table().splitlines() == [
        "pipe 2 x data 1 x graph 2 = 4 ranks",
        "                  graph 0  graph 1",
        "  pipe 0  data 0        0        1",
        "  pipe 1  data 0        2        3",
    ]
