"""Small models in fp64, batches to try them on, and how far two predictions of a model are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structures
import torch
from torch import Tensor, nn

from egnscale.data.batch import build_graph
from egnscale.data.sample import Sample
from egnscale.launch.loading import graph_spec
from egnscale.models import AtomModel, DimeNetPlusPlus, ExtendedGraph, GemNetT, Prediction, build_model
from egnscale.models.layers import ScaleFactor

GEMNET = {
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 16,
    "emb_size_trip": 8,
    "emb_size_bil_trip": 6,
    "emb_size_rbf": 5,
    "emb_size_cbf": 4,
    "num_radial": 16,
}
DIMENET = {
    "num_blocks": 2,
    "hidden_channels": 12,
    "out_emb_channels": 10,
    "int_emb_size": 8,
    "basis_emb_size": 5,
    "num_radial": 4,
}


def gemnet(*, fitted: bool = True, **hyperparameters: Any) -> GemNetT:
    """Weights and (if fitted) scale factors depend on nothing but `hyperparameters`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(**(GEMNET | hyperparameters)).double()
        for module in model.modules():
            if fitted and isinstance(module, ScaleFactor):
                module.scale_factor.uniform_(0.5, 2)
    return model


def dimenet(**hyperparameters: Any) -> DimeNetPlusPlus:
    """Weights depend on nothing but `hyperparameters`; none is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(**(DIMENET | hyperparameters)).double()
        for name, parameter in model.named_parameters():
            if name.endswith(("lin.weight", "bias")) and not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return model


def conservative(name: str, **hyperparameters: Any) -> AtomModel:
    if name == "gemnet_t":
        return gemnet(forces="conservative", **hyperparameters)
    return dimenet(**hyperparameters)


def graph_for(model: AtomModel, *samples: Sample) -> ExtendedGraph:
    return build_graph(samples, graph_spec(model.config), torch.float64)


BATCHES: dict[str, Callable[[], Sequence[Sample]]] = {
    "slabs": lambda: [structures.slab(), structures.slab("fcc211", size=(3, 1, 3), seed=1)],
    "perfect slab": lambda: [structures.slab(rattle=0)],
    "molecules": lambda: [structures.water(periodic=True), structures.water(periodic=False)],
    "one atom, many images": lambda: [structures.crystal()],
    "one atom, images in a row": lambda: [structures.crystal(pbc=(True, False, False))],
    "isolated atoms beside others": lambda: [
        structures.far_apart("O", "H"),
        structures.water(periodic=False),
        structures.far_apart("N"),
    ],
    "no edge": lambda: [structures.far_apart("O", "H"), structures.far_apart("Cu")],
    "no structure": list,
}


def assert_same(ours: Prediction, theirs: Prediction, model: nn.Module, tolerance: float = 1e-12) -> None:
    """Energies, forces and the gradient of every parameter, each relative to its own norm."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(x.shape, dtype=x.dtype, generator=generator) + 0.5 for x in ours]
    names, parameters = zip(*model.named_parameters(), strict=True)

    def everything(prediction: Prediction) -> dict[str, Tensor]:
        loss = sum((w * x).sum() for w, x in zip(weights, prediction, strict=True))
        # Raises if a parameter has no gradient at all: an optimizer that shards gradients would wait for it.
        gradients = torch.autograd.grad(loss, parameters)
        return dict(zip((*prediction._fields, *names), (*prediction, *gradients), strict=True))

    expected = everything(theirs)
    wrong = {}
    for name, value in everything(ours).items():
        error, size = float((value - expected[name]).detach().norm()), float(expected[name].detach().norm())
        # Forces in a crystal of one atom vanish but for rounding.
        if not error <= tolerance * size + max(1e-14, 1e-3 * tolerance):
            wrong[name] = (error, size)
    assert wrong == {}


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) < 1e-10 * float(b.norm())
