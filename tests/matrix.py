"""Many cases of one distributed test: which of them run by default, and ranks that are started once for many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, Protocol

import pytest
from spawn import spawn

#: Cases that ranks are started for at a time.
BATCH = 30


class Case(Protocol):
    """A named tuple."""

    @property
    def name(self) -> str: ...

    @property
    def ranks(self) -> int: ...

    @property
    def choices(self) -> tuple:
        """The values of which every two are to meet."""
        ...


def covering(cases: Sequence[Any]) -> list[Any]:
    """Some of the cases, in which every two values of `choices` that meet in any meet in one."""

    def meetings(case: Any) -> set[tuple]:
        return set(combinations(enumerate(case.choices), 2))

    missing: set[tuple] = set().union(*map(meetings, cases))
    chosen: list[Any] = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & meetings(case))))
        missing -= meetings(chosen[-1])
    return chosen


def marked(cases: Sequence[Any], quick: Iterable[Any]) -> list[Any]:
    """As parameters of a test; those that are not quick for `make test-all`."""
    quick = set(quick)
    return [pytest.param(case, id=case.name, marks=() if case in quick else pytest.mark.full) for case in cases]


def measured_together(
    request: pytest.FixtureRequest, measure: Callable[..., list[Any]], *, seconds: float = 180
) -> Callable[[Any], Any]:
    """What a case gives, measured along with all others of its world that were selected.

    Args:
        measure: `measure(world, cases)` in each rank, with what each case gives; rank 0's counts.
        seconds: that a case may take, on a machine with fewer cores than ranks.
    """
    selected = [item.callspec.params["case"] for item in request.session.items if item.fspath == request.path]
    kept: dict[Any, Any] = {}

    def find(case: Any) -> Any:
        if case not in kept:
            others = [one for one in selected if one.ranks == case.ranks and one not in kept]
            batch = [case, *(one for one in others if one != case)][:BATCH]
            try:
                kept.update(zip(batch, spawn(case.ranks, measure, batch, timeout=seconds * len(batch))[0], strict=True))
            except AssertionError as error:
                kept.update(dict.fromkeys(batch, error))
        if isinstance(kept[case], AssertionError):
            raise kept[case]
        return kept[case]

    return find


def difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative one."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
