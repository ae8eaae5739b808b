"""Fit the scale factors of a model, in-process.

Each factor makes the variance of what it scales equal to that of its reference. Factors are fitted in the order of
execution, each with its predecessors in force. Because a model is a list of layers, only the layer at hand is run again
for each of its factors, on the states kept from the layer before: the whole fit costs about as much as three passes.
In a pipeline (`egnscale.launch.pipelining`), stages are fitted in turn, which takes a pass for each besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from egnscale.models.graph import ExtendedGraph, GraphPartition
from egnscale.models.layered import call, inside, modules_by_name
from egnscale.models.layers import ScaleFactor


def unfitted(model: nn.Module) -> list[str]:
    """Names of the scale factors that are not fitted."""
    return [name for name, module in modules_by_name(model) if isinstance(module, ScaleFactor) and not module.fitted]


@torch.no_grad()
def fit_scale_factors(
    model: nn.Module,
    graphs: Sequence[ExtendedGraph],
    reduce: Callable[[Tensor], Tensor] = lambda moments: moments,
) -> dict[str, float]:
    """Fit every scale factor of `model.layers` on a few batches; returns {name: value}.

    Args:
        graphs: this process's batches.
        reduce: sums moments (2,) over processes that hold other batches; those that share a graph need no other sum.

    Raises:
        ValueError: if a variance is zero or not finite, naming the factor.
    """
    return fit_layers(model, model.layers, [(graph,) for graph in graphs], reduce)  # type: ignore[arg-type]


@torch.no_grad()
def fit_layers(
    model: nn.Module, layers: Sequence[nn.Module], inputs: Sequence[tuple], reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The same for some layers in a row, given what the first of them takes of each batch."""
    names = {module: name for name, module in modules_by_name(model)}
    factors: dict[str, float] = {}
    for layer in layers:
        for factor in _in_execution_order(layer, inputs[0]):
            factors[names[factor]] = _fit(factor, names[factor], layer, inputs, reduce)
        inputs = [(call(layer, inside(layer), *args), args[-1]) for args in inputs]
    return factors


def _in_execution_order(layer: nn.Module, args: tuple) -> list[ScaleFactor]:
    order: list[ScaleFactor] = []
    sites = [module for module in inside(layer).modules() if isinstance(module, ScaleFactor)]
    for site in sites:
        site.observer = partial(_append, order, site)
    try:
        if sites:
            call(layer, inside(layer), *args)
    finally:
        for site in sites:
            site.observer = None
    return order


def _append(order: list[ScaleFactor], site: ScaleFactor, y: Tensor, reference: Tensor) -> None:
    order.append(site)


def _fit(
    factor: ScaleFactor, name: str, layer: nn.Module, inputs: Sequence[tuple], reduce: Callable[[Tensor], Tensor]
) -> float:
    moments = torch.zeros(2, dtype=torch.float64, device=factor.scale_factor.device)

    def observe(partition: GraphPartition, y: Tensor, reference: Tensor) -> None:
        # Batches count by their rows, as the published fit does.
        rows = partition.reduce(moments.new_tensor([len(y)]))
        for column, value in enumerate((y, reference)):
            moments[column] += _variance(value.double(), partition) * rows[0]

    factor.scale_factor.zero_()
    try:
        for args in inputs:
            factor.observer = partial(observe, args[-1].partition)
            call(layer, inside(layer), *args)
    finally:
        factor.observer = None
    out, reference = reduce(moments).tolist()
    if not (out > 0 and reference > 0 and out < float("inf") and reference < float("inf")):
        raise ValueError(f"cannot fit scale factor {name}: variances {reference:g} (reference) and {out:g} (output)")
    value = (reference / out) ** 0.5
    factor.scale_factor.fill_(value)
    return value


def _variance(x: Tensor, partition: GraphPartition) -> Tensor:
    """() mean over features of the variance over rows (N, F), of which several processes may hold parts."""
    count, *sums = partition.reduce(torch.cat([x.new_tensor([len(x)]), x.sum(0)])).split([1, x.shape[1]])
    squares = partition.reduce((x - sums[0] / count.clamp(min=1)).square().sum(0))
    return (squares / (count - 1).clamp(min=1)).mean()
