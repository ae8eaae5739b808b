"""OC20's files read where they are: the same structures, sizes and training as from the converted store."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launchers import log
from oc20_records import attributes, new_graph, structures, write_aselmdb, write_lmdb, write_oc20, write_raw
from torch.utils.data import DataLoader
from toy import samples as toy_samples
from toy import write_config

from egnscale.data import dataset
from egnscale.data.convert import convert
from egnscale.data.dataset import ForeignDataset, open_dataset
from egnscale.data.store import Store
from egnscale.launch import reporting
from egnscale.launch.cli import main
from egnscale.launch.loading import open_data, validation_splits
from egnscale.launch.reporting import show_reading

CACHE = "egnscale-sizes.npz"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`train`, and `store` converted from it."""
    write_oc20(tmp_path / "train", structures(30), shards=2)
    convert(tmp_path / "train", tmp_path / "store")
    return tmp_path


def refuse_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_scan", lambda *_, **__: pytest.fail("structures were read again"))


def assert_like_the_store(read: dataset.Dataset, store: Store) -> None:
    assert len(read) == len(store)
    for name in ("num_atoms", "num_edges", "sid", "fid"):
        found, wanted = getattr(read, name), getattr(store, name)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    found, wanted = read.metadata["statistics"], store.metadata["statistics"]
    assert found["elements"] == wanted["elements"]
    for name in ("energy", "energy_relaxed"):
        assert found[name] == pytest.approx(wanted[name])
    assert found["forces"]["free"] == pytest.approx(wanted["forces"]["free"])


def test_like_the_converted_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_dataset(place / "store")
    assert isinstance(store, Store)
    seen: list[tuple[int, int]] = []
    read = open_dataset(place / "train", progress=lambda done, total: seen.append((done, total)))
    assert isinstance(read, ForeignDataset)
    assert_like_the_store(read, store)
    assert read[7].energy == store[7].energy
    assert (seen[0], seen[-1]) == ((0, 30), (30, 30))
    # Kept beside the data: the next one reads nothing.
    assert sorted(file.name for file in (place / "train").iterdir()) == ["data.0000.lmdb", "data.0001.lmdb", CACHE]
    refuse_to_read(monkeypatch)
    assert_like_the_store(open_dataset(place / "train"), store)


def test_the_cache_is_of_these_files(place: Path) -> None:
    open_dataset(place / "train")
    file = place / "train" / CACHE
    good = file.read_bytes()
    for content in (b"", good[:200], good[:-30]):
        file.write_bytes(content)
        assert_like_the_store(open_dataset(place / "train"), Store(place / "store"))
        assert file.read_bytes() == good
    shutil.rmtree(place / "store")
    (place / "train" / "data.0001.lmdb").unlink()
    convert(place / "train", place / "store")
    assert_like_the_store(open_dataset(place / "train"), Store(place / "store"))


#: Nothing can be written into directories called `train`; `locks`: nor can they be locked.
READ_ONLY = """
import builtins, fcntl, os
refused = []
def refuse(function, place):
    def instead(*args, **options):
        if "train" in str(place(*args)):
            refused.append(function.__name__)
            raise PermissionError(30, "Read-only file system")
        return function(*args, **options)
    return instead
os.replace = refuse(os.replace, lambda source, target: target)
fcntl.flock = refuse(fcntl.flock, lambda descriptor, how: locks and os.readlink(f"/proc/self/fd/{descriptor}"))
"""


