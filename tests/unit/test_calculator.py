"""The ASE calculator gives what evaluation gives, and behaves as ASE expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.optimize import BFGS
from toy import labelled, make_dataset, slab, write_config

from egnscale.data.batch import Collate
from egnscale.launch import Calculator
from egnscale.launch.cli import main
from egnscale.launch.loading import graph_spec
from egnscale.launch.run_files import load_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    config = write_config(root / "config.yaml", make_dataset(root / "data", 6, 2), root / "run")
    assert main(["train", str(config), "optim.max_steps=4", "data.workers=0", "--json"]) == 0
    return root / "run"


def test_agrees_with_the_model(run: Path) -> None:
    trained = load_trained(run)
    collate = Collate(graph_spec(trained.model.config), dtype=torch.float64)
    atoms = [slab("Cu"), slab("Pt", seed=3, stepped=True)]
    graph, _ = collate([labelled(one) for one in atoms])
    with torch.no_grad():
        expected = trained.normalizer.physical(trained.model.double()(graph))
    first = 0
    for index, one in enumerate(atoms):
        one.calc = Calculator(run, device="cpu", dtype=torch.float64)
        one.set_constraint()
        assert one.get_potential_energy() == pytest.approx(expected.energy[index].item(), rel=1e-10)
        wanted = expected.forces[first : first + len(one)].numpy()
        assert np.allclose(one.get_forces(), wanted, rtol=1e-9, atol=1e-12)
        first += len(one)


def test_drives_a_relaxation_and_leaves_fixed_atoms(run: Path) -> None:
    atoms = slab("Ni")
    atoms.calc = Calculator(run, device="cpu")
    fixed = atoms.constraints[0].index
    before = atoms.positions.copy()
    BFGS(atoms, logfile=None).run(fmax=0.01, steps=3)
    assert np.array_equal(atoms.positions[fixed], before[fixed])
    assert not np.allclose(atoms.positions, before)


def test_follows_changes(run: Path) -> None:
    atoms = slab("Ag")
    atoms.calc = Calculator(run, device="cpu")
    energy = atoms.get_potential_energy()
    atoms.positions[-1] += 0.2
    assert atoms.get_potential_energy() != energy


def test_single_atom_and_molecule_without_cell(run: Path) -> None:
    from ase import Atoms
    from ase.build import molecule

    for atoms in (Atoms("O", positions=[[0.0, 0.0, 0.0]]), molecule("H2O")):
        atoms.calc = Calculator(run, device="cpu")
        assert np.isfinite(atoms.get_potential_energy())
        assert atoms.get_forces().shape == (len(atoms), 3)


def test_importing_it_does_not_import_deepspeed() -> None:
    import subprocess
    import sys

    code = "import sys; from egnscale.launch import Calculator; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
