"""Energies and forces as models predict them, and forces as the gradient of any model's energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from egnscale.models.graph import ExtendedGraph
from egnscale.models.layered import LayeredModel

#: direct: by a head of their own. conservative: minus the gradient of the energy. none: energies alone.
Forces = Literal["direct", "conservative", "none"]


class Prediction(NamedTuple):
    """Energies and forces, in normalised units."""

    energy: Tensor  #: (B,)
    forces: Tensor | None  #: (V, 3); None: the model predicts none


def conservative(atom_energies: Callable[[ExtendedGraph], Tensor], graph: ExtendedGraph) -> Prediction:
    """Energies, and forces as -dE/dx, for any model of the energy.

    Differentiable once more where gradients are enabled, for training (double backward); elsewhere nothing of the
    computation is kept.

    Args:
        atom_energies: (V, 1), what each atom adds to the energy of its system, from `graph.positions`.
        graph: where several processes share it, each gets the forces on its own atoms. Each differentiates the energy
            of its own atoms only: what others' add comes back through the verbs, whose backward is their transpose.
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        positions = graph.positions.detach().requires_grad_()
        energies = atom_energies(replace(graph, positions=positions))
        total = graph.partition.total(energies).squeeze(-1)
        (gradient,) = torch.autograd.grad(energies.sum(), positions, create_graph=training, materialize_grads=True)
    return Prediction(total, -gradient) if training else Prediction(total.detach(), -gradient)


class EnergyModel(LayeredModel):
    """A layered model of the energy, `model(graph) -> Prediction`, with the kind of forces that its configuration says.

    Its readout gives the energies of atoms, too.
    """

    config: Any  #: with `forces`

    def forward(self, graph: ExtendedGraph) -> Prediction:
        if self.config.forces == "conservative":
            return conservative(self.atom_energies, graph)
        return super().forward(graph)

    def atom_energies(self, graph: ExtendedGraph) -> Tensor:
        """(V, 1) what each atom adds to the energy of its system, normalised."""
        return self.readout.atom_energies(self.state(graph), graph)
