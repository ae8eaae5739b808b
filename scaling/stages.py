"""Where a list of layers is cut into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

#: What the heaviest stage is to have as little of as can be.
Cut = Literal["cost", "parameters", "uniform"]


def cut(weights: Sequence[float], stages: int) -> list[int]:
    """The cut whose heaviest stage is lightest; among equals, the one whose lighter stages are most alike.

    Args:
        weights: of each layer, in order; not negative.
        stages: each gets at least one layer.

    Returns:
        S + 1 numbers: stage s has layers found[s]..found[s + 1] - 1.

    Raises:
        ValueError: for more stages than layers.
    """
    layers = len(weights)
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers cannot be cut into {stages} stages")
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[l]: (heaviest stage, sum of squares, cut) of the first l layers, in as many stages as the loop has come to.
    best: list[tuple[float, float, list[int]]] = [(sums[l], sums[l] ** 2, [0, l]) for l in range(layers + 1)]
    for stage in range(2, stages + 1):
        found = []
        for l in range(layers + 1):
            if l < stage:
                found.append((float("inf"), float("inf"), [0]))
                continue
            options = []
            for begin in range(stage - 1, l):
                heaviest, squares, before = best[begin]
                own = sums[l] - sums[begin]
                options.append((max(heaviest, own), squares + own**2, [*before, l]))
            found.append(min(options, key=lambda one: one[:2]))
        best = found
    return best[layers][2]


def stage_bounds(weights: Sequence[float], stages: int) -> list[int]:
    """The cut of `[Embedding, Block, ..., Block, Readout]`, whose readout goes with the last block.

    Args:
        weights: of all layers.

    Raises:
        ValueError: for more stages than an embedding and each block can be.
    """
    *others, last, readout = weights
    most = len(others) + 1
    if stages > most:
        raise ValueError(
            f"parallel.pipe is {stages}, and a model of {most - 1} blocks can be cut into at most {most} stages: its "
            "embedding and each block; lower the number of stages"
        )
    bounds = cut([*others, last + readout], stages)
    return [*bounds[:-1], len(weights)]


def imbalance(weights: Sequence[float], bounds: Sequence[int]) -> float:
    """Heaviest over mean stage; 1 is perfect."""
    sums = [sum(weights[begin:end]) for begin, end in pairwise(bounds)]
    return max(sums) * len(sums) / sum(sums) if sum(sums) else 1.0
