"""The S2EF loss and the S2EF metrics of OC20.

Metrics are kept as sums and counts in one vector, so that replicas combine theirs with one all-reduce:

    metrics = S2EFMetrics(energy_mean)
    metrics.update(...)                        # once per batch, on every replica
    sums = metrics.tensor()
    all_reduce(sums)
    metrics.load_tensor(sums)
    metrics.compute()["forces_mae"]

B structures, V atoms. Energies eV, forces eV/A; the loss alone is in normalised units.
Source: Chanussot et al., ACS Catalysis 2021 (OC20), section "Evaluation metrics", and the public evaluator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: EFwT: an energy error and a largest force-component error strictly below these count as within threshold.
ENERGY_THRESHOLD = 0.02  #: eV
FORCE_THRESHOLD = 0.03  #: eV/A

_SUMS = (
    "structures",
    "energy",  # |dE|
    "energy_mean",  # |E - mean of the training set|
    "within",  # structures within both thresholds
    "atoms",  # free atoms; all that follow run over free atoms only
    "x",  # |dFx|
    "y",
    "z",
    "cos",
    "magnitude",  # ||F'| - |F||
    "zero",  # |Fx| + |Fy| + |Fz|: the error of predicting no force
)


class S2EFMetrics:
    """Running sums of the S2EF metrics.

    Args:
        energy_mean: mean energy of the training set, eV: the constant that `energy_mae_mean` would predict.
    """

    def __init__(self, energy_mean: float) -> None:
        self.energy_mean = energy_mean
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        prediction_energy: Tensor,
        prediction_forces: Tensor,
        target_energy: Tensor,
        target_forces: Tensor,
        free: Tensor,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Add a batch. Nothing is copied to the host, so the device is not waited for.

        Where several ranks share a graph, each passes the forces of its own atoms, and all come to the same sums.

        A structure without free atoms counts as within the force threshold: there is no force that could be wrong.

        Args:
            prediction_energy: (B,) eV
            prediction_forces: (V, 3) eV/A
            target_energy: (B,) eV
            target_forces: (V, 3) eV/A
            free: (V,) bool; True for the atoms whose forces are judged
            total: (V, F) -> (B, F), sums over the atoms of each structure (`GraphPartition.total`)
        """
        energy, energy_target = prediction_energy.double(), target_energy.double()
        forces, forces_target = prediction_forces.double(), target_forces.double()

        # Where, not times zero: what is said of a fixed atom must not matter, not even if it is NaN.
        error = torch.where(free[:, None], (forces - forces_target).abs(), 0.0)
        length, length_target = forces.norm(dim=-1), forces_target.norm(dim=-1)
        cos = torch.cosine_similarity(forces, forces_target, dim=-1, eps=1e-8)
        # Counting violations, rather than taking a maximum, makes a NaN a violation.
        too_far = (~(error < FORCE_THRESHOLD)).any(-1)
        of_atoms = [
            free.double(),
            *error.unbind(1),
            torch.where(free, cos, 0.0),
            torch.where(free, (length - length_target).abs(), 0.0),
            torch.where(free[:, None], forces_target.abs(), 0.0).sum(-1),
        ]
        sums = total(torch.stack([too_far.double(), *of_atoms], dim=-1))

        energy_error = (energy - energy_target).abs()
        within = (energy_error < ENERGY_THRESHOLD) & (sums[:, 0] == 0)
        of_structures = [
            torch.ones_like(energy),
            energy_error,
            (energy_target - self.energy_mean).abs(),
            within.double(),
        ]
        batch = torch.cat([torch.stack(of_structures).sum(1), sums[:, 1:].sum(0)])
        self._sums = self._sums.to(batch.device) + batch

    def tensor(self) -> Tensor:
        """A copy of all accumulators, 1-D float64: what replicas add up."""
        return self._sums.clone()

    def load_tensor(self, sums: Tensor) -> None:
        """Replace the accumulators, by those of `tensor()` or a sum of such.

        Raises:
            ValueError: if the shape is another.
        """
        if sums.shape != self._sums.shape:
            raise ValueError(f"metrics have {len(_SUMS)} accumulators, got a tensor of shape {tuple(sums.shape)}")
        self._sums = sums.to(torch.float64).clone()

    def compute(self) -> dict[str, float]:
        """The metrics over everything that was added; NaN where there was nothing to average over.

        energy_mae [eV], forces_mae and forces{x,y,z}_mae [eV/A per component], forces_cos, forces_magnitude_error
        [eV/A], energy_forces_within_threshold [fraction]; energy_mae_mean and forces_mae_zero are the errors of
        predicting the mean energy of the training set and no forces.
        """
        sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))

        def per_structure(name: str) -> float:
            return sums[name] / sums["structures"] if sums["structures"] else float("nan")

        def per_atom(total: float) -> float:
            return total / sums["atoms"] if sums["atoms"] else float("nan")

        return {
            "energy_mae": per_structure("energy"),
            "forces_mae": per_atom(sums["x"] + sums["y"] + sums["z"]) / 3,
            "forcesx_mae": per_atom(sums["x"]),
            "forcesy_mae": per_atom(sums["y"]),
            "forcesz_mae": per_atom(sums["z"]),
            "forces_cos": per_atom(sums["cos"]),
            "forces_magnitude_error": per_atom(sums["magnitude"]),
            "energy_forces_within_threshold": per_structure("within"),
            "energy_mae_mean": per_structure("energy_mean"),
            "forces_mae_zero": per_atom(sums["zero"]) / 3,
        }


def s2ef_loss(
    prediction_energy: Tensor,
    prediction_forces: Tensor,
    target_energy: Tensor,
    target_forces: Tensor,
    free: Tensor,
    *,
    energy_coefficient: float,
    force_coefficient: float,
    energy_count: float | Tensor,
    force_count: float | Tensor,
    total: Callable[[Tensor], Tensor] = lambda of_atoms: of_atoms,
) -> Tensor:
    """c_E sum |dE| / energy_count + c_F sum over free atoms of |dF|_2 / force_count; a scalar.

    The counts are given, because means run over all replicas: each passes (global count / replicas), and the
    average of the replicas' losses and gradients is then that of the whole batch. A count of zero is taken as one.
    The gradient of |dF| at dF = 0 is zero, and fixed atoms have no gradient whatever they hold.

    Args:
        prediction_energy, target_energy: (B,) normalised
        prediction_forces, target_forces: (V, 3) normalised
        free: (V,) bool; True for the atoms that are trained on
        energy_count: structures to average over
        force_count: free atoms to average over
        total: as for `S2EFMetrics.update`, where ranks share a graph: each passes its own atoms, all have the same loss
    """
    energy_error = (prediction_energy - target_energy).abs().sum()
    difference = (prediction_forces - target_forces).masked_fill(~free[:, None], 0.0)
    force_error = total(torch.linalg.vector_norm(difference, dim=-1, keepdim=True)).sum()
    return energy_coefficient * _mean(energy_error, energy_count) + force_coefficient * _mean(force_error, force_count)


def _mean(total: Tensor, count: float | Tensor) -> Tensor:
    """total / count, and zero rather than NaN where nothing was counted."""
    return total / (torch.where(count > 0, count, 1) if isinstance(count, Tensor) else (count or 1))
