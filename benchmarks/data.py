"""Reading a structure from OC20's LMDB files and from the store, and making its graph: CPU time of one thread.

Slabs of 65 atoms, made up, with OC20's fields and (in the LMDB file) edges, pickled as torch_geometric's `Data`.

    python benchmarks/data.py --out benchmarks/results/DATE-data-cpu
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import add_adsorbate, fcc111, molecule
from report import alternate, environment, spread, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oc20_records import attributes, new_graph, write_lmdb

from egnscale.data.batch import build_graph
from egnscale.data.convert import convert
from egnscale.data.dataset import Dataset, ForeignDataset, open_dataset
from egnscale.data.neighbors import GraphSpec, count_edges
from egnscale.data.sample import Sample

EDGES_STORED = 3000  #: in each record of the LMDB file; they are not taken, but have to be passed


def slab(number: int) -> Sample:
    """7 x 3 x 3 copper atoms with CO on them, distorted."""
    atoms = fcc111("Cu", (7, 3, 3), vacuum=10.0)
    add_adsorbate(atoms, molecule("CO"), 1.9, "fcc")
    atoms.rattle(0.1, seed=number)
    rng = np.random.default_rng(number)
    forces = rng.normal(size=(len(atoms), 3)).astype(np.float32).astype(np.float64)
    return replace(Sample.from_atoms(atoms, sid=number), energy=float(rng.normal()), forces=forces)


def record(sample: Sample) -> bytes:
    values = attributes(sample, relaxed=False)
    rng = np.random.default_rng(sample.sid)
    values["edge_index"] = torch.tensor(rng.integers(0, sample.num_atoms, (2, EDGES_STORED)))
    values["cell_offsets"] = torch.tensor(rng.integers(-1, 2, (EDGES_STORED, 3)))
    return pickle.dumps(new_graph(values), protocol=-1)


def read(data: Dataset) -> None:
    for i in range(len(data)):
        data[i]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"environment": environment("cpu")}
    samples = [slab(number) for number in range(args.structures)]
    with tempfile.TemporaryDirectory() as folder:
        oc20, store = Path(folder) / "oc20", Path(folder) / "store"
        oc20.mkdir()
        write_lmdb(oc20 / "data.0000.lmdb", [record(sample) for sample in samples])
        convert(oc20, store)
        lmdb, native = open_dataset(oc20), open_dataset(store)
        assert isinstance(lmdb, ForeignDataset)
        works = {
            "read a structure from OC20's LMDB file": partial(read, lmdb),
            "read a structure from the store": partial(read, native),
            "count the edges of its graph": lambda: [count_edges(sample) for sample in samples],
            "make its graph, symmetrised (GemNet-T)": lambda: [build_graph([s], GraphSpec()) for s in samples],
        }
        times = alternate(works, "cpu", args.rounds)
    milliseconds = {name: [1e3 * t / len(samples) for t in ts] for name, ts in times.items()}
    middle = {name: statistics.median(ts) for name, ts in milliseconds.items()}
    from_lmdb, from_store, count, _ = middle.values()
    results |= {
        "structures": len(samples),
        "edges": int(np.mean(native.num_edges)),
        "milliseconds": milliseconds,
        "first reading, structures per second": 1e3 / (from_lmdb + count),
    }
    note = (
        f"{len(samples)} made-up slabs of {samples[0].num_atoms} atoms with {results['edges']} edges on average; CPU "
        f"milliseconds for each structure, one thread, median [min-max] of {args.rounds} rounds; files in the page "
        "cache."
    )
    after = (
        f"The first reading of a set without sizes reads each structure and counts its edges: about "
        f"{1e3 / (from_lmdb + count):.0f} a second. The store is read {from_lmdb / from_store:.0f} times as fast."
    )
    rows = [(name, spread(ts, 3)) for name, ts in milliseconds.items()]
    write(args.out, "Reading OC20's files and the store", [note, table(("", "ms"), rows), after], results)


if __name__ == "__main__":
    main()
