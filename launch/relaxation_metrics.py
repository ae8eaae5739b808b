"""The metrics of OC20's IS2RE (relaxed energies) and IS2RS (relaxed structures).

Kept as sums and counts in one vector, so that replicas combine theirs with one all-reduce:

    metrics = IS2RSMetrics()
    metrics.update(...)                        # once per structure
    metrics.load_tensor(all_reduced(metrics.tensor()))
    metrics.compute()["adwt"]

All run over free atoms, those that were not held. A structure without any counts as exact: there is nothing that could
be wrong. Energies eV, lengths A, forces eV/A.
Source: Chanussot et al., ACS Catalysis 2021 (OC20), section "Evaluation metrics". EwT, ADwT and the errors are those of
the public evaluator. FbT and AFbT are computed on OC20's server, from DFT at the predicted structures, and no public
code does it; what is here follows the paper's words, and three details are from memory: that the force of an atom is
its norm, not its largest component; that comparisons are strict; and that 0.4 eV/A itself is no threshold (390 of them,
as 0.5 A is none of ADwT's 490). The server also screens structures by distances before their forces count; that is
not reproduced here.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

#: EwT: an energy error strictly below this counts.
ENERGY_THRESHOLD = 0.02  #: eV
#: ADwT: averaged over these 490 thresholds of the mean distance of a structure.
DISTANCE_THRESHOLDS = np.arange(0.01, 0.5, 0.001)  #: A
#: FbT: a largest force strictly below this counts.
FORCE_THRESHOLD = 0.05  #: eV/A
#: AFbT: averaged over these 390 thresholds of the largest force of a structure.
FORCE_THRESHOLDS = np.arange(0.01, 0.4, 0.001)  #: eV/A


def nearest_image(difference: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Displacements folded into the cell around zero, as OC20's evaluator folds them.

    Fractional coordinates along periodic axes are taken into (-1/2, 1/2]. In a skewed cell that is not always the
    shortest image; it is what the metric is defined with. Axes that are not periodic are left alone.

    Args:
        difference: (N, 3) A
        cell: (3, 3) A, rows are the lattice vectors; zeros where there is none
        pbc: (3,) bool
    """
    periodic = np.asarray(pbc, dtype=bool)
    if not periodic.any():
        return difference
    cell = _completed(np.asarray(cell, dtype=np.float64), periodic)
    fractional = np.linalg.solve(cell.T, difference.T).T
    # Twice: the remainder of a tiny negative number rounds to 1.
    fractional = np.where(periodic, fractional % 1.0 % 1.0, fractional)
    fractional = np.where(periodic & (fractional > 0.5), fractional - 1.0, fractional)
    return fractional @ cell


def _completed(cell: np.ndarray, periodic: np.ndarray) -> np.ndarray:
    """The cell; where it has no volume, with unit vectors across the periodic ones in place of the others."""
    if abs(np.linalg.det(cell)) > 1e-9:
        return cell
    present = periodic
    # Rows of vh behind the rank span what the present vectors do not.
    _, _, vh = np.linalg.svd(cell[present].reshape(-1, 3), full_matrices=True)
    completed = cell.copy()
    completed[~present] = vh[present.sum() :]
    return completed


def mean_distance(
    predicted: np.ndarray, target: np.ndarray, cell: np.ndarray, pbc: np.ndarray, free: np.ndarray
) -> float:
    """Mean distance of free atoms from where they should be, A; zero where there are none.

    Args:
        predicted, target: (N, 3) A
        cell, pbc: as for `nearest_image`
        free: (N,) bool
    """
    if not free.any():
        return 0.0
    moved = nearest_image((predicted - target)[free], cell, pbc)
    return float(np.linalg.norm(moved, axis=1).mean())


def largest_force(forces: np.ndarray, free: np.ndarray) -> float:
    """The largest norm of a free atom's force, eV/A; zero where there are none. (N, 3), (N,) bool."""
    return float(np.linalg.norm(forces[free], axis=1).max(initial=0.0))


def distance_score(distance: float) -> float:
    """Fraction of ADwT's thresholds that a structure of this mean distance (A) is strictly below."""
    return float((distance < DISTANCE_THRESHOLDS).mean())


def force_score(force: float) -> float:
    """Fraction of AFbT's thresholds that a structure of this largest force (eV/A) is strictly below."""
    return float((force < FORCE_THRESHOLDS).mean())


