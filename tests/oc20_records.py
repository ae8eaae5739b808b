"""Files of OC20's and ASE's, as their own programs write them; torch_geometric is the real one."""

from __future__ import annotations

import json
import lzma
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import lmdb
import numpy as np
import torch
from ase import Atoms
from ase.db.row import AtomsRow
from ase.io.jsonio import encode
from torch_geometric.data import Data

from egnscale.data.sample import Sample


def structures(count: int, seed: int = 0) -> list[Sample]:
    """Small structures with everything that OC20 has, in values that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = int(rng.integers(3, 9))
        single = rng.normal(size=(3, n, 3)).astype(np.float32).astype(np.float64)
        made.append(
            Sample(
                atomic_numbers=rng.integers(1, 80, n),
                positions=np.round(single[0] * 512) / 512 + np.arange(n)[:, None],
                cell=np.diag([8.0, 9.5, 12.25]) + np.triu(np.full((3, 3), 0.5), 1),
                pbc=np.ones(3, dtype=bool),
                tags=rng.integers(0, 3, n),
                fixed=rng.integers(0, 2, n).astype(bool),
                sid=1000 + i // 3,
                fid=i % 3,
                energy=float(rng.normal()),
                forces=single[1],
                energy_relaxed=float(rng.normal()),
                positions_relaxed=single[2],
            )
        )
    return made


def attributes(sample: Sample, *, modern: bool = False, relaxed: bool = True) -> dict[str, Any]:
    """What the preprocessing of 2020 stores; `modern`: that of 2024. `relaxed`: with the targets of IS2RE and IS2RS."""
    number = torch.uint8 if modern else torch.float32
    values: dict[str, Any] = {
        "pos": torch.tensor(sample.positions, dtype=torch.float32),
        "cell": torch.tensor(sample.cell, dtype=torch.float32)[None],
        "atomic_numbers": torch.tensor(sample.atomic_numbers, dtype=number),
        "natoms": sample.num_atoms,
        "tags": torch.tensor(sample.tags),
        "fixed": torch.tensor(sample.fixed, dtype=torch.int32 if modern else torch.float32),
        "sid": torch.tensor([sample.sid]) if modern else sample.sid,
        "fid": torch.tensor([sample.fid]) if modern else sample.fid,
        "edge_index": torch.tensor([[0, 1], [1, 0]]),
        "cell_offsets": torch.zeros(2, 3, dtype=torch.int64),
    }
    values["energy" if modern else "y"] = sample.energy
    values["forces" if modern else "force"] = torch.tensor(sample.forces, dtype=torch.float32)
    if relaxed:
        values["energy_relaxed" if modern else "y_relaxed"] = sample.energy_relaxed
        values["pos_relaxed"] = torch.tensor(sample.positions_relaxed, dtype=torch.float32)
    return values


def new_graph(values: dict[str, Any]) -> Data:
    return Data(**values)


def old_graph(values: dict[str, Any]) -> Data:
    """As before torch_geometric 2.0: attributes in the object itself, those that were not given as None."""
    graph = Data.__new__(Data)
    graph.__dict__.clear()
    never = ("x", "edge_index", "edge_attr", "y", "pos", "normal", "face")
    graph.__dict__.update(dict.fromkeys(never) | values | {"__num_nodes__": values["natoms"]})
    return graph


def write_lmdb(file: Path, records: list[bytes], *, length: bool = True) -> Path:
    """An LMDB file with these records, and the key that counts them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(file), subdir=False, lock=False, map_size=1 << 28)
    with environment.begin(write=True) as transaction:
        for i, record in enumerate(records):
            transaction.put(b"%d" % i, record)
        if length:
            transaction.put(b"length", pickle.dumps(len(records), protocol=-1))
    environment.close()
    return file


def write_oc20(directory: Path, samples: list[Sample], *, shards: int = 2, modern: bool = False) -> Path:
    """A directory of shards, as OC20's S2EF has them."""
    for shard, some in enumerate(np.array_split(np.arange(len(samples)), shards)):
        records = [pickle.dumps(new_graph(attributes(samples[i], modern=modern)), protocol=-1) for i in some]
        write_lmdb(directory / f"data.{shard:04d}.lmdb", records)
    return directory


def to_atoms(sample: Sample) -> Atoms:
    atoms = sample.to_atoms()
    atoms.info = {}
    return atoms


def write_raw(directory: Path, name: str, samples: list[Sample], reference: float, ending: str = "") -> Path:
    """extxyz with `move_mask` and tags, and txt, as OC20's archives have them."""
    directory.mkdir(exist_ok=True)
    file = directory / f"{name}.extxyz"
    total = [to_atoms(replace(sample, energy=(sample.energy or 0.0) + reference)) for sample in samples]
    ase.io.write(file, total, columns=["symbols", "positions", "move_mask", "tags", "forces"])
    labels = directory / f"{name}.txt"
    labels.write_text("".join(f"random{sample.sid},frame{sample.fid},{reference!r}\n" for sample in samples))
    if ending:
        for path in (file, labels):
            Path(f"{path}{ending}").write_bytes(lzma.compress(path.read_bytes()))
            path.unlink()
    return Path(f"{file}{ending}")


def pack(value: Any, plain: bool) -> bytes:
    """As ase-db-backends writes values; `plain`: as orjson writes arrays, in lists."""
    text = encode(value)
    if plain:
        text = json.dumps(
            json.loads(text, object_hook=lambda d: _nested(d["__ndarray__"]) if "__ndarray__" in d else d)
        )
    return zlib.compress(text.encode())


def _nested(array: list[Any]) -> Any:
    return np.array(array[2]).reshape(array[0]).tolist()


def write_aselmdb(file: Path, samples: list[Sample], *, plain: bool = False, ids: bool = True) -> Path:
    file.parent.mkdir(exist_ok=True)
    environment = lmdb.open(str(file), subdir=False, lock=False, map_size=1 << 26)
    with environment.begin(write=True) as transaction:
        for i, sample in enumerate([samples[0], *samples], start=1):
            row = AtomsRow(to_atoms(sample))
            values = {name: row[name] for name in row.__dict__ if name[0] != "_" and name != "id"}
            values |= {"cell": np.asarray(row.cell), "data": {"sid": sample.sid} if ids else {}}
            values["key_value_pairs"] = {"fid": sample.fid} if ids else {}
            if row.constraints:
                values["constraints"] = [constraint.todict() for constraint in row.constraints]
            if i > 1:
                transaction.put(b"%d" % i, pack(values, plain))
        transaction.put(b"nextid", pack(len(samples) + 2, plain))
        transaction.put(b"deleted_ids", pack([1], plain))
        transaction.put(b"metadata", pack({"format": "test"}, plain))
    environment.close()
    return file
