"""Exponential moving average of the weights, held in fp32 and sharded as the parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from egnscale.scaling.engine import Engine


class ExponentialMovingAverage:
    """shadow <- decay * shadow + (1 - decay) * weight after every optimizer step.

    Args:
        engine: whose parameters to average.
        decay: in (0, 1).
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.shadow = {name: part.float().clone() for name, part in engine.held()}

    @torch.no_grad()
    def update(self) -> None:
        for name, part in self.engine.held():
            self.shadow[name].lerp_(part.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the enclosed code with the averaged weights in the module. Collective at ZeRO stage 3."""
        kept = {name: part.clone() for name, part in self.engine.held()}
        self.engine.write_held(self.shadow)
        try:
            yield
        finally:
            self.engine.write_held(kept)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """(name, averaged parameter), whole. Collective at ZeRO stage 3: every rank must exhaust it."""
        for name, part in self.shadow.items():
            yield name, self.engine.assemble(name, part)

    def load_whole(self, weights: dict[str, Tensor]) -> None:
        """Take the averages from whole parameters. Local."""
        for name, part in self.shadow.items():
            part.copy_(self.engine.part_of(name, weights[name].float()).to(part.device))
