"""What is made again in the backward pass, so that it need not be kept: `parallel.recompute`.

* `selective`: what a model marks as cheap (activation functions, products with narrow inputs, sums over triplets) is
  not kept. Nothing is exchanged twice and no parameter is gathered twice.
* `block`: of a layer nothing is kept but what goes into it; backward runs the layer again, exchanges included, before
  it goes back through it. Autograd goes back in the reverse order of forward on every rank, so all ranks that share a
  graph come to the replay of a layer with the same exchanges behind them, and replay it in step. A replay runs to its
  layer's end: exchanges that were begun are finished, and ZeRO-3 gives back the parameters that it gathered.

Gradients are the same bits. Where no gradients are taken nothing is made again. torch's non-reentrant checkpointing
does the work: DeepSpeed's refuses to be differentiated twice, or gives wrong gradients there without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from egnscale.scaling.collectives import GraphGroup
from egnscale.scaling.combinations import Recompute


class Layered(Protocol):
    """What is asked of a model."""

    #: Calls a function that uses a layer: (layer, function, *args). Not used for the last layer: it keeps little.
    run: Callable[..., Any]

    #: Context in which what is cheap to make again is not kept.
    remaking: Callable[[], AbstractContextManager[None]]


def set_recompute(model: Layered, how: Recompute, group: GraphGroup | None = None) -> None:
    """Let a model keep less from now on, or everything again.

    Args:
        group: the ranks that share its graphs; what they exchange in a replay is counted as such.

    Raises:
        ValueError: for anything else than none, selective and block.
    """
    run = model.run.run if isinstance(model.run, Selective | Replayed) else model.run
    runs: dict[str, Callable[..., Any]] = {
        "none": run,
        "selective": Selective(run, model.remaking),
        "block": Replayed(run, group),
    }
    if how not in runs:
        raise ValueError(f"recompute is {how!r}; choose {', '.join(runs)}")
    model.run = runs[how]


class Selective:
    """Runs a layer that does not keep what is cheap to make again."""

    def __init__(self, run: Callable[..., Any], remaking: Callable[[], AbstractContextManager[None]]) -> None:
        self.run = run
        self.remaking = remaking

    def __call__(self, layer: nn.Module, *args: Any) -> Any:
        with self.remaking() if torch.is_grad_enabled() else nullcontext():
            return self.run(layer, *args)


class Replayed:
    """Runs a layer that keeps nothing but its arguments."""

    def __init__(self, run: Callable[..., Any], group: GraphGroup | None = None) -> None:
        self.run = run
        self.group = group

    def __call__(self, layer: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(layer, *args)

        def replay(*tensors: Tensor) -> Any:
            return _replayed_first(self.run(layer, *tree_unflatten(_filled(others, tensors), structure)), tensors)

        # Tensors are handed over one by one, so that autograd keeps them as it keeps any other; the rest stays behind.
        leaves, structure = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        del leaves
        with set_checkpoint_early_stop(False):
            return checkpoint(
                replay,
                *tensors,
                use_reentrant=False,
                preserve_rng_state=False,  # layers draw no random numbers
                context_fn=lambda: (nullcontext(), _CountedAsReplay(self.group)),
            )


def _replayed_first(result: Any, given: tuple[Tensor, ...]) -> Any:
    """A layer's result, whose gradients, as soon as there are any, have the layer run again before all else.

    Without this, a layer is run again when the first of its operations needs something. By then ZeRO-3 has gathered the
    parameters of that operation's module, and a replay would give them back too early. With it, replays are at the same
    place on all ranks by construction. Gradients flow as they did: a function in between would round them elsewhere.
    """
    before = {id(x) for x in given}
    for x in tree_leaves(result):
        if isinstance(x, Tensor) and x.requires_grad and id(x) not in before:
            # An operation on nothing, which like all others in the layer has not kept what it saved.
            operation = x.new_zeros(0).requires_grad_().exp().grad_fn
            x.register_hook(partial(_ask, operation))
    return result


def _ask(operation: Any, grad: Tensor) -> None:
    assert operation._saved_result is not None


class _CountedAsReplay:
    """What is exchanged within is counted as a replay. Entered once for each time that its layer is replayed."""

    def __init__(self, group: GraphGroup | None) -> None:
        self.group = group

    def __enter__(self) -> None:
        if self.group is not None:
            self.group.traffic.direction = "replay"

    def __exit__(self, *_: object) -> None:
        if self.group is not None:
            self.group.traffic.direction = "forward"


#: Stands where a tensor was.
_HOLE = object()


def _filled(leaves: list[Any], tensors: tuple[Tensor, ...]) -> list[Any]:
    """Leaves with tensors in place of the holes, in order."""
    rest = iter(tensors)
    return [next(rest) if leaf is _HOLE else leaf for leaf in leaves]
