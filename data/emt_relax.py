"""One system relaxed under ASE's effective medium theory: clean slab, adsorbate on it, trajectory, referenced energies.

    E(frame) = E_EMT(slab + adsorbate) - E_EMT(relaxed clean slab) - E_EMT(relaxed gas-phase adsorbate)

as OC20 defines it, with the same cell and the same fixed atoms in both slabs. Frames keep the calculator's forces on
all atoms, the fixed ones included. OC20's filters apply: |E| <= 10 eV and |F| <= 50 eV/A.

EMT's parameters for H, C, N and O are, in the words of ASE, not for any serious use. What they give is a smooth,
short-ranged many-body energy with exact forces, which is what a data set for development needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from ase import Atoms, build
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, covalent_radii, reference_states
from ase.neighborlist import neighbor_list
from ase.optimize import LBFGS

from egnscale.data.emt_systems import ADSORBATES, EmtOptions, System, generator
from egnscale.data.sample import Sample

MAX_ENERGY = 10.0  # eV
MAX_FORCE = 50.0  # eV/A, norm of one atom's force
VACUUM = 10.0  # A on each side of the clean slab
MAX_ATTEMPTS = 10
REFERENCE_STEPS = 300  # the references are relaxed however short the trajectories are to be
SUB_SURFACE, SURFACE, ADSORBATE = 0, 1, 2
_FCC_NEIGHBORS = 12
#: Where an adsorbate starts: radii touching. EMT's hydrogen is larger than the real one (0.31 A), it would start
#: with tens of eV.
_RADII = covalent_radii.copy()
_RADII[1] = 0.65
_RAISE = 0.2  # A, how much higher each further attempt starts


@dataclass(frozen=True)
class Relaxation:
    """What one system contributes."""

    frames: list[Sample]  #: those that pass the filters; fid is the optimizer's step
    relaxed: Sample  #: the first frame with energy_relaxed and positions_relaxed
    dropped: int  #: frames that do not pass the filters
    attempts: int  #: placements tried; the last one counts
    converged: bool  #: whether fmax was reached within max_steps


def relax_system(system: System, options: EmtOptions) -> Relaxation:
    """Relax one system, placing the adsorbate anew where the first or last frame does not pass the filters.

    Raises:
        ValueError: if no placement gives frames that pass.
    """
    dropped = 0
    for attempt in range(MAX_ATTEMPTS):
        rng = generator(options.seed, system.sid, attempt + 1)
        slab = clean_slab(system, rng)
        slab_energy = relax(slab, options.fmax, REFERENCE_STEPS)[-1].energy
        molecule, molecule_energy = gas_phase(system.adsorbate)
        atoms = place(slab, molecule, system.site, rng, gap=attempt * _RAISE)
        free = atoms.get_tags() != SUB_SURFACE
        atoms.positions[free] += rng.normal(scale=options.rattle, size=(free.sum(), 3))
        start = Sample.from_atoms(atoms, sid=system.sid)
        samples = [
            replace(
                start,
                fid=fid,
                positions=frame.positions,
                energy=frame.energy - slab_energy - molecule_energy,
                forces=frame.forces,
            )
            for fid, frame in enumerate(relax(atoms, options.fmax, options.max_steps))
        ]
        frames = [sample for sample in samples if passes(sample)]
        dropped += len(samples) - len(frames)
        first, last = samples[0], samples[-1]
        if passes(first) and passes(last):
            relaxed = replace(first, energy_relaxed=last.energy, positions_relaxed=last.positions)
            return Relaxation(frames, relaxed, dropped, attempt + 1, _largest(last, ~last.fixed) < options.fmax)
    raise ValueError(f"{system}: {MAX_ATTEMPTS} placements, and none stays within {MAX_ENERGY} eV, {MAX_FORCE} eV/A")


def passes(sample: Sample) -> bool:
    """OC20's filters."""
    assert sample.energy is not None
    return abs(sample.energy) <= MAX_ENERGY and _largest(sample) <= MAX_FORCE


def _largest(sample: Sample, atoms: np.ndarray | slice = slice(None)) -> float:
    """The largest norm of a force, eV/A."""
    assert sample.forces is not None
    return float(np.linalg.norm(sample.forces[atoms], axis=1).max())


class Frame(NamedTuple):
    """One step of a relaxation, N atoms."""

    positions: np.ndarray  #: (N, 3) float64, A
    energy: float  #: eV, as EMT gives it
    forces: np.ndarray  #: (N, 3) float64, eV/A, before constraints


class _Emt(EMT):
    """EMT for atoms of which only the positions change.

    ASE compares everything before it hands out a result, six times a step; that is a quarter of the time.
    """

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        if self.atoms is None:
            return list(all_changes)
        return [] if np.array_equal(atoms.positions, self.atoms.positions) else ["positions"]


def relax(atoms: Atoms, fmax: float, max_steps: int) -> list[Frame]:
    """Relax `atoms` in place; every step, the start and the end included."""
    # A calculator of its own: a neighbour list kept from other atoms would sum in another order, and the last bits
    # of a system would depend on what its worker did before.
    atoms.calc = _Emt()
    return [
        Frame(atoms.positions.copy(), atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False))
        for _ in LBFGS(atoms, logfile=None).irun(fmax=fmax, steps=max_steps)
    ]


