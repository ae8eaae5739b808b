"""One structure as it is read, written and batched.

Lengths in A, energies in eV, forces in eV/A. `energy` is the quantity that the model learns: for data sets in the
OC20 style it is referenced to the clean slab and the gas-phase adsorbate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

MAX_ATOMIC_NUMBER = 118


@dataclass(frozen=True, eq=False)
class Sample:
    """One structure, with what is known about it.

    N atoms. Arrays are C-contiguous and owned by the sample; treat them as read-only.
    """

    atomic_numbers: np.ndarray  #: (N,) int64, 1..118
    positions: np.ndarray  #: (N, 3) float64, A
    cell: np.ndarray  #: (3, 3) float64, A; rows are the lattice vectors; zeros where not periodic
    pbc: np.ndarray  #: (3,) bool
    tags: np.ndarray  #: (N,) int64; 0 sub-surface, 1 surface, 2 adsorbate
    fixed: np.ndarray  #: (N,) bool; True where the atom was held during relaxation
    sid: int = 0  #: system id
    fid: int = 0  #: frame id within the system's trajectory
    energy: float | None = None  #: eV
    forces: np.ndarray | None = None  #: (N, 3) float64, eV/A
    energy_relaxed: float | None = None  #: eV; IS2RE target
    positions_relaxed: np.ndarray | None = None  #: (N, 3) float64, A; IS2RS target

    @property
    def num_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def name(self) -> str:
        """What error messages call this sample."""
        return f"sid {self.sid} fid {self.fid}"

    def validate(self) -> Sample:
        """Return the sample itself if it makes physical sense.

        Raises:
            ValueError: naming the sample, the field and the first offending atom.
        """
        n = self.num_atoms
        for field, shape in {
            "atomic_numbers": (n,),
            "positions": (n, 3),
            "cell": (3, 3),
            "pbc": (3,),
            "tags": (n,),
            "fixed": (n,),
            "forces": (n, 3),
            "positions_relaxed": (n, 3),
        }.items():
            value = getattr(self, field)
            if value is None:
                continue
            if value.shape != shape:
                raise ValueError(f"{self.name}: {field} has shape {value.shape}, expected {shape}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise ValueError(f"{self.name}: {field} is not finite (row {row}: {value[row].tolist()})")
        for field in ("energy", "energy_relaxed"):
            value = getattr(self, field)
            if value is not None and not np.isfinite(value):
                raise ValueError(f"{self.name}: {field} is {value}")
        bad = (self.atomic_numbers < 1) | (self.atomic_numbers > MAX_ATOMIC_NUMBER)
        if bad.any():
            atom = int(np.argmax(bad))
            raise ValueError(
                f"{self.name}: atom {atom} has atomic number {self.atomic_numbers[atom]}; "
                f"elements are 1..{MAX_ATOMIC_NUMBER}"
            )
        periodic = self.cell[self.pbc]
        if len(periodic) and np.linalg.matrix_rank(periodic) < len(periodic):
            raise ValueError(
                f"{self.name}: periodic along {np.flatnonzero(self.pbc).tolist()} but the cell vectors "
                f"{periodic.tolist()} are zero or linearly dependent"
            )
        return self

    @classmethod
    def from_atoms(cls, atoms: Atoms, sid: int = 0, fid: int = 0, energy: float | None = None) -> Sample:
        """Convert an `ase.Atoms`; energy and forces are taken from its calculator where it holds results.

        Fixed atoms are those of `ase.constraints.FixAtoms`; other constraints are ignored.
        """
        from ase.constraints import FixAtoms

        fixed = np.zeros(len(atoms), dtype=bool)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                fixed[constraint.index] = True
        results = {} if atoms.calc is None else getattr(atoms.calc, "results", {})
        forces = results.get("forces")
        if energy is None:
            energy = results.get("energy")
        return cls(
            atomic_numbers=np.asarray(atoms.numbers, dtype=np.int64),
            positions=np.array(atoms.positions, dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),
            pbc=np.array(atoms.pbc, dtype=bool),
            tags=np.asarray(atoms.get_tags(), dtype=np.int64),
            fixed=fixed,
            sid=sid,
            fid=fid,
            energy=None if energy is None else float(energy),
            forces=None if forces is None else np.array(forces, dtype=np.float64),
        )

    def to_atoms(self) -> Atoms:
        """Convert to `ase.Atoms`; energy and unconstrained forces go into a `SinglePointCalculator`."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        atoms = Atoms(
            numbers=self.atomic_numbers, positions=self.positions, cell=self.cell, pbc=self.pbc, tags=self.tags
        )
        if self.fixed.any():
            atoms.set_constraint(FixAtoms(mask=self.fixed))
        if self.energy is not None or self.forces is not None:
            atoms.calc = SinglePointCalculator(atoms, energy=self.energy, forces=self.forces)
        return atoms
