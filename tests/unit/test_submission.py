"""Predictions of all three tasks: files read back as the leaderboard's layout says; evaluation from end to end."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from oc20_records import attributes, new_graph, structures, write_lmdb
from toy import energies_only, make_dataset, samples, write_config

from egnscale.data.store import Store, write_store
from egnscale.launch import relaxation
from egnscale.launch.cli import main
from egnscale.launch.reference import emt_forces, made_with_emt, read_results, write_inputs
from egnscale.launch.relaxation import Potential
from egnscale.launch.relaxation_metrics import distance_score, force_score, largest_force, mean_distance
from egnscale.launch.relaxed_evaluation import trivial_energy
from egnscale.launch.run_files import load_trained
from egnscale.launch.submission import is2re_predictions, is2rs_predictions, s2ef_predictions, write_predictions

EMT_MADE = {"calculator": "ase.calculators.emt.EMT"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and a data set with both tasks' stores."""
    root = tmp_path_factory.mktemp("place")
    config = write_config(root / "config.yaml", make_dataset(root / "data", 8, 4), root / "run")
    assert main(["train", str(config), "optim.max_steps=4", "data.workers=0", "--json"]) == 0
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "val_id", "val_ood_ads")):
        made = [
            replace(
                sample,
                energy_relaxed=float(sample.energy or 0.0) - 0.5,
                positions_relaxed=sample.positions
                + np.where(sample.fixed[:, None], 0.0, rng.normal(scale=0.05, size=(sample.num_atoms, 3))),
            )
            for sample in samples(5, seed=10 + number, first_sid=100 * number)
        ]
        write_store(root / "data" / "is2re" / split, made, provenance=EMT_MADE)
    assert main(energies_only(root / "data", root / "direct")) == 0
    bare = [replace(sample, energy=None, forces=None) for sample in samples(3, first_sid=500)]
    write_store(root / "unlabelled", bare)
    return root


def evaluate(place: Path, data: str, *more: str, run: str = "run") -> list[str]:
    return ["evaluate", str(place / run), str(place / data), "--json", *more]


def splits_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float | None]]:
    """What a command's JSON has for each split."""
    capsys.readouterr()
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)["splits"]


RELAX = ("--steps", "3", "--fmax", "0.01")


def test_layouts(tmp_path: Path) -> None:
    forces = [np.full((n, 3), float(n)) for n in (2, 0, 3)]
    arrays = s2ef_predictions([(1, 0), (1, 7), (2, 0)], [0.1, 0.2, 0.3], forces)
    assert arrays["ids"].tolist() == ["1_0", "1_7", "2_0"]
    assert arrays["forces"].dtype == np.float16
    assert arrays["chunk_idx"].tolist() == [2, 2]
    assert [len(part) for part in np.split(arrays["forces"], arrays["chunk_idx"])] == [2, 0, 3]
    assert s2ef_predictions([(1, 0)], [0.1], forces[:1], full_precision=True)["forces"].dtype == np.float32
    assert is2re_predictions([5, 6], [1.0, 2.0])["ids"].tolist() == ["5", "6"]
    write_predictions(tmp_path / "one.npz", {"val_id": is2re_predictions([5], [1.0])})
    assert sorted(np.load(tmp_path / "one.npz").files) == ["energy", "ids"]
    splits = {
        name: is2rs_predictions([1, 2], [np.zeros((2, 3)), np.ones((3, 3))])
        for name in ("val_id", "val_ood_ads", "test_ood_cat", "ood_both")
    }
    write_predictions(tmp_path / "all.npz", splits)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(
            f"{split}_{name}"
            for split in ("id", "ood_ads", "ood_cat", "ood_both")
            for name in ("ids", "pos", "chunk_idx")
        )
        assert archive["ood_cat_pos"].shape == (5, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "one.npz"], "a temporary file is left"
    with pytest.raises(ValueError, match=r"\.npz"):
        write_predictions(tmp_path / "all.npy", splits)