def clean_slab(system: System, rng: np.random.Generator) -> Atoms:
    """An unrelaxed slab: EMT's lattice constant (Vegard's rule for alloys), random occupation, OC20's tags.

    Surface atoms are those above the middle that miss neighbours of the bulk; all others are held fixed.
    """
    size = system.size
    constants = {symbol: _lattice_constant(symbol) for symbol, _ in system.metals}
    total = sum(parts for _, parts in system.metals)
    a = sum(parts * constants[symbol] for symbol, parts in system.metals) / total
    extra = {"orthogonal": True} if system.facet == "fcc211" else {}
    slab = getattr(build, system.facet)(system.metals[0][0], size, a=a, vacuum=VACUUM, **extra)
    slab.pbc = True
    # Exact composition up to rounding, random places.
    number = [round(parts * len(slab) / total) for _, parts in system.metals[1:]]
    symbols = np.repeat([symbol for symbol, _ in system.metals], [len(slab) - sum(number), *number])
    slab.symbols = rng.permutation(symbols)
    bonded = neighbor_list("i", slab, cutoff=1.2 * a / np.sqrt(2))
    height = slab.positions[:, 2] - slab.positions[:, 2].mean()
    surface = (np.bincount(bonded, minlength=len(slab)) < _FCC_NEIGHBORS) & (height > 0.1)
    slab.set_tags(np.where(surface, SURFACE, SUB_SURFACE))
    slab.set_constraint(FixAtoms(mask=~surface))
    return slab


def _lattice_constant(symbol: str) -> float:
    return float(reference_states[atomic_numbers[symbol]]["a"])


@cache
def gas_phase(adsorbate: str) -> tuple[Atoms, float]:
    """The adsorbate alone, relaxed, and its energy in eV. Shared: treat as read-only."""
    name = ADSORBATES[adsorbate]
    atoms = Atoms(name) if len(Atoms(adsorbate)) == 1 else build.molecule(name)
    atoms = Atoms(atoms.symbols, atoms.positions)  # without g2's magnetic moments
    return atoms, relax(atoms, fmax=0.01, max_steps=REFERENCE_STEPS)[-1].energy


def place(slab: Atoms, molecule: Atoms, site: str, rng: np.random.Generator, gap: float = 0.0) -> Atoms:
    """Slab and molecule: random orientation, first atom above the site, lowered until covalent radii touch.

    `gap` (A) is then added to the height.
    """
    added = Atoms(molecule.symbols, molecule.positions - molecule.positions[0])
    added.positions = added.positions @ _random_rotation(rng).T
    added.positions[:, :2] += _site(slab, site, rng)
    # The lowest height at which no pair is closer than the sum of its radii, periodic images included.
    reach = _RADII[slab.numbers][None, :] + _RADII[added.numbers][:, None]
    images = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2), axis=-1).reshape(-1, 2) @ slab.cell.array[:2, :2]
    apart = added.positions[:, None, :2] - slab.positions[None, :, :2]
    # The molecule may hang over the edge of the cell, by less than one cell: the nearest of nine images is enough.
    squared = ((apart[:, :, None] - images) ** 2).sum(axis=-1).min(axis=-1)
    needed = np.sqrt(np.maximum(reach**2 - squared, 0.0))
    touching = squared < reach**2
    lift = (slab.positions[None, :, 2] + needed - added.positions[:, None, 2])[touching].max()
    added.positions[:, 2] += lift + gap
    added.set_tags(ADSORBATE)
    atoms = slab.copy()
    atoms.extend(added)
    return atoms


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) uniformly random rotation, from a unit quaternion."""
    w, *v = rng.normal(size=4)
    w, v = w / np.sqrt(w * w + np.dot(v, v)), np.array(v) / np.sqrt(w * w + np.dot(v, v))
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _site(slab: Atoms, site: str, rng: np.random.Generator) -> np.ndarray:
    """(2,) x and y, in A, of a random site of the given kind."""
    if site == "random":
        return rng.uniform(size=2) @ slab.cell.array[:2, :2]
    surface = slab[slab.get_tags() == SURFACE]
    atom = int(rng.integers(len(surface)))
    origin = surface.positions[atom]
    spacing = surface.get_all_distances(mic=True)
    center, vectors = neighbor_list("iD", surface, cutoff=1.25 * spacing[spacing > 0].min())
    vectors = vectors[center == atom]
    pair = rng.permutation(len(vectors))[:2]
    if site == "top" or len(pair) == 0:
        return origin[:2]
    one = vectors[pair[0]]
    if site == "bridge":
        return (origin + one / 2)[:2]
    # Hollow: the middle of a triangle (60 degrees between two neighbours) or of a square (90 degrees).
    cosine = vectors @ one / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(one))
    corners = np.flatnonzero((cosine > -0.25) & (cosine < 0.75))
    if len(corners) == 0:
        return (origin + one / 2)[:2]
    other = corners[rng.integers(len(corners))]
    return (origin + (one + vectors[other]) / (3 if cosine[other] > 0.25 else 2))[:2]
