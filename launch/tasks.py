"""What models are trained for: S2EF (structure to energy and forces) and IS2RE (initial structure to relaxed energy).

Normalised targets, OC20's losses, physical predictions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from egnscale.data.batch import AtomBatch
from egnscale.launch.metrics import s2ef_loss
from egnscale.models import ExtendedGraph, Prediction
from egnscale.models.dual import dual_energies
from egnscale.models.forces import EnergyModel
from egnscale.scaling.combinations import SecondOrder


@dataclass(frozen=True)
class Normalizer:
    """Targets are learned as (energy - energy_mean) / energy_std and forces / force_std."""

    energy_mean: float  #: eV
    energy_std: float  #: eV
    force_std: float  #: eV/A

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not torch.isfinite(torch.tensor(value)) or (name != "energy_mean" and value <= 0):
                raise ValueError(
                    f"normalizer: {name} is {value}; it must be finite" + " and positive" * (name != "energy_mean")
                )

    @classmethod
    def from_statistics(cls, statistics: dict[str, Any], energy: str = "energy") -> Normalizer:
        """From a training store's statistics, as OC20 does: the energy's standard deviation scales forces too.

        Args:
            energy: "energy" or "energy_relaxed", that which is learnt.
        """
        mean, std = statistics[energy]["mean"], statistics[energy]["std"]
        if not std:
            raise ValueError(
                "all training energies are equal, so they cannot be normalised; set task.normalizer by hand"
            )
        return cls(mean, std, std)

    def physical(self, prediction: Prediction) -> Prediction:
        """Normalised -> eV (float64) and eV/A."""
        forces = None if prediction.forces is None else prediction.forces * self.force_std
        return Prediction(prediction.energy.double() * self.energy_std + self.energy_mean, forces)


class S2EF(nn.Module):
    """A model together with its loss: what the engine trains.

    Loss (OC20): energy_coefficient * mean |dE| over structures + force_coefficient * mean |dF|_2 over free atoms, on
    normalised targets. Means are over all replicas: `counts` holds the numbers of structures and of free atoms that
    this replica's sums are divided by, so that the average of the replicas' losses is the mean over all. Ranks that
    share a graph evaluate the same loss.
    """

    def __init__(
        self,
        model: nn.Module,
        normalizer: Normalizer,
        *,
        energy_coefficient: float = 1.0,
        force_coefficient: float = 100.0,
        free_atoms_only: bool = True,
        second_order: SecondOrder = "double_backward",
    ) -> None:
        super().__init__()
        self.model = model
        self.normalizer = normalizer
        self.energy_coefficient, self.force_coefficient = energy_coefficient, force_coefficient
        self.free_atoms_only = free_atoms_only
        self.second_order = second_order

    def trained_atoms(self, batch: AtomBatch) -> Tensor:
        """(V,) bool, the atoms whose forces count, of those that this rank holds."""
        return ~batch.fixed if self.free_atoms_only else torch.ones_like(batch.fixed)

    def forward(self, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor) -> tuple[Tensor, Prediction]:
        """The loss of a labelled batch, and the (detached, normalised) prediction."""
        if self.second_order == "reverse_over_forward" and torch.is_grad_enabled():
            return self._reverse_over_forward(graph, batch, counts)
        prediction = self.model(graph)
        return self.loss(prediction, graph, batch, counts), detached(prediction)

    def _reverse_over_forward(
        self, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor
    ) -> tuple[Tensor, Prediction]:
        """The loss, and its exact gradient by a forward pass on dual numbers (`egnscale.models.dual`)."""
        assert isinstance(self.model, EnergyModel)
        with torch.no_grad():
            prediction = self.model(graph)
        loss, of_energy, displacement = self.slopes(prediction, graph, batch, counts)
        energies, derivatives = dual_energies(self.model, graph, displacement)
        objective = (of_energy * energies).sum() + derivatives.sum()
        # The value of the loss, with the gradient of the objective.
        return loss + (objective - objective.detach()), detached(prediction)

    def slopes(
        self, prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss; its derivative g in the energies (B,); the displacement xdot (V, 3) of `egnscale.models.dual`.

        The loss's gradient in the parameters is that of g . E + Edot.
        """
        assert prediction.forces is not None
        with torch.enable_grad():
            energy, forces = prediction.energy.detach().requires_grad_(), prediction.forces.detach().requires_grad_()
            loss = self.loss(Prediction(energy, forces), graph, batch, counts)
            of_energy, of_forces = torch.autograd.grad(loss, (energy, forces))
        # The losses of all who share a graph depend on a force, and `total` hands each what it means to all of them.
        sharing = graph.partition.reduce(of_forces.new_ones(1))
        return loss.detach(), of_energy, -of_forces / sharing

    def loss(self, prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor) -> Tensor:
        """() of a prediction in normalised units."""
        assert prediction.forces is not None
        assert batch.energy is not None
        assert batch.forces is not None
        scale = self.normalizer
        return s2ef_loss(
            prediction.energy.float() if prediction.energy.dtype == torch.bfloat16 else prediction.energy,
            prediction.forces,
            ((batch.energy - scale.energy_mean) / scale.energy_std).to(prediction.energy.dtype),
            (batch.forces / scale.force_std).to(prediction.forces.dtype),
            self.trained_atoms(batch),
            energy_coefficient=self.energy_coefficient,
            force_coefficient=self.force_coefficient,
            energy_count=counts[0],
            force_count=counts[1],
            total=graph.partition.total,
        )


class IS2RE(nn.Module):
    """A model together with its loss, as `S2EF`: the relaxed energy directly from the initial structure.

    Loss (OC20): mean |dE| over structures, on normalised targets.
    """

    def __init__(self, model: nn.Module, normalizer: Normalizer) -> None:
        super().__init__()
        self.model = model
        self.normalizer = normalizer

    def trained_atoms(self, batch: AtomBatch) -> Tensor:
        """(V,) bool: no forces count."""
        return torch.zeros_like(batch.fixed)

    def forward(self, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor) -> tuple[Tensor, Prediction]:
        """The loss of a labelled batch, and the (detached, normalised) prediction."""
        prediction = self.model(graph)
        return self.loss(prediction, graph, batch, counts), detached(prediction)

    def loss(self, prediction: Prediction, graph: ExtendedGraph, batch: AtomBatch, counts: Tensor) -> Tensor:
        """() of a prediction in normalised units."""
        energy = prediction.energy
        assert batch.energy_relaxed is not None
        scale = self.normalizer
        target = ((batch.energy_relaxed - scale.energy_mean) / scale.energy_std).to(energy.dtype)
        return (energy - target).abs().sum() / counts[0]


def detached(prediction: Prediction) -> Prediction:
    forces = prediction.forces
    return Prediction(prediction.energy.detach(), None if forces is None else forces.detach())