def test_s2ef(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "s2ef.npz"
    assert main(evaluate(place, "data", "--predictions", str(file), "--full-precision", "--batch-size", "3")) == 0
    trained = load_trained(place / "run")
    potential = Potential.of(trained, "cpu")
    with np.load(file, allow_pickle=False) as archive:
        for split in ("id", "ood_ads"):
            store = Store(place / "data" / "s2ef" / f"val_{split}")
            parts = np.split(archive[f"{split}_forces"], archive[f"{split}_chunk_idx"])
            assert len(parts) == len(store) == len(archive[f"{split}_ids"])
            for index, part in enumerate(parts):
                sample = store[index]
                energy, forces = potential([sample])
                assert archive[f"{split}_ids"][index] == f"{sample.sid}_{sample.fid}"
                assert archive[f"{split}_energy"][index] == pytest.approx(energy.item(), abs=1e-5)
                assert np.allclose(part, forces.numpy()[~sample.fixed], atol=1e-5)


def test_s2ef_without_labels(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s2ef.npz"
    assert main(evaluate(place, "unlabelled", "--predictions", str(file))) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {}
    with np.load(file) as archive:
        assert archive["ids"].tolist() == ["500_0", "501_0", "502_0"]
        assert archive["forces"].dtype == np.float16


def test_is2rs_and_is2re_share_relaxations(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path / "out", tmp_path / "is2rs.npz"
    more = ("--out", str(out), *RELAX)
    assert main(evaluate(place, "data", "--task", "is2rs", "--predictions", str(file), *more)) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert list(splits) == ["val_id", "val_ood_ads"]
    with np.load(file, allow_pickle=False) as archive:
        for split, found in splits.items():
            store = Store(place / "data" / "is2re" / split)
            name = split.removeprefix("val_")
            predicted = np.split(archive[f"{name}_pos"], archive[f"{name}_chunk_idx"])
            adwt, initial, fbt, afbt = [], [], [], []
            for index, positions in enumerate(predicted):
                sample = store[index]
                assert archive[f"{name}_ids"][index] == str(sample.sid)
                assert sample.positions_relaxed is not None
                place_of = (sample.positions_relaxed, sample.cell, sample.pbc, ~sample.fixed)
                adwt.append(distance_score(mean_distance(positions, *place_of)))
                initial.append(distance_score(mean_distance(sample.positions, *place_of)))
                atoms = replace(sample, positions=positions).to_atoms()
                atoms.calc = EMT()
                force = largest_force(atoms.get_forces(apply_constraint=False), ~sample.fixed)
                fbt.append(force < 0.05)
                afbt.append(force_score(force))
            expected = [np.mean(adwt), np.mean(initial), np.mean(fbt), np.mean(afbt)]
            assert [found[key] for key in ("adwt", "adwt_initial", "fbt", "afbt")] == pytest.approx(expected)
            assert 0 < found["adwt_initial"] < 1
            assert found["structures"] == 5

    # The other task finds them there: nothing is relaxed again.
    def relax(*_: object, **__: object) -> None:
        raise AssertionError("relaxed again")

    monkeypatch.setattr(relaxation._Lane, "run", relax)
    file = tmp_path / "is2re.npz"
    assert main(evaluate(place, "data", "--task", "is2re", "--predictions", str(file), *more)) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    train = Store(place / "data" / "is2re" / "train").metadata["statistics"]["energy_relaxed"]["mean"]
    with np.load(file) as archive:
        store = Store(place / "data" / "is2re" / "val_id")
        targets = np.array([store[index].energy_relaxed for index in range(len(store))])
        assert splits["val_id"]["energy_mae"] == pytest.approx(np.abs(archive["id_energy"] - targets).mean())
        assert splits["val_id"]["energy_mse"] == pytest.approx(((archive["id_energy"] - targets) ** 2).mean())
        assert splits["val_id"]["energy_mae_mean"] == pytest.approx(np.abs(train - targets).mean())
        relaxed = ase.io.read(out / "val_id" / "relaxed.extxyz", ":")
        energies = [atoms.get_potential_energy() for atoms in relaxed]
        assert archive["id_energy"] == pytest.approx(energies, abs=1e-6)


def test_is2re_direct(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without forces predicts the relaxed energy from the initial structure."""
    file = tmp_path / "is2re.npz"
    more = ("--task", "is2re", "--predictions", str(file), "--batch-size", "2")
    found = splits_of(evaluate(place, "data", *more, run="direct"), capsys)["val_id"]
    potential = Potential.of(load_trained(place / "direct"), "cpu")
    store = Store(place / "data" / "is2re" / "val_id")
    errors = []
    with np.load(file) as archive:
        for index in range(len(store)):
            sample = store[index]
            energies, forces = potential.predict([sample])
            assert forces is None
            assert archive["id_energy"][index] == pytest.approx(energies.item(), abs=1e-5)
            assert sample.energy_relaxed is not None
            errors.append(abs(energies.item() - sample.energy_relaxed))
    assert found["energy_mae"] == pytest.approx(np.mean(errors), abs=1e-5)


@pytest.mark.parametrize(
    "more,expected",
    [
        ((), "the model predicts no forces; use --task is2re"),
        (("--predictions", "x.npz"), "the model predicts no forces; use --task is2re"),
        (("--task", "is2rs"), "the model predicts no forces; use --task is2re"),
        (("--task", "is2re", "--out", "x"), "--out keeps relaxations, and a model without forces makes none"),
        (("--task", "is2re", "--steps", "9"), "--steps is for relaxations, and a model without forces makes none"),
    ],
    ids=["s2ef", "predictions", "is2rs", "out", "steps"],
)
def test_what_a_model_without_forces_cannot_do(
    more: tuple[str, ...], expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(evaluate(place, "data", *more, run="direct")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_the_trivial_guess(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean of the training set beside a split, in OC20's files too; else of the checkpoint's own; else nothing."""

    def error(run: str, data: Path) -> float | None:
        words = evaluate(place, str(data), "--task", "is2re", *(RELAX if run == "run" else ()), run=run)
        return splits_of(words, capsys)["val_id"]["energy_mae_mean"]

    def trivial(mean: float) -> float:
        return float(np.mean([abs(sample.energy_relaxed - mean) for sample in made[4:]]))

    made = structures(7, seed=1)
    everything = tmp_path / "is2re" / "all"
    for split, some in (("train", made[:4]), ("val_id", made[4:])):
        (everything / split).mkdir(parents=True)
        records = [pickle.dumps(new_graph(attributes(sample)), protocol=-1) for sample in some]
        write_lmdb(everything / split / "data.lmdb", records)
    beside = float(np.mean([sample.energy_relaxed for sample in made[:4]]))
    own = load_trained(place / "direct").normalizer.energy_mean
    assert own == Store(place / "data" / "is2re" / "train").metadata["statistics"]["energy_relaxed"]["mean"]
    for run in ("run", "direct"):
        assert error(run, everything) == pytest.approx(trivial(beside), rel=1e-5)
    # Without labels of this kind it is no training set for this.
    shutil.rmtree(everything / "train")
    write_store(everything / "train", samples(2))
    assert error("run", everything) is None
    assert error("direct", everything) == pytest.approx(trivial(own), rel=1e-5)
    shutil.rmtree(everything / "train")
    assert error("run", everything) is None
    assert main(["evaluate", str(place / "run"), str(everything), "--task", "is2re", *RELAX]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "val_id" in line)
    assert row.split("│")[3].strip() == "-"
    # The means of what came from elsewhere are of other quantities.
    trained = load_trained(place / "direct")
    for key, value in (("init_from", "elsewhere"), ("normalizer", {"energy_mean": own}), ("name", "s2ef")):
        task = trained.run["config"]["task"] | {key: value}
        assert math.isnan(trivial_energy(tmp_path / "none", replace(trained, run={"config": {"task": task}})))
    assert math.isnan(trivial_energy(tmp_path / "none", replace(trained, run={})))


def test_forces_are_judged_without_relaxed_structures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(place / "data" / "is2re" / "val_id")
    bare = [replace(store[index], positions_relaxed=None) for index in range(len(store))]
    more = ("--task", "is2rs", *RELAX)
    whole = splits_of(evaluate(place, "data/is2re/val_id", *more), capsys)["val_id"]
    forces = ("fbt", "afbt", "forces_missing", "fbt_initial", "afbt_initial", "steps", "structures")
    distances = ("adwt", "adwt_initial", "positions_mae", "positions_mse")
    for provenance, reference in ((EMT_MADE, ()), (None, ("--reference", "emt"))):
        name = "made" if provenance else "given"
        write_store(tmp_path / name, bare, provenance=provenance)
        found = splits_of(evaluate(place, str(tmp_path / name), *more, *reference), capsys)[name]
        assert {key: found[key] for key in forces} == pytest.approx({key: whole[key] for key in forces})
        assert {found[key] for key in distances} == {None}
    assert main(evaluate(place, str(tmp_path / "made"), *more, "--reference", "none")) == 1
    assert "have no positions_relaxed" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["is2re", "is2rs"])
def test_relaxed_tasks_without_labels(
    task: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.npz"
    words = evaluate(place, "unlabelled", "--task", task, "--max-structures", "2", *RELAX)
    assert main(words) == 1
    assert "--predictions" in capsys.readouterr().err
    assert main([*words, "--predictions", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {}
    with np.load(file) as archive:
        assert archive["ids"].tolist() == ["500", "501"]


# ---------------------------------------------------------------------------------------------------------- reference


def test_reference_goes_out_and_comes_back(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--task", "is2rs", "--out", str(tmp_path / "out"), *RELAX)
    assert main(evaluate(place, "data", *more)) == 0
    by_emt = json.loads(capsys.readouterr().out)["splits"]
    inputs = tmp_path / "inputs"
    assert main(evaluate(place, "data", *more, "--reference-inputs", str(inputs))) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["val_id"]["fbt"] is None
    wanted = ase.io.read(inputs / "structures.extxyz", ":")
    assert len(wanted) == 10
    assert len((inputs / "index.csv").read_text().splitlines()) == 11
    for atoms in wanted:
        poscar = ase.io.read(inputs / "poscar" / str(atoms.info["sid"]) / "POSCAR")
        assert np.array_equal(poscar.numbers, atoms.numbers)
        assert np.allclose(poscar.positions, atoms.positions, atol=1e-6)
        assert np.array_equal(poscar.constraints[0].index, atoms.constraints[0].index)
    # The calculation "elsewhere": in another order, wrapped into the cell, one of them not done.
    results = []
    for atoms in reversed(wanted[1:]):
        atoms.set_constraint()
        atoms.calc = EMT()
        forces = atoms.get_forces()
        atoms.wrap()
        atoms.calc = SinglePointCalculator(atoms, forces=forces)
        results.append(atoms)
    ase.io.write(tmp_path / "results.extxyz", results)
    assert main(evaluate(place, "data", *more, "--reference-results", str(tmp_path / "results.extxyz"))) == 0
    read = json.loads(capsys.readouterr().out)["splits"]
    assert read["val_ood_ads"]["afbt"] == pytest.approx(by_emt["val_ood_ads"]["afbt"], abs=0.01)
    assert read["val_id"]["forces_missing"] == 1
    assert read["val_ood_ads"]["forces_missing"] == 0
    # A result of another structure is not taken for this one's.
    results[0].positions[0, 0] += 0.01
    ase.io.write(tmp_path / "results.extxyz", results)
    assert main(evaluate(place, "data", *more, "--reference-results", str(tmp_path / "results.extxyz"))) == 1
    assert "another structure, 0.01 A" in capsys.readouterr().err


def test_results_that_cannot_be_used(tmp_path: Path) -> None:
    sample = samples(1)[0]
    atoms = sample.to_atoms()
    for spoil, expected in (({}, "no sid"), ({"sid": 0}, None)):
        atoms.info = dict(spoil)
        ase.io.write(tmp_path / "results.extxyz", atoms)
        if expected:
            with pytest.raises(ValueError, match=expected):
                read_results(tmp_path / "results.extxyz")
    reference = read_results(tmp_path / "results.extxyz")
    forces = reference(sample)
    assert forces is not None
    assert forces == pytest.approx(sample.forces, abs=1e-6)
    assert reference(replace(sample, sid=9)) is None
    with pytest.raises(ValueError, match="other atoms"):
        reference(replace(sample, atomic_numbers=sample.atomic_numbers[::-1]))
    ase.io.write(tmp_path / "twice.extxyz", [atoms, atoms])
    with pytest.raises(ValueError, match="an earlier one has too"):
        read_results(tmp_path / "twice.extxyz")
    atoms.calc = None
    ase.io.write(tmp_path / "none.extxyz", atoms)
    with pytest.raises(ValueError, match="no forces"):
        read_results(tmp_path / "none.extxyz")


def test_emt_reference() -> None:
    sample = samples(1)[0]
    forces = emt_forces(sample)
    assert forces is not None
    assert forces == pytest.approx(sample.forces)
    beyond = sample.atomic_numbers.copy()
    beyond[0] = 26
    assert emt_forces(replace(sample, atomic_numbers=beyond)) is None, "EMT has no parameters for iron"
    assert made_with_emt({"provenance": EMT_MADE})
    assert not made_with_emt({"provenance": {"calculator": "VASP"}})
    assert not made_with_emt({})


def test_inputs_of_equal_sids_are_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results come back by sid. Nothing is relaxed or written before."""
    for split, first in (("val_id", 3), ("val_ood_ads", 4)):
        write_store(tmp_path / "is2re" / split, samples(2, first_sid=first))
    inputs = tmp_path / "in"
    more = ("--task", "is2rs", "--out", str(tmp_path / "out"), "--reference-inputs", str(inputs), *RELAX)
    assert main(evaluate(place, str(tmp_path), *more)) == 1
    assert "two structures have sid 4" in capsys.readouterr().err
    frames = [replace(sample, sid=3, fid=fid) for fid, sample in enumerate(samples(2))]
    with pytest.raises(ValueError, match="two structures have sid 3"):
        write_inputs(inputs, frames)
    assert not inputs.exists()
    assert not (tmp_path / "out").exists()
    assert main(evaluate(place, str(tmp_path / "is2re" / "val_id"), *more)) == 0
    assert sorted(path.name for path in (inputs / "poscar").iterdir()) == ["3", "4"]


def test_inputs_keep_order_and_constraints(tmp_path: Path) -> None:
    made = samples(2, first_sid=7)
    write_inputs(tmp_path / "in", made)
    write_inputs(tmp_path / "in", made)  # again: replaced
    for sample, atoms in zip(made, ase.io.read(tmp_path / "in" / "structures.extxyz", ":"), strict=True):
        assert atoms.info["sid"] == sample.sid
        assert np.array_equal(atoms.numbers, sample.atomic_numbers)
        assert atoms.calc is None


def test_test_splits_are_joined(place: Path, tmp_path: Path) -> None:
    """A directory of test stores, whose labels others keep, becomes one file."""
    for split in ("test_ood_ads", "test_id", "val"):
        shutil.copytree(place / "unlabelled", tmp_path / "data" / "is2re" / split)
    file = tmp_path / "out.npz"
    words = ["evaluate", str(place / "run"), str(tmp_path / "data"), "--json", "--task", "is2rs", *RELAX]
    assert main([*words, "--predictions", str(file)]) == 0
    with np.load(file) as archive:
        assert archive.files == ["id_ids", "id_pos", "id_chunk_idx", "ood_ads_ids", "ood_ads_pos", "ood_ads_chunk_idx"]