@pytest.mark.parametrize("nowhere", [False, True])
def test_a_place_that_cannot_be_written_to(place: Path, monkeypatch: pytest.MonkeyPatch, nowhere: bool) -> None:
    """Kept in the user's cache directory, and where that cannot be written to either, not at all."""
    cache = place / ("train_of_nobody" if nowhere else "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(os, "replace", os.replace)
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    exec(READ_ONLY, scope := {"locks": True})
    store = Store(place / "store")
    assert_like_the_store(open_dataset(place / "train"), store)
    assert scope["refused"].count("replace") == 1 + nowhere
    assert scope["refused"].count("flock") == 1 + nowhere
    assert sorted(file.name for file in (place / "train").iterdir()) == ["data.0000.lmdb", "data.0001.lmdb"]
    kept = list((cache / "egnscale").iterdir())
    if nowhere:
        assert kept == []
        return
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        refuse_to_read(patch)
        assert_like_the_store(open_dataset(place / "train"), store)
    # It is of these files, in this place.
    os.utime(place / "train" / "data.0001.lmdb", ns=(1, 1))
    assert_like_the_store(open_dataset(place / "train"), store)
    assert len(list((cache / "egnscale").iterdir())) == 2


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert dataset._cache_directory() == tmp_path / ".cache" / "egnscale"


def test_one_file(place: Path) -> None:
    write_oc20(place / "one", structures(30), shards=1)
    read = open_dataset(place / "one" / "data.0000.lmdb")
    assert_like_the_store(read, Store(place / "store"))
    assert (place / "one" / f"data.0000.lmdb.{CACHE}").exists()


RANK = """
import sys, time
from egnscale.data import dataset
scan = dataset._scan
def slowly(*args):
    print("reads", flush=True)
    time.sleep(1.0)
    return scan(*args)
dataset._scan = slowly
print(len(dataset.open_dataset(sys.argv[1]).num_atoms))
"""


@pytest.mark.parametrize("where", ["writable", "read-only", "read-only, without locks"])
def test_of_several_ranks_one_reads(place: Path, where: str) -> None:
    script = RANK if where == "writable" else f"locks = {'locks' in where}\n{READ_ONLY}\n{RANK}"
    command = [sys.executable, "-c", script, str(place / "train")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    printed = [rank.communicate(timeout=60)[0].split() for rank in ranks]
    assert sorted(printed) == [["30"], ["30"], ["reads", "30"]]


@pytest.mark.parametrize("edges", [True, False])
def test_sizes_of_oc20_are_used(place: Path, monkeypatch: pytest.MonkeyPatch, edges: bool) -> None:
    monkeypatch.setattr(dataset, "SAMPLED", 10)
    store = Store(place / "store")
    sizes = {"natoms": store.num_atoms.astype(np.int64)} | ({"neighbors": store.num_edges + 1} if edges else {})
    np.savez(place / "train" / "metadata.npz", **sizes)
    seen: list[tuple[int, int]] = []
    read = open_dataset(place / "train", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    np.testing.assert_array_equal(read.num_atoms, store.num_atoms)
    if edges:
        np.testing.assert_array_equal(read.num_edges, store.num_edges + 1)
    else:
        assert read.num_edges.sum() == pytest.approx(store.num_edges.sum(), rel=0.1)
    assert read.metadata["statistics"]["energy"]["count"] == 10
    assert read.metadata["provenance"]["statistics_of"] == 10
    assert not read.ids_known
    np.testing.assert_array_equal(read.sid, store.sid)
    np.testing.assert_array_equal(read.fid, store.fid)
    assert seen[-1] == (30, 30), "ids take all structures"
    refuse_to_read(monkeypatch)
    again = pickle.loads(pickle.dumps(open_dataset(place / "train")))
    assert again.ids_known
    np.testing.assert_array_equal(again.sid, store.sid)
    np.testing.assert_array_equal(again.fid, store.fid)
    # One shard of the directory: the sizes are of all.
    monkeypatch.undo()
    assert len(open_dataset(place / "train" / "data.0001.lmdb").num_atoms) == 15


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_damaged_sizes(place: Path, content: bytes | None) -> None:
    file = place / "train" / "metadata.npz"
    if content is None:
        np.savez(file, natoms=np.zeros(3, dtype=np.int32))
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata\.npz .*remove it"):
        open_dataset(place / "train")


def test_a_bad_structure_is_named(tmp_path: Path) -> None:
    good = pickle.dumps(new_graph(attributes(structures(1)[0])))
    write_lmdb(tmp_path / "data.0000.lmdb", [good, good[:-30]])
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb: structure 1 cannot be read.*--skip-bad"):
        open_dataset(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["data.0000.lmdb"]


def test_what_is_read_from_the_start_has_to_be_converted(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", "0", structures(3), 0.0)
    with pytest.raises(ValueError, match=r"from start to end; `egnscale data convert .*raw OUT`"):
        open_dataset(tmp_path / "raw")


def test_aselmdb_directly(tmp_path: Path) -> None:
    write_aselmdb(tmp_path / "set" / "a.aselmdb", structures(5))
    convert(tmp_path / "set", tmp_path / "store")
    assert_like_the_store(open_dataset(tmp_path / "set"), Store(tmp_path / "store"))


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_loader_workers(place: Path, method: str, workers: int) -> None:
    read = open_dataset(place / "train")
    assert read[0].num_atoms == read.num_atoms[0]
    loader = DataLoader(read, batch_size=4, num_workers=workers, collate_fn=list, multiprocessing_context=method)
    got = [sample.energy for batch in loader for sample in batch]
    assert got == [read[i].energy for i in range(30)]
    assert len(pickle.dumps(read)) < 20_000


# ---------------------------------------------------------------------------------------------- training and evaluation


def write_toy(directory: Path, count: int, seed: int) -> None:
    graphs = [new_graph(attributes(sample, relaxed=False)) for sample in toy_samples(count, seed=seed)]
    write_lmdb(directory / "data.0000.lmdb", [pickle.dumps(graph, protocol=-1) for graph in graphs])


def test_training_does_not_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oc20, stores = tmp_path / "oc20", tmp_path / "stores"
    for i, split in enumerate(("train", "val_id", "val_ood_ads")):
        write_toy(oc20 / "s2ef" / split, 8 if split == "train" else 3, seed=i)
        convert(oc20 / "s2ef" / split, stores / "s2ef" / split)
    tables = []
    for data in (oc20, stores):
        run = tmp_path / f"run_{data.name}"
        config = write_config(tmp_path / f"{data.name}.yaml", data, run)
        assert main(["train", str(config), "optim.max_steps=4", "data.workers=1", "--json"]) == 0
        capsys.readouterr()
        assert main(["evaluate", str(run), str(data), "--json"]) == 0
        tables.append(json.loads(capsys.readouterr().out)["splits"])
    assert log(tmp_path / "run_oc20") == log(tmp_path / "run_stores")
    assert tables[0] == tables[1]
    assert list(tables[0]) == ["val_id", "val_ood_ads"]


def test_validation_splits(place: Path) -> None:
    assert validation_splits(place / "train") == {"train": place / "train"}
    file = place / "train" / "data.0000.lmdb"
    assert validation_splits(file) == {"data.0000.lmdb": file}


def test_info(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", str(place / "train"), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["stores"]["train"]
    assert main(["data", "info", str(place / "store"), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["stores"]["store"]
    for name in ("structures", "systems", "atoms", "edges", "elements"):
        assert found[name] == wanted[name], name
    assert found["energy"] == pytest.approx(wanted["energy"])


def test_info_reads_no_more_than_it_must(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset, "SAMPLED", 10)
    np.savez(place / "train" / "metadata.npz", natoms=Store(place / "store").num_atoms)
    read: list[int] = []
    scan = dataset._scan
    monkeypatch.setattr(dataset, "_scan", lambda *args, **how: read.append(len(args[1])) or scan(*args, **how))

    def systems(*options: str) -> int | None:
        assert main(["data", "info", str(place / "train"), *options, "--json"]) == 0
        return json.loads(capfd.readouterr().out)["stores"]["train"]["systems"]

    assert systems() is None
    assert main(["data", "info", str(place / "train")]) == 0
    rows = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["train", "30", "-"] in [row[:3] for row in rows]
    assert read == [10]
    assert systems("--verify") == 10
    assert read == [10, 30]
    assert systems() == 10, "kept"
    assert read == [10, 30]


def test_a_long_reading_is_said_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with show_reading("PATH") as progress:
        for done in range(3):
            progress(done, 3)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(reporting, "LONG", -1.0)
    open_data(place / "train")
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"{place / 'train'}: 0 of 30 structures read in 0 s"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_reading("PATH") as progress:
        progress(0, 3)
        progress(3, 3)
    progress(3, 3)
    assert capfd.readouterr().err == "\rPATH: 0 of 3 structures read" + 2 * "\rPATH: 3 of 3 structures read\n"
