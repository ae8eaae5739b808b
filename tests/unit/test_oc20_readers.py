"""Data of OC20 and ASE: what was written is what is read, and what is not data says so in one line."""

from __future__ import annotations

import lzma
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import lmdb
import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms
from ase.io.trajectory import Trajectory
from oc20_records import (
    attributes,
    new_graph,
    old_graph,
    structures,
    to_atoms,
    write_aselmdb,
    write_lmdb,
    write_oc20,
    write_raw,
)

from egnscale.data.ase_files import AseDatabase, AseFiles
from egnscale.data.aselmdb import AseLmdb
from egnscale.data.oc20 import OC20Lmdb
from egnscale.data.oc20_raw import OC20Raw
from egnscale.data.readers import open_source
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, IndexedSource, Source
from egnscale.data.store import write_store


def assert_same(one: Sample, other: Sample, but: tuple[str, ...] = (), tolerance: float = 0.0) -> None:
    for field in fields(Sample):
        if field.name in but:
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=field.name)
        else:
            assert a == pytest.approx(b, abs=tolerance), field.name


def all_of(source: Source) -> list[Sample]:
    read = list(source.read(0, source.num_units))
    bad = [sample for sample in read if isinstance(sample, BadSample)]
    assert not bad, bad
    return read  # type: ignore[return-value]


RELAXED = ("energy_relaxed", "positions_relaxed")


@pytest.fixture
def samples() -> list[Sample]:
    return structures(7)


# ---------------------------------------------------------------------------------------------------------- OC20's LMDB


@pytest.mark.parametrize("modern", [False, True])
def test_s2ef_directory(samples: list[Sample], tmp_path: Path, modern: bool) -> None:
    source = open_source(write_oc20(tmp_path / "train", samples, shards=3, modern=modern))
    assert isinstance(source, OC20Lmdb)
    assert len(source) == 7
    for i, sample in enumerate(samples):
        assert_same(source[i], sample)
        assert_same(source[i - 7], sample)
    assert_same(pickle.loads(pickle.dumps(source))[4], samples[4])
    with pytest.raises(IndexError, match="7 structures"):
        source[7]
    # What is read does not depend on how it was divided.
    for one, other in zip([*source.read(0, 2), *source.read(2, 7)], samples, strict=True):
        assert isinstance(one, Sample)
        assert_same(one, other)


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("layout", [new_graph, old_graph])
def test_is2re_file(
    samples: list[Sample], tmp_path: Path, layout: Callable[[dict[str, Any]], Any], length: bool
) -> None:
    records = []
    for sample in samples:
        values = attributes(sample)
        values["y_init"] = values.pop("y")
        del values["force"], values["fid"]
        records.append(pickle.dumps(layout(values), protocol=-1))
    source = open_source(write_lmdb(tmp_path / "data.lmdb", records, length=length))
    for one, other in zip(all_of(source), samples, strict=True):
        assert_same(one, replace(other, forces=None, fid=0))


def test_more_than_ten_records_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    samples = structures(25)
    source = open_source(write_oc20(tmp_path / "train", samples, shards=1))
    for one, other in zip(all_of(source), samples, strict=True):
        assert_same(one, other)


def test_test_splits_have_no_labels(samples: list[Sample], tmp_path: Path) -> None:
    values = attributes(samples[0], relaxed=False)
    del values["y"], values["force"]
    source = open_source(write_lmdb(tmp_path / "data.lmdb", [pickle.dumps(new_graph(values))]))
    assert isinstance(source, IndexedSource)
    wanted = replace(samples[0], energy=None, forces=None, energy_relaxed=None, positions_relaxed=None)
    assert_same(source[0], wanted)


def test_what_may_be_missing(samples: list[Sample], tmp_path: Path) -> None:
    values = {name: attributes(samples[0])[name] for name in ("pos", "cell", "atomic_numbers")}
    values["pbc"] = torch.tensor([[True, True, False]])
    source = open_source(write_lmdb(tmp_path / "data.lmdb", [pickle.dumps(new_graph(values))] * 3))
    assert isinstance(source, IndexedSource)
    sample = source[2]
    assert (sample.sid, sample.fid, sample.energy, sample.forces) == (2, 0, None, None)
    assert sample.pbc.tolist() == [True, True, False]
    assert not sample.tags.any()
    assert not sample.fixed.any()


