"""The native store: what is written is what is read, and what is damaged says so."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
from dataclasses import fields, replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from torch.utils.data import DataLoader

from egnscale.data import record, store_writer
from egnscale.data.neighbors import count_edges
from egnscale.data.record import decode_sample, encode_sample
from egnscale.data.sample import Sample
from egnscale.data.store import Store, write_store


def make_sample(i: int, atoms: int = 5, **changes: object) -> Sample:
    rng = np.random.default_rng(i)
    sample = Sample(
        atomic_numbers=rng.integers(1, 119, atoms),
        positions=rng.normal(size=(atoms, 3)),
        cell=np.diag([8.0, 9.0, 10.0]) + 0.1 * rng.normal(size=(3, 3)),
        pbc=np.array([True, True, False]),
        tags=rng.integers(0, 3, atoms),
        fixed=rng.integers(0, 2, atoms).astype(bool),
        sid=2**40 + i,
        fid=i % 7,
        energy=float(rng.normal()),
        forces=rng.normal(size=(atoms, 3)).astype(np.float32).astype(np.float64),
        energy_relaxed=float(rng.normal()),
        positions_relaxed=rng.normal(size=(atoms, 3)),
    )
    return replace(sample, **changes)


def assert_same(one: Sample, other: Sample) -> None:
    for field in fields(Sample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name


@pytest.fixture
def samples() -> list[Sample]:
    return [make_sample(i, atoms=1 + i % 4) for i in range(25)]


@pytest.fixture
def path(tmp_path: Path, samples: list[Sample]) -> Path:
    """Three shards: 10, 10 and 5 samples."""
    write_store(tmp_path / "set", samples, shard_size=10, provenance={"seed": 3})
    return tmp_path / "set"


# ---------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("missing", [(), ("energy",), ("forces",), ("energy_relaxed", "positions_relaxed")])
def test_a_record_holds_everything(missing: tuple[str, ...]) -> None:
    sample = make_sample(0, **dict.fromkeys(missing))
    assert_same(decode_sample(encode_sample(sample)), sample)


def test_forces_are_rounded_to_float32_and_nothing_else_is() -> None:
    sample = make_sample(0, forces=np.full((5, 3), 1 / 3), energy=1 / 3)
    read = decode_sample(encode_sample(sample))
    assert read.energy == 1 / 3
    assert (read.forces == np.float64(np.float32(1 / 3))).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tags", np.array([0, 1, 2, 1, 300]), "tags does not fit int8"),
        ("forces", np.full((5, 3), 1e39), "forces does not fit float32"),
        ("positions", np.full((5, 3), np.nan), "positions is not finite"),
        ("atomic_numbers", np.array([1, 1, 1, 1, 119]), "atomic number 119"),
    ],
)
def test_what_does_not_fit_is_not_written(field: str, value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^sid {2**40} fid 0: .*{message}"):
        encode_sample(make_sample(0, **{field: value}))


def test_every_damaged_byte_of_a_record_is_noticed() -> None:
    good = encode_sample(make_sample(0))
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x10
        with pytest.raises(ValueError, match=r"not an egnscale record|format version|checksum"):
            decode_sample(bytes(bad))
    for length in range(len(good)):
        with pytest.raises(ValueError, match=r"cut short|checksum"):
            decode_sample(good[:length])


# ------------------------------------------------------------------------------------------------- writing, reading


def test_round_trip_over_shards(path: Path, samples: list[Sample]) -> None:
    read = Store(path)
    assert len(read) == len(samples)
    assert [shard["num_samples"] for shard in read.metadata["shards"]] == [10, 10, 5]
    for i, sample in enumerate(samples):
        assert_same(read[i], sample)
        assert_same(read[i - len(samples)], sample)
    assert_same(read[np.int64(11)], samples[11])
    for outside in (25, -26):
        with pytest.raises(IndexError, match="25 structures"):
            read[outside]
    read.verify()


def test_metadata_counts_and_statistics(path: Path, samples: list[Sample]) -> None:
    read = Store(path)
    np.testing.assert_array_equal(read.num_atoms, [sample.num_atoms for sample in samples])
    np.testing.assert_array_equal(read.num_edges, [count_edges(sample) for sample in samples])
    assert read.num_atoms.dtype == read.num_edges.dtype == np.int32
    np.testing.assert_array_equal(read.sid, [sample.sid for sample in samples])
    np.testing.assert_array_equal(read.fid, [sample.fid for sample in samples])
    statistics = read.metadata["statistics"]
    energies = np.array([sample.energy for sample in samples])
    assert statistics["energy"]["mean"] == pytest.approx(energies.mean())
    assert statistics["energy"]["std"] == pytest.approx(energies.std())
    assert (statistics["energy"]["min"], statistics["energy"]["max"]) == (energies.min(), energies.max())
    forces = np.concatenate([sample.forces for sample in samples])
    free = forces[~np.concatenate([sample.fixed for sample in samples])]
    for which, some in (("all", forces), ("free", free)):
        assert statistics["forces"][which]["rms"] == pytest.approx(np.sqrt((some**2).mean()))
        assert statistics["forces"][which]["max"] == pytest.approx(np.linalg.norm(some, axis=1).max())
    assert statistics["elements"] == np.unique(np.concatenate([s.atomic_numbers for s in samples])).tolist()
    assert read.metadata["provenance"] == {"seed": 3}


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    write_store(tmp_path / "set", [make_sample(0, energy=None, forces=None, energy_relaxed=None)])
    statistics = Store(tmp_path / "set").metadata["statistics"]
    assert [statistics[name] for name in ("energy", "energy_relaxed", "forces")] == [None, None, None]


def test_the_map_grows_and_the_file_is_not_sparse(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "_FIRST_MAP_SIZE", 32 << 10)
    monkeypatch.setattr(store_writer, "_BATCH_BYTES", 8 << 10)
    many = [replace(samples[i % 25], fid=i) for i in range(500)]
    write_store(tmp_path / "set", many, edges=lambda sample: 1)
    read = Store(tmp_path / "set")
    for i in (0, 250, 499):
        assert_same(read[i], many[i])
    read.verify()
    size = (tmp_path / "set" / "data.0000.lmdb").stat()
    payload = sum(len(encode_sample(sample)) for sample in many)
    assert 32 << 10 < size.st_size < 2 * payload
    assert size.st_blocks * 512 >= size.st_size


def test_a_failure_leaves_nothing(tmp_path: Path, samples: list[Sample]) -> None:
    def stream():
        yield from samples[:12]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_store(tmp_path / "set", stream(), shard_size=10)
    with pytest.raises(ValueError, match="no samples"):
        write_store(tmp_path / "set", [])
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(path: Path, samples: list[Sample]) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        write_store(path, samples[:1])
    assert len(Store(path)) == 25


def _write_with_little_room(path: Path, answer) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        write_store(path, [make_sample(i, atoms=90) for i in range(100)], edges=lambda sample: 1)
    except OSError as error:
        answer.put(str(error))
    else:
        answer.put("written")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the same call fails in the same place."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_write_with_little_room, args=(tmp_path / "set", answer))
    process.start()
    message = answer.get(timeout=60)
    process.join()
    assert "cannot write" in message
    assert "data.0000.lmdb" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- many processes


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_loader_workers_read_what_the_parent_reads(
    path: Path, samples: list[Sample], method: str, workers: int
) -> None:
    read = Store(path)
    assert_same(read[0], samples[0])  # open in the parent before the workers start
    loader = DataLoader(read, batch_size=4, num_workers=workers, collate_fn=list, multiprocessing_context=method)
    for _ in range(2):
        got = [sample for batch in loader for sample in batch]
        assert len(got) == len(samples)
        for one, other in zip(got, samples, strict=True):
            assert_same(one, other)
    assert_same(read[24], samples[24])


def test_two_stores_of_one_directory_survive_a_fork(path: Path, samples: list[Sample]) -> None:
    one, two = Store(path), Store(path)
    child = os.fork()
    if child == 0:
        try:
            assert_same(two[3], samples[3])
            assert_same(one[24], samples[24])
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert_same(one[3], samples[3])
    del one
    assert_same(two[3], samples[3])


def test_pickle(path: Path, samples: list[Sample]) -> None:
    copy = pickle.loads(pickle.dumps(Store(path)))
    assert_same(copy[13], samples[13])


def test_a_store_made_anew_at_the_same_path(path: Path, samples: list[Sample]) -> None:
    old = Store(path)
    shutil.rmtree(path)
    write_store(path, samples[::-1], shard_size=10)
    assert_same(Store(path)[0], samples[-1])
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb"):
        old[0]


# -------------------------------------------------------------------------------------------------------- damage


def _edit(path: Path, **changes: object) -> None:
    file = path / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _replace_shard(path: Path, content: bytes) -> None:
    """Other content of a length that the metadata agrees with."""
    (path / "data.0001.lmdb").write_bytes(content)
    shards = json.loads((path / "metadata.json").read_text())["shards"]
    shards[1]["bytes"] = len(content)
    _edit(path, shards=shards)


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Store(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no metadata\.json"):
        Store(tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "file")
    (tmp_path / "data.0000.lmdb").write_text("text")
    with pytest.raises(FileNotFoundError, match="egnscale data convert"):
        Store(tmp_path)


def test_a_directory_of_stores_names_them(tmp_path: Path, samples: list[Sample]) -> None:
    write_store(tmp_path / "s2ef" / "train", samples)
    with pytest.raises(ValueError, match="s2ef/train"):
        Store(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 4096, 10_000, -1])
def test_a_truncated_shard(path: Path, kept: int) -> None:
    file = path / "data.0001.lmdb"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"data\.0001\.lmdb has \d+ bytes"):
        Store(path)


def test_a_missing_shard(path: Path) -> None:
    (path / "data.0001.lmdb").unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.0001\.lmdb"):
        Store(path)


def test_a_text_file_as_shard(path: Path) -> None:
    _replace_shard(path, b"not a database\n" * 1000)
    with pytest.raises(ValueError, match=r"data\.0001\.lmdb is not an LMDB file"):
        Store(path)


def test_another_programs_lmdb(path: Path, tmp_path: Path) -> None:
    alien = lmdb.open(str(tmp_path / "alien"), subdir=False, lock=False)
    with alien.begin(write=True) as transaction:
        transaction.put(b"0", pickle.dumps({"pos": 1}))
        transaction.put(b"length", pickle.dumps(1))
    alien.close()
    _replace_shard(path, (tmp_path / "alien").read_bytes())
    with pytest.raises(ValueError, match=r"data\.0001\.lmdb is an LMDB file, but not of an egnscale store"):
        Store(path)


def test_another_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _edit(path, version=2)
    with pytest.raises(ValueError, match="format version 2; this egnscale reads version 1"):
        Store(path)
    _edit(path, version=1)
    monkeypatch.setattr(record, "VERSION", 7)
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb.*version 1; this egnscale reads version 7"):
        Store(path)[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "egnscale-store", "version": 1}'])
def test_damaged_metadata(path: Path, content: str) -> None:
    (path / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match=r"metadata\.json"):
        Store(path)


def test_damaged_columns(path: Path) -> None:
    file = path / "metadata.npz"
    good = file.read_bytes()
    for content in (b"", good[:200], good[:100] + b"\xff" + good[101:], pickle.dumps([1])):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"metadata\.npz"):
            Store(path)
    np.savez(file, **{name: np.zeros(3, dtype=np.int32) for name in ("natoms", "neighbors", "sid", "fid")})
    with pytest.raises(ValueError, match=r"metadata\.npz does not have 25"):
        Store(path)


def test_damage_anywhere_in_a_shard_is_an_error_or_harmless(path: Path, samples: list[Sample]) -> None:
    """One flipped byte, all over the file: never a wrong sample; `verify` notices every one."""
    file = path / "data.0002.lmdb"
    good = file.read_bytes()
    noticed = 0
    for at in range(0, len(good), 61):
        # A new file each time: LMDB maps the old one.
        file.unlink()
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            read = Store(path)
            with pytest.raises(ValueError, match=r"data\.0002\.lmdb .*sha256"):
                read.verify()
            for i in range(20, 25):
                assert_same(read[i], samples[i])
        except ValueError as error:
            assert "data.0002.lmdb" in str(error)  # noqa: PT017
            noticed += 1
    assert noticed > 20