class _Sums:
    """Named accumulators."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._sums = dict.fromkeys(self.names, 0.0)

    def tensor(self) -> Tensor:
        """All accumulators, 1-D float64: what replicas add up."""
        return torch.tensor(list(self._sums.values()), dtype=torch.float64)

    def load_tensor(self, sums: Tensor) -> None:
        """Replace the accumulators, by those of `tensor()` or a sum of such.

        Raises:
            ValueError: if the shape is another.
        """
        if sums.shape != (len(self.names),):
            raise ValueError(f"metrics have {len(self.names)} accumulators, got a tensor of shape {tuple(sums.shape)}")
        self._sums = dict(zip(self.names, sums.double().tolist(), strict=True))

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self._sums[name] += value

    def _mean(self, total: str, count: str) -> float:
        return self._sums[total] / self._sums[count] if self._sums[count] else float("nan")


class IS2REMetrics(_Sums):
    """Running sums of the IS2RE metrics.

    Args:
        energy_mean: what the trivial guess predicts: the mean relaxed energy of the training set, eV.
    """

    names = ("structures", "failed", "energies", "error", "squared", "within", "trivial")

    def __init__(self, energy_mean: float) -> None:
        super().__init__()
        self.energy_mean = energy_mean

    def update(self, prediction: float | None, target: float) -> None:
        """Add a structure. One without a prediction has no error; it counts as failed, and as not within EwT."""
        self._add(structures=1, trivial=abs(target - self.energy_mean))
        if prediction is None or not np.isfinite(prediction):
            self._add(failed=1)
            return
        error = abs(prediction - target)
        self._add(energies=1, error=error, squared=error**2, within=error < ENERGY_THRESHOLD)

    def compute(self) -> dict[str, float]:
        """energy_mae [eV], energy_mse [eV^2], over the structures that have a prediction; energy_within_threshold
        [fraction of all]; energy_mae_mean, the error of the trivial guess; structures, failed [counts]. NaN where there
        was nothing to average over."""
        return {
            "energy_mae": self._mean("error", "energies"),
            "energy_mse": self._mean("squared", "energies"),
            "energy_within_threshold": self._mean("within", "structures"),
            "energy_mae_mean": self._mean("trivial", "structures"),
            "structures": self._sums["structures"],
            "failed": self._sums["failed"],
        }


class IS2RSMetrics(_Sums):
    """Running sums of the IS2RS metrics, of relaxed structures and of those that were not touched."""

    names = (
        "structures",
        "converged",
        "failed",
        "steps",
        "compared",  # with a relaxed structure
        "components",  # of positions of free atoms of these
        *(f"{which}{name}" for which in ("", "initial_") for name in ("distance", "absolute", "squared")),
        *(f"{which}{name}" for which in ("", "initial_") for name in ("judged", "missing", "below", "force")),
    )

    def update(
        self,
        predicted: np.ndarray,
        target: np.ndarray | None,
        initial: np.ndarray,
        cell: np.ndarray,
        pbc: np.ndarray,
        free: np.ndarray,
        *,
        steps: int,
        converged: bool,
        failed: bool = False,
    ) -> None:
        """Add a structure.

        Args:
            predicted, target, initial: (N, 3) A, the relaxed structure as predicted and as it is (None: not known), and
                where both began
            cell, pbc: as for `nearest_image`
            free: (N,) bool
        """
        self._add(structures=1, steps=steps, converged=converged, failed=failed)
        if target is None:
            return
        self._add(compared=1, components=3 * int(free.sum()))
        for which, positions in (("", predicted), ("initial_", initial)):
            error = (positions - target)[free]  # without periodic images, as OC20 has it
            self._add(
                **{
                    f"{which}distance": distance_score(mean_distance(positions, target, cell, pbc, free)),
                    f"{which}absolute": float(np.abs(error).sum()),
                    f"{which}squared": float((error**2).sum()),
                }
            )

    def update_forces(self, forces: np.ndarray | None, free: np.ndarray, *, initial: bool = False) -> None:
        """Add the reference's forces at a predicted structure, (N, 3) eV/A.

        None: the reference gave none, so the structure is below no threshold; it is counted as missing.
        """
        which = "initial_" if initial else ""
        self._add(**{f"{which}judged": 1})
        if forces is None or not np.isfinite(forces[free]).all():
            self._add(**{f"{which}missing": 1})
            return
        force = largest_force(forces, free)
        self._add(**{f"{which}below": force < FORCE_THRESHOLD, f"{which}force": force_score(force)})

    def compute(self) -> dict[str, float]:
        """adwt, fbt, afbt [fractions], positions_mae [A], positions_mse [A^2], forces_missing [count], each also with
        `_initial` for the structures that were not relaxed; steps [mean]; structures, converged, failed [counts]. NaN
        where there was nothing to average over: fbt and afbt without reference forces, the others without relaxed
        structures."""
        result = {name: self._sums[name] for name in ("structures", "converged", "failed")}
        result["steps"] = self._mean("steps", "structures")
        for which, suffix in (("", ""), ("initial_", "_initial")):
            result |= {
                f"adwt{suffix}": self._mean(f"{which}distance", "compared"),
                f"fbt{suffix}": self._mean(f"{which}below", f"{which}judged"),
                f"afbt{suffix}": self._mean(f"{which}force", f"{which}judged"),
                f"positions_mae{suffix}": self._mean(f"{which}absolute", "components"),
                f"positions_mse{suffix}": self._mean(f"{which}squared", "components"),
                f"forces_missing{suffix}": self._sums[f"{which}missing"],
            }
        return result
