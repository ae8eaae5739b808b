"""Structures for tests, and what symmetry says about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, fcc211, molecule

from egnscale.data.sample import Sample


def slab(kind: str = "fcc111", *, size: tuple[int, int, int] = (2, 2, 3), rattle: float = 0.1, seed: int = 0) -> Sample:
    """A copper slab with an adsorbate, periodic in the plane; `rattle` (A) of zero leaves exact ties in distance."""
    if kind == "fcc111":
        atoms = fcc111("Cu", size, vacuum=8.0)
        add_adsorbate(atoms, molecule("CO"), 1.9, "fcc")
    else:
        atoms = fcc211("Cu", (3, *size[1:]), vacuum=8.0)
        add_adsorbate(atoms, "O", 1.5, (1.0, 1.0))
    atoms.rattle(rattle, seed=seed)
    return Sample.from_atoms(atoms)


def crystal(cell: np.ndarray | None = None, pbc: tuple[bool, bool, bool] = (True, True, True)) -> Sample:
    """Copper with one atom in its primitive cell, or in `cell`."""
    atoms = bulk("Cu")
    if cell is not None:
        atoms.set_cell(cell)
    atoms.pbc = pbc
    return Sample.from_atoms(atoms)


def water(*, periodic: bool) -> Sample:
    atoms = molecule("H2O")
    if periodic:
        atoms.set_cell([5.0, 6.0, 7.0])
        atoms.pbc = True
    return Sample.from_atoms(atoms)


def far_apart(*symbols: str) -> Sample:
    """Atoms out of each other's reach, without a cell."""
    return Sample.from_atoms(Atoms(symbols, positions=[[100.0 * i, 0, 0] for i in range(len(symbols))]))


def random_rotation(seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.linalg.det(q)


def rotated(sample: Sample, rotation: np.ndarray) -> Sample:
    return replace(sample, positions=sample.positions @ rotation.T, cell=sample.cell @ rotation.T)


def translated(sample: Sample, by: np.ndarray) -> Sample:
    return replace(sample, positions=sample.positions + by)


def permuted(sample: Sample, order: np.ndarray) -> Sample:
    return replace(
        sample,
        atomic_numbers=sample.atomic_numbers[order],
        positions=sample.positions[order],
        tags=sample.tags[order],
        fixed=sample.fixed[order],
    )


def repeated(sample: Sample, axis: int) -> Sample:
    """Two cells as one."""
    cell = sample.cell.copy()
    cell[axis] *= 2
    twice: dict[str, Any] = {name: np.tile(getattr(sample, name), 2) for name in ("atomic_numbers", "tags", "fixed")}
    return replace(
        sample, positions=np.concatenate([sample.positions, sample.positions + sample.cell[axis]]), cell=cell, **twice
    )
