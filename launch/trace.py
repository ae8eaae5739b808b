"""Where numbers stopped being finite: the failing batches once more, with every layer watched.

Called only when a run is about to end, and by all of its ranks: what ranks find is put together layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from egnscale.launch.layer_watch import layer_names, layers_of_parameters, watched_layers
from egnscale.models.forces import Prediction
from egnscale.models.layered import LayeredModel
from egnscale.scaling.engine import Engine, gather_over_ranks

#: Computes a batch's loss and prediction, and goes back from the loss, on all ranks together.
Again = tuple[Callable[[], tuple[Tensor, Prediction | None]], Callable[[Tensor], None]]


class _Place(NamedTuple):
    layer: int
    name: str  #: of an output, a parameter or a buffer


def what_is_not_finite(
    module: nn.Module, model: LayeredModel, engine: Engine, batches: Iterable[Again], *, backward: bool
) -> str:
    """Where the first NaN or infinite number comes from, in words. Collective.

    Args:
        module: what the engine trains.
        model: of its layers.
        batches: of the step that failed, in order.
        backward: whether all losses were finite, and a gradient was not; it is then read first, so it must still be
            there.
    """
    names, layer_of = layer_names(model), layers_of_parameters(module, model)
    weights = (*engine.held(), *module.named_buffers())
    parameter = _first(_Place(layer_of(name), name) for name, x in weights if not _finite(x))
    gradients = [_Place(layer_of(name), name) for name, x in engine.gradients() if not _finite(x)] if backward else []
    for forward, go_back in batches:
        seen = _Seen(len(names))
        with watched_layers(model, seen.see):
            loss, prediction = forward()
        if prediction is not None:
            seen.see_prediction(prediction)
        # Tangents come from the prediction: where that has failed, all of them have.
        output = _first(seen.outputs) or _first(seen.tangents)
        if parameter is not None and (output is None or parameter.layer <= output.layer):
            return f"{parameter.name.removeprefix('model.')} of {names[parameter.layer]} was not finite before the step"
        if output is not None:
            of_energy = max((found for found in gather_over_ranks(seen.behind()) if found is not None), default=None)
            if output.layer == len(names) - 1 and of_energy is not None:
                return (
                    "the outputs of all layers are finite, and the first layer, in backward order, with a gradient of "
                    f"the energy that is not finite is {names[of_energy]}"
                )
            return (
                f"the first output that is not finite is {output.name} of {names[output.layer]}, "
                "whose inputs and parameters are finite"
            )
        if any(gather_over_ranks(not _finite(loss))):
            return "the outputs of all layers are finite, so look at the labels"
        if backward:
            go_back(loss)
            culprit = _last([*gradients, *(_Place(n, "") for n in [seen.behind()] if n is not None)])
            if culprit is not None:
                of = f" (of {culprit.name.removeprefix('model.')})" if culprit.name else ""
                return (
                    "the forward pass is finite, and the first layer, in backward order, with a gradient that is not "
                    f"finite is {names[culprit.layer]}{of}"
                )
    return "run once more, everything was finite"


class _Seen:
    """What one rank saw that is not finite, in one forward pass and what went back through it."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.outputs: list[_Place] = []
        self.tangents: list[_Place] = []  #: outputs of a pass on dual numbers
        self.back: set[int] = set()  #: layers whose outputs have a gradient that is not finite

    def see(self, number: int, tensors: dict[str, Tensor], dual: bool) -> None:
        for name, x in tensors.items():
            if not _finite(x):
                (self.tangents if dual else self.outputs).append(_Place(number, name))
            if x.requires_grad:
                x.register_hook(lambda grad: None if grad is None or _finite(grad) else self.back.add(number))

    def see_prediction(self, prediction: Prediction) -> None:
        for name, x in prediction._asdict().items():
            if x is not None and not _finite(x):
                self.outputs.append(_Place(self.layers - 1, name))

    def behind(self) -> int | None:
        """The first layer, in backward order, that gave back a gradient that is not finite."""
        return max(self.back) + 1 if self.back else None


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


def _first(places: Iterable[_Place]) -> _Place | None:
    """The first in the order of layers that any rank has found. Collective."""
    return _of_all_ranks(min, places)


def _last(places: Iterable[_Place]) -> _Place | None:
    """The last. Collective."""
    return _of_all_ranks(max, places)


def _of_all_ranks(choose: Callable[..., _Place | None], places: Iterable[_Place]) -> _Place | None:
    def chosen(among: Iterable[_Place]) -> _Place | None:
        return choose(among, key=lambda place: place.layer, default=None)

    return chosen(place for place in gather_over_ranks(chosen(places)) if place is not None)
