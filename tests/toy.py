"""Small real structures for tests: slabs with an adsorbate, energies and forces from ASE's EMT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111, fcc211
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

from egnscale.data.sample import Sample
from egnscale.data.store import write_store

METALS = ("Cu", "Pt", "Ag", "Ni", "Pd", "Au")


def slab(metal: str = "Cu", size: tuple[int, int, int] = (2, 2, 3), *, seed: int = 0, stepped: bool = False) -> Atoms:
    """A rattled slab with OH on top, tagged and fixed as in OC20."""
    atoms = fcc211(metal, (3, 2, 2), vacuum=8.0) if stepped else fcc111(metal, size, vacuum=8.0)
    height = atoms.positions[:, 2]
    tags = np.where(height > height.max() - 1.0, 1, 0)
    atoms.set_tags(tags)
    where = atoms.positions[int(np.argmax(height)), :2]
    add_adsorbate(atoms, "O", 1.6, position=where)
    add_adsorbate(atoms, "H", 2.5, position=where + 0.3)
    tags = atoms.get_tags()
    tags[-2:] = 2
    atoms.set_tags(tags)
    atoms.pbc = True
    atoms.set_constraint(FixAtoms(mask=atoms.positions[:, 2] < height.min() + 1.0))
    atoms.rattle(0.08, seed=seed)
    return atoms


def labelled(atoms: Atoms, sid: int = 0, fid: int = 0) -> Sample:
    """The sample of a structure, with EMT's energy (shifted to be of order 1 eV) and unconstrained forces."""
    atoms = atoms.copy()
    atoms.calc = EMT()
    energy = atoms.get_potential_energy(apply_constraint=False)
    forces = atoms.get_forces(apply_constraint=False)
    sample = Sample.from_atoms(atoms, sid=sid, fid=fid)
    return Sample(**{**sample.__dict__, "energy": float(energy) / 10, "forces": forces})


def samples(count: int, *, seed: int = 0, first_sid: int = 0) -> list[Sample]:
    """Labelled slabs of several metals and sizes."""
    made = []
    for index in range(count):
        size = ((2, 2, 3), (2, 2, 4), (3, 2, 3))[index % 3]
        atoms = slab(METALS[index % len(METALS)], size, seed=1000 * seed + index, stepped=index % 7 == 6)
        made.append(labelled(atoms, sid=first_sid + index))
    return made


def make_dataset(path: Path, train: int = 16, val: int = 6) -> Path:
    """A data set in the builder's layout: path/s2ef/{train,val_id,val_ood_ads}."""
    write_store(path / "s2ef" / "train", samples(train))
    write_store(path / "s2ef" / "val_id", samples(val, seed=1, first_sid=1000))
    write_store(path / "s2ef" / "val_ood_ads", samples(val, seed=2, first_sid=2000))
    return path


def relaxed(sample: Sample) -> Sample:
    """With a made-up relaxed structure, and an energy that depends on it."""
    positions = sample.positions + 0.05 * np.sin(sample.positions) * ~sample.fixed[:, None]
    assert sample.energy is not None
    return replace(sample, energy_relaxed=0.8 * sample.energy - 0.1, positions_relaxed=positions)


def make_relaxed_dataset(path: Path, train: int = 16, val: int = 6) -> Path:
    """path/is2re/{train,val_id}."""
    for name, count, seed in (("train", train, 0), ("val_id", val, 1)):
        write_store(path / "is2re" / name, [relaxed(sample) for sample in samples(count, seed=seed)])
    return path


CONFIG = """\
model: {{num_blocks: 1, emb_size_atom: 8, emb_size_edge: 12, emb_size_trip: 6, emb_size_bil_trip: 5, num_radial: 8,
        emb_size_rbf: 4, emb_size_cbf: 4, num_spherical: 4, cutoff: 4.0, max_neighbors: 20}}
data: {{train: {data}/s2ef/train, val: {data}/s2ef}}
task: {{name: s2ef, output: {output}, force_coefficient: 10.0, seed: 1, eval_every: 4, checkpoint_every: 4,
       log_every: 1}}
optim: {{batch_size: 2, max_steps: 8, lr_initial: 0.002, weight_decay: 0.01, ema_decay: 0.9, clip_grad_norm: 10.0,
        scheduler: {{name: cosine, warmup_steps: 2}}}}
parallel: {{zero: 0}}
"""


def write_config(path: Path, data: Path, output: Path) -> Path:
    path.write_text(CONFIG.format(data=data, output=output))
    return path


def energies_only(data: Path, output: Path) -> list[str]:
    """Arguments of `egnscale train` for a model without forces, of data/is2re."""
    config = write_config(output.with_suffix(".yaml"), data, output)
    task = ["task.name=is2re", f"data.train={data}/is2re/train", f"data.val={data}/is2re", "optim.max_steps=4"]
    return ["train", str(config), *task, "data.workers=0", "--json"]
