"""Stores, samplers and loaders of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from egnscale.data.batch import AtomBatch, Collate, cell_coordinates
from egnscale.data.dataset import Dataset, open_dataset
from egnscale.data.neighbors import GraphSpec
from egnscale.data.readers import holds_sources
from egnscale.data.sample import Sample
from egnscale.data.sampler import BalancedBatchSampler
from egnscale.launch.reporting import show_reading
from egnscale.models import ExtendedGraph, GemNetConfig
from egnscale.scaling.layout import Mesh
from egnscale.scaling.partition import partition_by_owner


def graph_spec(config: GemNetConfig) -> GraphSpec:
    """The graph that a model was made for."""
    return GraphSpec(config.cutoff, config.max_neighbors, config.symmetrize)  # type: ignore[arg-type]


def open_labelled(path: str | Path, num_elements: int) -> Dataset:
    """Open a store, or OC20's LMDB files and their like, for training or evaluation.

    Raises:
        ValueError: if it is empty, has no energies or forces, or holds elements that the model does not know.
    """
    with show_reading(path) as progress:
        store = open_dataset(path, progress=progress)
    if not len(store):
        raise ValueError(f"{path} holds no structures")
    sample = store[0]
    if sample.energy is None or sample.forces is None:
        raise ValueError(f"{path}: structures have no energies and forces, which s2ef needs")
    highest = max(store.metadata["statistics"]["elements"])
    if highest > num_elements:
        raise ValueError(
            f"{path} holds atomic number {highest}; the model knows 1..{num_elements} (model.num_elements)"
        )
    return store


@dataclass(frozen=True)
class PartCollate:
    """Samples to the part of their graph that one rank holds, and what is known of its atoms.

    Args:
        collate: makes the whole graph.
        parts: ranks that share it.
        part: this one, 0 .. parts - 1.
    """

    collate: Collate
    parts: int = 1
    part: int = 0

    def __call__(self, samples: Sequence[Sample]) -> tuple[ExtendedGraph, AtomBatch]:
        graph, batch = self.collate(samples)
        if self.parts == 1:
            return graph, batch
        graph, atoms = partition_by_owner(graph, cell_coordinates(samples), self.parts, self.part)
        return graph, batch.of_atoms(atoms)


def make_loader(
    store: Dataset,
    sampler: BalancedBatchSampler,
    model: GemNetConfig,
    mesh: Mesh,
    workers: int = 0,
) -> DataLoader:
    """Loader of (graph, batch) pairs; graphs, or this rank's part of each, are built in its workers."""
    return DataLoader(
        store,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=PartCollate(Collate(graph_spec(model), model.num_elements), mesh.layout.graph, mesh.graph_rank),
        num_workers=workers,
        pin_memory=mesh.device.type == "cuda",
    )


def sizes_for_balance(store: Dataset, rule: str) -> np.ndarray:
    """What the sampler balances over ranks."""
    if rule == "none":
        return np.ones(len(store))
    return store.num_edges if rule == "edges" else store.num_atoms


#: OC20's validation splits, in the order in which they are reported.
SPLIT_ORDER = ("val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")


def validation_splits(path: Path) -> dict[str, Path]:
    """{name: data set}: the path itself if it is one, else the `val_*` directories in it (or in its `s2ef`) that are.

    Raises:
        ValueError: if there is nothing to evaluate on.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file() or _is_data(path):
        return {path.name: path}
    for root in (path, path / "s2ef"):
        found = {folder.name: folder for folder in sorted(root.glob("val_*")) if folder.is_dir() and _is_data(folder)}
        if found:
            known = [name for name in SPLIT_ORDER if name in found]
            return {name: found[name] for name in [*known, *(name for name in found if name not in known)]}
    raise ValueError(f"{path} is no store of egnscale, and holds no val_* stores")


def _is_data(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() or holds_sources(folder)
