"""Exponential moving average of the weights: of the fp32 masters, and shared out among the ranks as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from egnscale.scaling.engine import Engine


class ExponentialMovingAverage:
    """shadow <- decay * shadow + (1 - decay) * weight after every optimizer step.

    Args:
        engine: whose master weights to average.
        decay: in (0, 1).
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        #: Of each parameter this rank's part, flat.
        self.shadow = {name: part.float().clone() for name, part in engine.masters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, part in self.engine.masters():
            self.shadow[name].lerp_(part.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the enclosed code with the averaged weights in the module. Collective from ZeRO stage 1 on."""
        kept = {name: part.clone() for name, part in self.engine.held()}
        self.engine.use(self.shadow)
        try:
            yield
        finally:
            self.engine.write_held(kept)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """(name, averaged parameter), whole. Collective from ZeRO stage 1 on: every rank must exhaust it."""
        for name, part in self.shadow.items():
            yield name, self.engine.whole(name, part)

    def load_whole(self, read: Callable[[str], Tensor]) -> None:
        """Take the averages from whole parameters, read one by one by their names. Local."""
        for name, part in self.shadow.items():
            part.copy_(self.engine.part(name, read(name)))