def spoilt(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {name: value for name, value in (values | changes).items() if value is not None}


BAD = {
    "no positions": (spoilt(pos=None), "has no pos", "missing attribute"),
    "no cell": (spoilt(cell=None), "has no cell", "missing attribute"),
    "no elements": (spoilt(atomic_numbers=None), "has no atomic_numbers", "missing attribute"),
    "cell of another shape": (spoilt(cell=torch.zeros(2, 3, 3)), "cell has shape (2, 3, 3)", "wrong shape"),
    "positions of fewer atoms": (spoilt(pos=torch.zeros(1, 3)), "pos has shape (1, 3)", "wrong shape"),
    "forces of fewer atoms": (spoilt(force=torch.zeros(1, 3)), "force has shape (1, 3)", "wrong shape"),
    "natoms": (spoilt(natoms=1), "natoms is 1", "wrong shape"),
    "NaN force": (lambda v: v | {"force": v["force"] * np.nan}, "forces is not finite", "values not finite"),
    "NaN energy": (spoilt(y=float("nan")), "energy is nan", "energy not finite"),
    "two energies": (spoilt(y=torch.zeros(2)), "y has 2 values", "wrong shape"),
    "energy of text": (spoilt(y="low"), "y is not made of numbers", "wrong values"),
    "zero cell": (spoilt(cell=torch.zeros(1, 3, 3)), "linearly dependent", "cell without volume"),
    "no such element": (lambda v: v | {"atomic_numbers": v["atomic_numbers"] * 0}, "atomic number 0", "no element"),
    "half an element": (lambda v: v | {"atomic_numbers": v["atomic_numbers"] + 0.5}, "integers", "wrong values"),
    "fixed twice": (lambda v: v | {"fixed": v["fixed"] * 0 + 2}, "fixed is something else", "wrong values"),
    "tiny cell": (spoilt(cell=torch.eye(3)[None] * 1e-12), "A^3", "implausible geometry"),
    "thin cell": (lambda v: v | {"cell": v["cell"] * torch.tensor([1e4, 1.0, 0.01])}, " high", "implausible geometry"),
    "far away": (lambda v: v | {"pos": v["pos"] * 1e30}, "A", "implausible geometry"),
    "tag 300": (lambda v: v | {"tags": v["tags"] * 0 + 300}, "tags reach 300", "does not fit"),
    "huge force": (lambda v: v | {"force": v["force"].double() * 1e40}, "forces reach", "does not fit"),
    "no atoms": (
        spoilt(atomic_numbers=torch.zeros(0), natoms=0, pos=torch.zeros(0, 3), tags=torch.zeros(0),
               fixed=torch.zeros(0), force=torch.zeros(0, 3), pos_relaxed=torch.zeros(0, 3)),
        "no atoms", "no atoms",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_structures_are_named(case: str, samples: list[Sample], tmp_path: Path) -> None:
    spoil, words, kind = BAD[case]
    good = attributes(samples[0])
    records = [pickle.dumps(new_graph(values)) for values in (good, spoil(good), good)]
    source = open_source(write_lmdb(tmp_path / "data.0000.lmdb", records))
    first, bad, last = source.read(0, 3)
    for sample in (first, last):
        assert isinstance(sample, Sample)
        assert_same(sample, samples[0])
    assert isinstance(bad, BadSample)
    assert str(bad).startswith(f"{tmp_path}/data.0000.lmdb: structure 1")
    assert words in str(bad)
    assert bad.kind == kind
    assert "\n" not in str(bad)
    copy = pickle.loads(pickle.dumps(bad))
    assert (str(copy), copy.kind) == (str(bad), kind)


# ------------------------------------------------------------------------------------------------------- raw OC20 files


@pytest.mark.parametrize("ending", ["", ".xz"])
@pytest.mark.parametrize("total", [False, True])
def test_raw_directory(samples: list[Sample], tmp_path: Path, ending: str, total: bool) -> None:
    for name, some in (("2", samples[:3]), ("10", samples[3:])):
        file = write_raw(tmp_path / "raw", name, some, -321.5, ending)
    if not ending:
        assert "move_mask" in file.read_text()
    source = open_source(tmp_path / "raw", total_energies=total)
    assert isinstance(source, OC20Raw)
    for one, other in zip(all_of(source), samples, strict=True):
        wanted = replace(other, energy=other.energy - 321.5) if total else other
        assert_same(one, wanted, but=RELAXED, tolerance=2e-8)
    assert len(all_of(open_source(file, total_energies=total))) == 4


def test_raw_files_that_do_not_fit(samples: list[Sample], tmp_path: Path) -> None:
    file = write_raw(tmp_path / "raw", "0", samples, 1.0)
    labels = file.with_suffix(".txt")
    lines = labels.read_text().splitlines()

    def reasons() -> list[str]:
        read = list(open_source(file).read(0, 1))
        return [str(sample).removeprefix(str(file)) for sample in read if isinstance(sample, BadSample)]

    labels.write_text("\n".join(lines[:5]))
    assert reasons() == [" has more than the 5 frames of 0.txt"]
    labels.write_text("\n".join([*lines, lines[0]]))
    assert reasons()[0].endswith("0.txt has more than the 7 frames of 0.extxyz")
    labels.write_text("\n".join([lines[0], "nonsense", *lines[2:]]))
    (reason,) = reasons()
    assert reason.startswith(": frame 1 cannot be read: its line 'nonsense'")
    labels.write_text("\n".join([*lines[:6], "random1,frame2,nan"]))
    (reason,) = reasons()
    assert reason == ": frame 6 cannot be read: its reference energy is nan"
    labels.write_text("\n".join(lines))
    content = file.read_text().splitlines(keepends=True)
    bad = next(i for i, line in enumerate(content) if i > 12 and len(line.split()) > 7)
    content[bad] = "Xx zero 0 0\n"
    file.write_text("".join(content))
    (reason,) = reasons()
    assert "frame 1 cannot be read" in reason
    file.write_text("".join(content[:-2]))
    assert "frame 6 and what follows cannot be read: it is cut short" in reasons()[-1]
    packed = lzma.compress(file.read_bytes())
    file.unlink()
    file = file.with_name("0.extxyz.xz")
    file.write_bytes(packed[: len(packed) // 2])
    assert "and what follows cannot be read" in reasons()[-1]


# ----------------------------------------------------------------------------------------------------------------- ASE


@pytest.mark.parametrize("plain", [False, True])
def test_aselmdb(samples: list[Sample], tmp_path: Path, plain: bool) -> None:
    for name, some in (("a", samples[:3]), ("b", samples[3:])):
        file = write_aselmdb(tmp_path / "set" / f"{name}.aselmdb", some, plain=plain)
    source = open_source(tmp_path / "set")
    assert isinstance(source, AseLmdb)
    for one, other in zip(all_of(source), samples, strict=True):
        assert_same(one, other, but=RELAXED)
    assert len(all_of(open_source(file))) == 4


def test_aselmdb_without_ids(samples: list[Sample], tmp_path: Path) -> None:
    source = open_source(write_aselmdb(tmp_path / "set" / "a.aselmdb", samples, ids=False))
    assert [(sample.sid, sample.fid) for sample in all_of(source)] == [(i, 0) for i in range(7)]


ROWS = {
    "not compressed": b"{}",
    "cut short": zlib.compress(b"{}")[:-3],
    "not JSON": zlib.compress(b"{"),
    "deep JSON": zlib.compress(b"[" * 200_000),
    "a list": zlib.compress(b"[1]"),
    "empty": zlib.compress(b"{}"),
    "text for numbers": zlib.compress(b'{"numbers": "H"}'),
    "ragged": zlib.compress(b'{"numbers": [1], "positions": [[1], [1, 2]]}'),
    "huge number": zlib.compress(b'{"numbers": [1' + b"0" * 400 + b"]}"),
    "a constraint of text": zlib.compress(b'{"numbers": [1], "constraints": ["FixAtoms"]}'),
    "a bomb": zlib.compress(b"[" + b" " * (1 << 24) + b"1]"),
}


@pytest.mark.parametrize("case", ROWS)
def test_damaged_rows(case: str, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egnscale.data.aselmdb.MAX_ROW_BYTES", 1 << 22)
    file = write_aselmdb(tmp_path / "a.aselmdb", samples)
    environment = lmdb.open(str(file), subdir=False, lock=False, map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        transaction.put(b"3", ROWS[case])
    environment.close()
    read = list(open_source(file).read(0, 7))
    (bad,) = [sample for sample in read if isinstance(sample, BadSample)]
    assert isinstance(read[1], BadSample)
    assert str(bad).startswith(f"{file}: row 3 cannot be read")
    assert "\n" not in str(bad)


def test_ase_database(samples: list[Sample], tmp_path: Path) -> None:
    for ending in ("db", "json"):
        file = tmp_path / f"set.{ending}"
        with ase.db.connect(file) as database:
            for sample in [samples[0], *samples]:
                database.write(to_atoms(sample), sid=sample.sid, fid=sample.fid)
            database.delete([1])
        source = open_source(file)
        assert isinstance(source, AseDatabase)
        for one, other in zip(all_of(source), samples, strict=True):
            assert_same(one, other, but=RELAXED)
        assert_same(pickle.loads(pickle.dumps(source))[3], samples[3], but=RELAXED)


def test_trajectories(samples: list[Sample], tmp_path: Path) -> None:
    for name, some in (("a", samples[:3]), ("b", samples[3:])):
        (tmp_path / "set").mkdir(exist_ok=True)
        with Trajectory(str(tmp_path / "set" / f"{name}.traj"), "w") as trajectory:
            for sample in some:
                trajectory.write(to_atoms(sample))
    source = open_source(tmp_path / "set")
    assert isinstance(source, AseFiles)
    for one, other in zip(all_of(source), samples, strict=True):
        assert_same(one, other, but=(*RELAXED, "sid", "fid"))
    ids = [(sample.sid, sample.fid) for sample in all_of(source)]
    assert ids == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    one = open_source(tmp_path / "set" / "b.traj")
    assert [(sample.sid, sample.fid) for sample in all_of(one)] == [(i, 0) for i in range(4)]


@pytest.mark.parametrize("ending", ["", ".xz"])
def test_extxyz_alone(samples: list[Sample], tmp_path: Path, ending: str) -> None:
    file = write_raw(tmp_path, "0", samples, 0.0, ending)
    next(tmp_path.glob("0.txt*")).unlink()
    source = open_source(file)
    assert isinstance(source, AseFiles)
    for one, other in zip(all_of(source), samples, strict=True):
        assert_same(one, other, but=(*RELAXED, "sid", "fid"), tolerance=2e-8)


def test_forces_are_those_without_constraints(samples: list[Sample], tmp_path: Path) -> None:
    atoms = to_atoms(samples[0])
    atoms.set_constraint(FixAtoms(mask=np.ones(len(atoms), dtype=bool)))
    assert not atoms.get_forces().any()
    with ase.db.connect(tmp_path / "set.db") as database:
        database.write(atoms)
    ase.io.write(tmp_path / "set.traj", atoms)
    write_aselmdb(tmp_path / "set.aselmdb", [replace(samples[0], fixed=np.ones(len(atoms), dtype=bool))])
    for name in ("set.db", "set.traj", "set.aselmdb"):
        (sample,) = all_of(open_source(tmp_path / name))
        np.testing.assert_array_equal(sample.forces, samples[0].forces, err_msg=name)
        assert sample.fixed.all(), name


def test_damaged_extxyz(samples: list[Sample], tmp_path: Path) -> None:
    """A damaged frame costs itself; where frames cannot be told apart any more, the rest of the file."""
    file = write_raw(tmp_path, "0", samples, 0.0)
    file.with_suffix(".txt").unlink()
    good = file.read_text()
    lines = good.splitlines(keepends=True)
    second = samples[0].num_atoms + 2

    def read(*changes: tuple[int, str]) -> tuple[int, list[str]]:
        spoilt = list(lines)
        for at, text in changes:
            spoilt[at] = text
        file.write_text("".join(spoilt))
        got = list(open_source(file).read(0, 1))
        return len(got), [str(sample) for sample in got if isinstance(sample, BadSample)]

    count, (reason,) = read((second + 2, "Xx zero 0 0\n"))
    assert count == 7
    assert reason.startswith(f"{file}: frame 1 cannot be read")
    for damaged, words in (("99999999999999999\n", "not a number of atoms"), ("900000\n", "cut short")):
        count, (reason,) = read((second, damaged))
        assert count == 2
        assert reason.startswith(f"{file}: frame 1 and what follows cannot be read")
        assert words in reason
    for cut in (100, 1000):
        file.write_text(good[:-cut])
        *whole, bad = open_source(file).read(0, 1)
        assert all(isinstance(sample, Sample) for sample in whole)
        assert isinstance(bad, BadSample)


def test_damaged_trajectory(samples: list[Sample], tmp_path: Path) -> None:
    file = tmp_path / "set.traj"
    with Trajectory(str(file), "w") as trajectory:
        for sample in samples:
            trajectory.write(to_atoms(sample))
    content = file.read_bytes()
    for at in range(40, len(content), 397):
        file.write_bytes(content[:at])
        try:
            got = list(open_source(file).read(0, 1))
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017
            continue
        assert all(isinstance(sample, Sample) for sample in got[:-1])
        assert isinstance(got[-1], BadSample)
        assert str(got[-1]).startswith(f"{file}: frame ")
        assert "\n" not in str(got[-1])


# ----------------------------------------------------------------------------------------------------- what is not data


def other_lmdb(place: Path) -> Path:
    environment = lmdb.open(str(place / "x.lmdb"), subdir=False, lock=False, map_size=1 << 20)
    with environment.begin(write=True) as transaction:
        transaction.put(b"name", b"value")
    environment.close()
    return place / "x.lmdb"


def cut_lmdb(place: Path) -> Path:
    file = write_oc20(place, structures(40), shards=1) / "data.0000.lmdb"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: len(content) // 2 // 4096 * 4096])
    return file


def length_of(value: bytes) -> Callable[[Path], Path]:
    """One record, and this in the key that counts them."""

    def write(place: Path) -> Path:
        file = write_lmdb(place / "data.lmdb", [b"x"], length=False)
        environment = lmdb.open(str(file), subdir=False, lock=False, map_size=1 << 28)
        with environment.begin(write=True) as transaction:
            transaction.put(b"length", value)
        environment.close()
        return file

    return write


def text_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return write


def mixed(place: Path) -> Path:
    write_aselmdb(place / "a.aselmdb", structures(2))
    return write_oc20(place, structures(2), shards=1)


def nested(place: Path) -> Path:
    write_oc20(place / "s2ef_val", structures(2), shards=1)
    return place


def store_in(place: Path) -> Path:
    write_store(place / "set", structures(3))
    return place / "set"


def shard_of_a_store(place: Path) -> Path:
    return store_in(place) / "data.0000.lmdb"


def store_without_metadata(place: Path) -> Path:
    (store_in(place) / "metadata.json").unlink()
    return place / "set"


def lonely_extxyz(place: Path) -> Path:
    write_raw(place / "raw", "0", structures(2), 0.0)
    write_raw(place / "raw", "1", structures(2), 0.0)
    (place / "raw" / "1.txt").unlink()
    return place / "raw"


def renamed_aselmdb(place: Path) -> Path:
    file = write_aselmdb(place / "a.aselmdb", structures(2))
    return Path(shutil.move(file, place / "a.lmdb"))


NOT_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda place: place / "none", "none does not exist"),
    "empty directory": (lambda place: place, "holds no structures in files"),
    "directory of directories": (nested, "name one of the directories in it: s2ef_val"),
    "several kinds": (mixed, "files of several kinds"),
    "empty file": (text_file("data.lmdb", b""), "is empty"),
    "not an LMDB": (text_file("data.lmdb", b"text " * 5000), "is not an LMDB file"),
    "not an aselmdb": (text_file("data.aselmdb", b"text " * 5000), "is not an LMDB file"),
    "LMDB of something else": (other_lmdb, "not of OC20's: there are no keys 0 to 0"),
    "OC20's LMDB as aselmdb": (
        lambda place: write_lmdb(place / "a.aselmdb", [b"x"]),
        "is not an ASE database in LMDB: no key `nextid`",
    ),
    "aselmdb as LMDB": (renamed_aselmdb, "rename it to end in .aselmdb"),
    "cut short": (cut_lmdb, "it is cut short"),
    "wrong length": (length_of(pickle.dumps(5)), "says 5, but there are 2 entries"),
    "hostile length": (length_of(b"cos\nsystem\n(Vfalse\ntR."), "os.system"),
    "length of laughs": (
        length_of(b"]q\x00" + b"".join(b"](" + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(30)) + b"."),
        "the key `length` holds no number",
    ),
    "a store": (store_in, "is a store of egnscale already"),
    "a store's shard": (shard_of_a_store, "belongs to a store of egnscale"),
    "a store without metadata": (store_without_metadata, "belongs to a store of egnscale"),
    "unknown file": (text_file("notes.txt", b"nothing of interest\n"), "is of no known kind"),
    "not a database": (text_file("set.db", b"text " * 5000), "is not an ASE database"),
    "not JSON": (text_file("set.json", b"{"), "is not an ASE database"),
    "extxyz without its txt": (lonely_extxyz, "1.extxyz has no .txt beside it"),
}


@pytest.mark.parametrize("case", NOT_DATA)
def test_what_is_not_data(case: str, tmp_path: Path) -> None:
    make, words = NOT_DATA[case]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_source(make(tmp_path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_total_energies_need_references(samples: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no reference energies"):
        open_source(write_oc20(tmp_path / "train", samples), total_energies=True)
