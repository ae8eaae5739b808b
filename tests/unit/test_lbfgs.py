"""Batched L-BFGS against ASE's, structure by structure, on analytic potentials."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.optimize import LBFGS as AseLBFGS
from torch import Tensor
from toy import slab

from egnscale.launch.lbfgs import LBFGS, LBFGSOptions

ASE_DEFAULTS = LBFGSOptions(memory=100, damping=1.0, alpha=70.0, maxstep=0.2)


def free_of(atoms: Atoms) -> np.ndarray:
    free = np.ones(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        free[constraint.index] = False
    return free


class Alongside:
    """ASE structures whose free atoms our optimizer moves."""

    def __init__(self, structures: Sequence[Atoms], calculator: Callable[[], object], options: LBFGSOptions) -> None:
        self.structures = [atoms.copy() for atoms in structures]
        for atoms in self.structures:
            atoms.calc = calculator()
        self.optimizer = LBFGS(options)
        self.optimizer.extend([torch.from_numpy(atoms.positions[free_of(atoms)]) for atoms in self.structures])

    def forces(self) -> Tensor:
        rows = [atoms.get_forces(apply_constraint=False)[free_of(atoms)] for atoms in self.structures]
        return self.optimizer.pack(torch.from_numpy(np.concatenate(rows)))

    def step(self) -> None:
        self.optimizer.step(self.forces())
        for atoms, positions in zip(self.structures, self.optimizer.positions, strict=True):
            free = free_of(atoms)
            moved = atoms.positions.copy()
            moved[free] = positions[: free.sum()].numpy()
            atoms.set_positions(moved, apply_constraint=False)


def by_ase(atoms: Atoms, calculator: Callable[[], object], options: LBFGSOptions, steps: int) -> list[np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator()
    settings = {name: getattr(options, name) for name in ("memory", "damping", "alpha", "maxstep")}
    optimizer = AseLBFGS(atoms, logfile=None, **settings)
    return [atoms.positions.copy() for _ in optimizer.irun(fmax=0.0, steps=steps)]


def slabs() -> list[Atoms]:
    return [slab("Cu", seed=1), slab("Pt", (2, 2, 4), seed=2), slab("Ni", seed=3, stepped=True)]


@pytest.mark.parametrize(
    "options",
    [ASE_DEFAULTS, LBFGSOptions(), LBFGSOptions(memory=4, damping=0.8, alpha=50.0, maxstep=0.1)],
    ids=["ase", "oc20", "short memory"],
)
def test_agrees_with_ase_under_emt(options: LBFGSOptions) -> None:
    ours = Alongside(slabs(), EMT, options)
    expected = [by_ase(atoms, EMT, options, 20) for atoms in slabs()]
    for step in range(1, 21):
        ours.step()
        for atoms, theirs in zip(ours.structures, expected, strict=True):
            assert np.abs(atoms.positions - theirs[step]).max() < 1e-6


def test_agrees_with_ase_on_clusters() -> None:
    def lj() -> LennardJones:
        return LennardJones(sigma=2.3, epsilon=0.4, rc=8.0)

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), -1).reshape(-1, 3) * 2.6
    clusters = [Atoms(f"Ar{n}", grid[:n] + rng.normal(scale=0.1, size=(n, 3))) for n in (4, 6, 8)]
    ours = Alongside(clusters, lj, ASE_DEFAULTS)
    expected = [by_ase(atoms, lj, ASE_DEFAULTS, 20) for atoms in clusters]
    for _ in range(20):
        ours.step()
    for atoms, theirs in zip(ours.structures, expected, strict=True):
        assert np.abs(atoms.positions - theirs[20]).max() < 1e-6


def test_does_not_depend_on_the_batch() -> None:
    """Alone, with others, and with others that come and go: the same path, but for rounding."""
    alone = Alongside(slabs()[:1], EMT, LBFGSOptions(memory=6))
    together = Alongside(slabs(), EMT, LBFGSOptions(memory=6))
    changing = Alongside(slabs()[1:], EMT, LBFGSOptions(memory=6))
    for _ in range(3):
        changing.step()
    # The structure enters a batch under way, behind the others; these leave one after the other.
    atoms = slabs()[0]
    atoms.calc = EMT()
    changing.structures.append(atoms)
    changing.optimizer.extend([torch.from_numpy(atoms.positions[free_of(atoms)])])
    for step in range(15):
        for one in (alone, together, changing):
            one.step()
        for one, where in ((together, 0), (changing, -1)):
            assert np.abs(one.structures[where].positions - alone.structures[0].positions).max() < 1e-9, step
        if step in (4, 8):
            changing.optimizer.keep(torch.arange(1, len(changing.structures)))
            changing.structures.pop(0)
    assert len(changing.optimizer) == 1


def test_history_is_dropped_with_its_structures() -> None:
    """Memory and width follow those who are still there."""
    ours = Alongside(slabs(), EMT, LBFGSOptions())
    for _ in range(5):
        ours.step()
    optimizer = ours.optimizer
    assert optimizer._s.shape[1] == 4
    narrow = int(free_of(slabs()[0]).sum())
    optimizer.keep(torch.tensor([0]))
    assert optimizer._s.shape == (1, 4, 3 * narrow)
    optimizer.keep(torch.tensor([], dtype=torch.int64))
    assert len(optimizer) == 0
    optimizer.extend([torch.zeros(2, 3)])
    assert optimizer._r.shape == (1, 0, 0)


def test_steps_are_limited_per_structure_and_damped() -> None:
    optimizer = LBFGS(LBFGSOptions(maxstep=0.04, damping=0.5, alpha=70.0))
    optimizer.extend([torch.zeros(2, 3), torch.zeros(1, 3)])
    forces = optimizer.pack(torch.tensor([[30.0, 40.0, 0.0], [3.0, 0.0, 0.0], [0.7, 0.0, 0.0]]))
    assert optimizer.largest_force(forces).tolist() == pytest.approx([50.0, 0.7])
    moved = optimizer.step(forces)
    assert moved[0, 0].tolist() == pytest.approx([0.012, 0.016, 0.0])  # 0.04 A along the force, halved
    assert moved[0, 1].tolist() == pytest.approx([0.0012, 0.0, 0.0])  # scaled with it
    assert moved[1, 0].tolist() == pytest.approx([0.005, 0.0, 0.0])  # 0.7 / 70, halved
    assert moved[1, 1].tolist() == [0.0, 0.0, 0.0]


def test_nothing_to_move_and_no_curvature() -> None:
    """Structures without free atoms, with zero forces or with constant ones stay finite."""
    optimizer = LBFGS()
    optimizer.extend([torch.zeros(0, 3), torch.zeros(2, 3), torch.zeros(1, 3)])
    for _ in range(3):
        forces = optimizer.pack(torch.tensor([[0.0, 0, 0], [0.0, 0, 0], [0.1, 0, 0]]))
        optimizer.step(forces)
    assert optimizer.largest_force(forces).tolist() == pytest.approx([0.0, 0.0, 0.1])
    assert torch.isfinite(optimizer.positions).all()
    assert optimizer.positions[2, 0, 0] == pytest.approx(3 * 0.1 / 70)  # no pair says anything, so 1 / alpha remains
    nothing = LBFGS()
    nothing.extend([torch.zeros(0, 3)])
    assert nothing.step(torch.zeros(1, 0, 3)).shape == (1, 0, 3)


def test_finds_a_minimum() -> None:
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=0)
    ours = Alongside([atoms], EMT, ASE_DEFAULTS)
    for _ in range(100):
        if ours.optimizer.largest_force(ours.forces()).item() <= 1e-3:
            break
        ours.step()
    assert ours.optimizer.largest_force(ours.forces()).item() <= 1e-3


@pytest.mark.parametrize("wrong", [{"memory": 0}, {"alpha": 0.0}, {"maxstep": -1.0}, {"damping": float("nan")}])
def test_options(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LBFGSOptions(**wrong)  # type: ignore[arg-type]
