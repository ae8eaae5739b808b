"""How large a run's numbers are, layer by layer: `task.log_norms`.

Of each layer: the root mean square of what it makes (features, contributions to energies and forces, bases), and the
L2 norms of its weights and of their gradient, averaged over ranks and micro-batches, before clipping. Over all ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from egnscale.launch.layer_watch import layer_names, layers_of_parameters, watched_layers
from egnscale.models.forces import Prediction
from egnscale.models.layered import LayeredModel
from egnscale.scaling.engine import Engine, gather_over_ranks

GRADIENT, WEIGHT = "gradient norm", "weight norm"


class Norm(NamedTuple):
    """A row of `norms.csv`."""

    layer: str
    quantity: str  #: "rms of h", ..., "gradient norm", "weight norm"
    value: float


class LayerNorms:
    """Collects the norms of one step.

    Args:
        module: what the engine trains.
        model: of its layers.
        engine: with the gradients and the weights.
    """

    def __init__(self, module: nn.Module, model: LayeredModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.names = layer_names(model)
        self._layer_of = layers_of_parameters(module, model)
        self._seen: defaultdict[tuple[int, str], Tensor] = defaultdict(
            lambda: torch.zeros(2, dtype=torch.float64, device=engine.world.device)
        )

    def watching(self) -> AbstractContextManager[None]:
        """Within, one forward pass is made; `see_prediction` then takes what it gave."""
        return watched_layers(self.model, self._see)

    def see_prediction(self, prediction: Prediction) -> None:
        tensors = {name: x for name, x in prediction._asdict().items() if x is not None}
        self._see(len(self.names) - 1, tensors, dual=False)

    def _see(self, number: int, tensors: dict[str, Tensor], dual: bool) -> None:
        if dual:
            return  # the same values have been seen without their tangents
        for name, x in tensors.items():
            if x.numel() and x.is_floating_point():
                square = torch.linalg.vector_norm(x.detach(), dtype=torch.float64).square()
                self._seen[number, name] += torch.stack([square, square.new_tensor(x.numel())])

    def read(self) -> list[Norm]:
        """The norms of the step whose last backward pass has been made, and which is yet to be taken. Collective."""
        squares: defaultdict[tuple[int, str], float] = defaultdict(float)
        # Below stage 1 every rank has whole gradients and weights.
        if self.engine.zero_stage > 0 or self.engine.world.is_main:
            for quantity, parts in ((GRADIENT, self.engine.gradients()), (WEIGHT, self.engine.masters())):
                for name, part in parts:
                    norm = torch.linalg.vector_norm(part, dtype=torch.float64) if part.numel() else 0.0
                    squares[self._layer_of(name), quantity] += float(norm) ** 2
        seen = {key: tuple(sums.tolist()) for key, sums in self._seen.items()}
        self._seen.clear()
        return list(self._merged(gather_over_ranks((seen, dict(squares)))))

    def _merged(
        self, of_ranks: list[tuple[dict[tuple[int, str], tuple[float, float]], dict[tuple[int, str], float]]]
    ) -> Iterator[Norm]:
        for number, name in enumerate(self.names):
            fields = dict.fromkeys(field for seen, _ in of_ranks for layer, field in seen if layer == number)
            for field in fields:
                found = [seen[number, field] for seen, _ in of_ranks if (number, field) in seen]
                squares, counts = zip(*found, strict=True)
                yield Norm(name, f"rms of {field}", math.sqrt(sum(squares) / sum(counts)))
            for quantity in (GRADIENT, WEIGHT):
                parts = [norms[number, quantity] for _, norms in of_ranks if (number, quantity) in norms]
                if parts:
                    yield Norm(name, quantity, math.sqrt(sum(parts)))
