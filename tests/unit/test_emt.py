"""The EMT builder: real energies and forces, honest splits, the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.data import covalent_radii
from ase.optimize import BFGS

from egnscale.data import emt_relax
from egnscale.data.emt import make_emt
from egnscale.data.emt_relax import clean_slab, gas_phase, place, relax_system
from egnscale.data.emt_systems import (
    ADSORBATES,
    FACETS,
    SITES,
    SIZES,
    SPLITS,
    EmtOptions,
    System,
    elements_of,
    generator,
    plan_systems,
)
from egnscale.data.neighbors import count_edges
from egnscale.data.store import Store
from egnscale.launch.cli import main

OPTIONS = EmtOptions(structures=20, seed=5, size=(3, 2, 3), max_steps=6)
COMMAND = ["--structures", "20", "--seed", "5", "--size", "3x2x3", "--max-steps", "6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emt") / "out"
    assert make_emt(out, OPTIONS, workers=2)["status"] == "made"
    return out


@pytest.fixture(scope="module")
def stores(made: Path) -> dict[str, Store]:
    return {f"{task}/{split}": Store(made / task / split) for task in ("s2ef", "is2re") for split in SPLITS}


def _bytes(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("structures", [20, 57, 200])
def test_splits_are_what_their_names_say(structures: int, seed: int) -> None:
    plan = plan_systems(EmtOptions(structures=structures, seed=seed))
    assert [system.sid for system in plan.systems] == list(range(structures))
    metals, adsorbates, elements = (defaultdict(set) for _ in range(3))
    for system in plan.systems:
        chemical = frozenset(symbol for symbol, _ in system.metals)
        metals[system.split].add(chemical)
        adsorbates[system.split].add(system.adsorbate)
        elements[system.split] |= chemical | elements_of(system.adsorbate)
    assert set(metals) == set(SPLITS)
    seen_metals, seen_adsorbates = metals["train"] | metals["val_id"], adsorbates["train"] | adsorbates["val_id"]
    for split in SPLITS:
        assert elements[split] <= elements["train"]
        new_metals, new_adsorbates = metals[split] - seen_metals, adsorbates[split] - seen_adsorbates
        held_metals = {frozenset(name.split("-")) for name in plan.held_out_metals}
        if split in ("val_ood_cat", "val_ood_both"):
            assert new_metals == metals[split] <= held_metals
        else:
            assert not metals[split] & held_metals
        if split in ("val_ood_ads", "val_ood_both"):
            assert new_adsorbates == adsorbates[split] <= set(plan.held_out_adsorbates)
        else:
            assert not adsorbates[split] & set(plan.held_out_adsorbates)
    assert 0.65 < sum(system.split == "train" for system in plan.systems) / structures < 0.75


@pytest.mark.parametrize("seed", range(10))
def test_the_only_bearer_of_an_element_stays_in_training(seed: int) -> None:
    plan = plan_systems(EmtOptions(seed=seed, adsorbates=("N", "CO", "C", "O", "H")))
    assert len(plan.held_out_adsorbates) == 1
    assert not {"N", "H"} & set(plan.held_out_adsorbates)


def test_the_seed_decides() -> None:
    one, same, other = (plan_systems(EmtOptions(seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one.systems != other.systems
    assert len({plan_systems(EmtOptions(seed=seed)).held_out_adsorbates for seed in range(10)}) > 5


def test_one_metal_has_no_split_of_other_metals() -> None:
    plan = plan_systems(EmtOptions(metals=("Cu",)))
    assert {system.split for system in plan.systems} == {"train", "val_id", "val_ood_ads"}
    assert plan.held_out_metals == ()
    assert len(plan.systems) == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": 19}, "at least 20"),
        ({"metals": ("Cu", "Fe")}, "unknown metal Fe; choose from Cu"),
        ({"adsorbates": ("CO", "C60")}, "unknown adsorbate C60"),
        ({"metals": ("Cu", "Cu")}, "named twice"),
        ({"metals": ()}, "no metal"),
        ({"size": (3, 3, 2)}, "3x3x2"),
        ({"seed": -1}, "seed is -1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"rattle": -0.1}, "rattle is -0.1"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmtOptions(**changes)


# -------------------------------------------------------------------------------------------------- slabs, placing


# A step of fcc211 is three atoms long.
@pytest.mark.parametrize(
    ("facet", "size"),
    [(facet, size) for facet in FACETS for size in [(3, 2, 3), *SIZES] if facet != "fcc211" or size[0] % 3 == 0],
)
def test_slabs_are_tagged_and_fixed_as_oc20_does(facet: str, size: tuple[int, int, int]) -> None:
    system = System(0, "train", (("Cu", 3), ("Pt", 1)), facet, size, "CO", "top")
    slab = clean_slab(system, generator(0, 0))
    assert len(slab) == np.prod(size)
    assert slab.pbc.all()
    assert abs((slab.symbols == "Pt").sum() - len(slab) / 4) <= 0.5
    tags, height = slab.get_tags(), slab.positions[:, 2]
    assert set(tags) == {0, 1}
    assert tags[height > height.max() - 0.1].all()
    assert height[tags == 1].min() > height.mean()
    assert slab.constraints[0].index.tolist() == np.flatnonzero(tags == 0).tolist()
    assert slab.cell.lengths()[2] - np.ptp(height) == pytest.approx(20)


@pytest.mark.parametrize("facet", FACETS)
@pytest.mark.parametrize("site", SITES)
def test_adsorbates_start_in_touch_with_the_surface(facet: str, site: str) -> None:
    for seed in range(5):
        system = System(seed, "train", (("Cu", 1),), facet, (3, 3, 3), "CH2O", site)
        rng = generator(seed, 0)
        slab = clean_slab(system, rng)
        atoms = place(slab, gas_phase("CH2O")[0], site, rng)
        added = np.flatnonzero(atoms.get_tags() == 2)
        assert atoms.symbols[added].get_chemical_formula() == "CH2O"
        radii = np.where(atoms.numbers == 1, 0.65, covalent_radii[atoms.numbers])
        ratio = [
            (atoms.get_distances(i, range(len(slab)), mic=True) / (radii[i] + radii[: len(slab)])).min() for i in added
        ]
        assert min(ratio) == pytest.approx(1.0, abs=1e-9)
        inside = atoms.get_all_distances()[np.ix_(added, added)]
        np.testing.assert_allclose(inside, gas_phase("CH2O")[0].get_all_distances(), atol=1e-9)


def test_sites_are_where_they_should_be() -> None:
    slab = clean_slab(System(0, "train", (("Cu", 1),), "fcc100", (4, 4, 3), "H", "top"), generator(0, 0))
    spacing = 3.61 / np.sqrt(2)
    for site, expected in (("top", 0.0), ("bridge", spacing / 2), ("hollow", spacing / np.sqrt(2))):
        for seed in range(5):
            point = emt_relax._site(slab, site, np.random.default_rng(seed))
            probe = slab[slab.get_tags() == 1] + Atoms("H", [[*point, slab.positions[:, 2].max()]])
            assert probe.get_distances(-1, range(len(probe) - 1), mic=True).min() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------ energies, forces


def test_every_adsorbate_is_a_molecule_with_emt() -> None:
    """Relaxed, no atom leaves its molecule, and what it is made of is what its name says."""
    for name in ADSORBATES:
        atoms, energy = gas_phase(name)
        assert sorted(atoms.symbols) == sorted(Atoms(name).symbols)
        assert np.isfinite(energy)
        distances = atoms.get_all_distances() + 9 * np.eye(len(atoms))
        assert len(atoms) == 1 or distances.min(axis=1).max() < 1.6, name


def test_energies_are_adsorption_energies(stores: dict[str, Store]) -> None:
    """E = E(slab + adsorbate) - E(relaxed clean slab) - E(gas), each computed here with ASE alone."""
    systems = plan_systems(OPTIONS).systems
    for name in ("s2ef/train", "s2ef/val_ood_both"):
        store = stores[name]
        sample = store[0]
        system = systems[sample.sid]
        slab = clean_slab(system, generator(OPTIONS.seed, system.sid, 1))
        slab.calc = EMT()
        BFGS(slab, logfile=None).run(fmax=0.01, steps=300)
        gas_name = ADSORBATES[system.adsorbate]
        gas = Atoms(gas_name) if len(Atoms(system.adsorbate)) == 1 else molecule(gas_name)
        gas.calc = EMT()
        BFGS(gas, logfile=None).run(fmax=0.005, steps=500)
        # Two optimizers stop at slightly different points of the same minimum.
        reference = slab.get_potential_energy() + gas.get_potential_energy()
        for i in np.flatnonzero(store.sid == sample.sid):
            atoms = store[int(i)].to_atoms()
            atoms.calc = EMT()
            assert store[int(i)].energy == pytest.approx(atoms.get_potential_energy() - reference, abs=0.02)


def test_frames_differ_by_exactly_what_emt_says(stores: dict[str, Store]) -> None:
    for store in stores.values():
        offsets = defaultdict(list)
        for i in range(0, len(store), 3):
            sample = store[i]
            atoms = sample.to_atoms()
            atoms.calc = EMT()
            offsets[sample.sid].append(sample.energy - atoms.get_potential_energy())
            np.testing.assert_allclose(sample.forces, atoms.get_forces(apply_constraint=False), rtol=1e-6, atol=1e-7)
        for values in offsets.values():
            assert np.ptp(values) < 1e-9


def test_forces_are_minus_the_gradient(stores: dict[str, Store]) -> None:
    sample = stores["s2ef/train"][0]
    atoms = sample.to_atoms()
    atoms.calc = EMT()
    assert sample.fixed.any()
    for atom in (int(np.flatnonzero(sample.tags == 2)[0]), int(np.flatnonzero(sample.fixed)[0])):
        for axis in range(3):
            energy = []
            for step in (1e-4, -1e-4):
                atoms.positions = sample.positions
                atoms.positions[atom, axis] += step
                energy.append(atoms.get_potential_energy())
            assert sample.forces[atom, axis] == pytest.approx(-(energy[0] - energy[1]) / 2e-4, abs=1e-5)


def test_samples_are_as_oc20_has_them(stores: dict[str, Store]) -> None:
    for name, store in stores.items():
        for i in range(len(store)):
            sample = store[i]
            assert sample.pbc.all()
            np.testing.assert_array_equal(sample.fixed, sample.tags == 0)
            assert set(sample.tags) == {0, 1, 2}
            assert abs(sample.energy) <= 10
            assert np.linalg.norm(sample.forces, axis=1).max() <= 50
            assert (sample.energy_relaxed is None) == (sample.positions_relaxed is None) == name.startswith("s2ef")
            if i % 5 == 0:
                assert count_edges(sample) == store.num_edges[i]


def test_first_and_last_frames_make_is2re(stores: dict[str, Store]) -> None:
    for split in SPLITS:
        frames, relaxed = stores[f"s2ef/{split}"], stores[f"is2re/{split}"]
        assert sorted(set(frames.sid)) == relaxed.sid.tolist()
        for i in range(len(relaxed)):
            sample = relaxed[i]
            mine = np.flatnonzero(frames.sid == sample.sid)
            assert frames.fid[mine].tolist() == list(range(len(mine)))
            first, last = frames[int(mine[0])], frames[int(mine[-1])]
            assert (sample.energy, sample.energy_relaxed) == (first.energy, last.energy)
            np.testing.assert_array_equal(sample.positions, first.positions)
            np.testing.assert_array_equal(sample.positions_relaxed, last.positions)
            np.testing.assert_array_equal(first.positions[first.fixed], last.positions[first.fixed])
            assert last.energy < first.energy


def test_splits_share_no_system(stores: dict[str, Store]) -> None:
    sids = [sid for split in SPLITS for sid in set(stores[f"s2ef/{split}"].sid.tolist())]
    assert sorted(sids) == list(range(20))
    elements = {split: set(stores[f"s2ef/{split}"].metadata["statistics"]["elements"]) for split in SPLITS}
    assert all(some <= elements["train"] for some in elements.values())


def test_filters_drop_frames_and_place_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    system = plan_systems(OPTIONS).systems[0]
    usual = relax_system(system, OPTIONS)
    assert (usual.attempts, usual.dropped) == (1, 0)
    limit = 0.99 * np.linalg.norm(usual.frames[0].forces, axis=1).max()
    monkeypatch.setattr(emt_relax, "MAX_FORCE", limit)
    strict = relax_system(system, OPTIONS)
    assert strict.attempts > 1
    assert strict.dropped >= 1
    assert all(np.linalg.norm(frame.forces, axis=1).max() <= limit for frame in strict.frames)
    monkeypatch.setattr(emt_relax, "MAX_ENERGY", -1.0)
    with pytest.raises(ValueError, match=r"system 0 \(.* on .* 3x2x3\): 10 placements"):
        relax_system(system, OPTIONS)


# ----------------------------------------------------------------------------------------- building, and again


def test_the_number_of_workers_does_not_matter(made: Path, tmp_path: Path) -> None:
    make_emt(tmp_path / "out", OPTIONS, workers=1)
    assert _bytes(tmp_path / "out") == _bytes(made)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_build_goes_on(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "egnscale.launch.cli", "data", "make", str(out), *COMMAND, "--workers", "2"]
    build = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    finished = out / ".build" / "systems"
    try:
        deadline = time.monotonic() + 60
        while len(list(finished.glob("[0-9]*.npz"))) < 5:
            assert build.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(OSError, match="another process is building"):
            make_emt(out, OPTIONS)
        workers = _children(build.pid)
    finally:
        build.send_signal(signal.SIGKILL)
        build.wait()
    assert not (out / "build.json").exists()
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    with pytest.raises(ValueError, match="begun with seed 5, not 6"):
        make_emt(out, replace(OPTIONS, seed=6))
    kept = sorted(finished.glob("[0-9]*.npz"))
    damaged, *rest = kept
    damaged.write_bytes(damaged.read_bytes()[:-50])
    before = {file: file.stat().st_ino for file in rest}
    touched: dict[Path, int] = {}
    make_emt(out, OPTIONS, progress=lambda done, total: touched.update({f: f.stat().st_ino for f in rest}))
    assert touched == before, "finished systems were relaxed again"
    assert _bytes(out) == _bytes(made)


def test_a_finished_build_is_left_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    assert main(["data", "make", str(made), *COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "already there"
    assert main(["data", "make", str(made), *COMMAND, "--metals", "Cu,Pt"]) == 1
    assert "was made with metals" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(FileExistsError, match="is not an EMT data set"):
        make_emt(tmp_path, OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_info_on_all_splits_and_on_one(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(made), "--verify", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["stores"]) == [f"{task}/{split}" for task in ("s2ef", "is2re") for split in SPLITS]
    assert sum(result["stores"][f"is2re/{split}"]["systems"] for split in SPLITS) == 20
    train = Store(made / "s2ef" / "train")
    assert result["stores"]["s2ef/train"]["structures"] == len(train)
    assert result["stores"]["s2ef/train"]["edges"] == train.num_edges.sum()
    assert main(["data", "info", str(made / "s2ef" / "train")]) == 0
    assert f" {train.num_atoms.sum():,} " in capsys.readouterr().out


def test_info_verify_names_the_damaged_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "set"
    os.makedirs(copy)
    for file in (made / "is2re" / "train").iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".lmdb":
            content[-1] ^= 1
        (copy / file.name).write_bytes(content)
    assert main(["data", "info", str(copy), "--verify"]) == 1
    assert "data.0000.lmdb is not as it was written" in capsys.readouterr().err
