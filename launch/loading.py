"""Stores, samplers and loaders of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from egnscale.data.batch import AtomBatch, Collate, cell_coordinates
from egnscale.data.dataset import Dataset, First, open_dataset
from egnscale.data.neighbors import GraphSpec
from egnscale.data.readers import holds_sources
from egnscale.data.sample import Sample
from egnscale.data.sampler import BalancedBatchSampler
from egnscale.launch.reporting import show_reading
from egnscale.models import AtomModelConfig, ExtendedGraph
from egnscale.scaling.layout import Mesh
from egnscale.scaling.partition import partition_by_owner


def graph_spec(config: AtomModelConfig) -> GraphSpec:
    """The graph that a model was made for."""
    return GraphSpec(
        config.cutoff,
        config.max_neighbors,
        config.symmetrize,  # type: ignore[arg-type]
        leaving=config.gathers_at_source,
    )


def open_data(path: str | Path) -> Dataset:
    """A store, or OC20's LMDB files and their like, read once with a line of progress where sizes are not known yet."""
    with show_reading(path) as progress:
        return open_dataset(path, progress=progress)


#: What a task reads of each structure.
LABELS = {"s2ef": ("energy", "forces"), "is2re": ("energy_relaxed",)}


def open_labelled(path: str | Path, num_elements: int, task: str = "s2ef", limit: int | None = None) -> Dataset:
    """Open a store, or OC20's LMDB files and their like, for training or evaluation.

    Args:
        limit: structures to use, the first ones; None for all.

    Raises:
        ValueError: if it is empty, lacks what the task needs, or holds elements that the model does not know. What
            only some structures lack is found here where statistics count it, else by `PartCollate`.
    """
    store = open_data(path)
    if not len(store):
        raise ValueError(f"{path} holds no structures")
    sample = store[0]
    if missing := [label for label in LABELS[task] if getattr(sample, label) is None]:
        raise ValueError(f"{path}: structures have no {' and no '.join(missing)}, which {task} needs")
    for label in LABELS[task]:
        check_all_labelled(store, label, task)
    check_elements(path, store, num_elements)
    return store if limit is None else First(store, limit)


def check_all_labelled(store: Dataset, label: str, task: str) -> None:
    """Raises ValueError if statistics count fewer labels than structures."""
    counted = (store.metadata["statistics"].get(label) or {}).get("count")
    among = (store.metadata.get("provenance") or {}).get("statistics_of", len(store))
    if counted is not None and counted < among:
        raise ValueError(
            f"{store.path}: {among - counted} of {among} structures have no {label}, which {task} needs; "
            "make a store without them"
        )


def check_elements(path: str | Path, store: Dataset, num_elements: int) -> None:
    """Raises ValueError if a data set holds an element that the model does not know."""
    highest = max(store.metadata["statistics"]["elements"], default=0)
    if highest > num_elements:
        raise ValueError(
            f"{path} holds atomic number {highest}; the model knows 1..{num_elements} (model.num_elements)"
        )


@dataclass(frozen=True)
class PartCollate:
    """Samples to the part of their graph that one rank holds, and what is known of its atoms.

    Args:
        collate: makes the whole graph.
        parts: ranks that share it.
        part: this one, 0 .. parts - 1.
        labels: what every sample must have.

    Raises:
        ValueError: when called, naming the first sample that lacks a label; and as `collate`.
    """

    collate: Collate
    parts: int = 1
    part: int = 0
    labels: tuple[str, ...] = ()

    def __call__(self, samples: Sequence[Sample]) -> tuple[ExtendedGraph, AtomBatch]:
        for sample in samples:
            for label in self.labels:
                if getattr(sample, label) is None:
                    raise ValueError(
                        f"{sample.name} has no {label}, unlike others of its data; make a store without it"
                    )
        graph, batch = self.collate(samples)
        if self.parts == 1:
            return graph, batch
        graph, atoms = partition_by_owner(graph, cell_coordinates(samples), self.parts, self.part)
        return graph, batch.of_atoms(atoms)


def make_loader(
    store: Dataset,
    sampler: BalancedBatchSampler,
    model: AtomModelConfig,
    mesh: Mesh,
    workers: int = 0,
    task: str | None = None,
) -> DataLoader:
    """Loader of (graph, batch) pairs; graphs, or this rank's part of each, are built in its workers.

    Args:
        task: whose labels every structure must have (None: none).
    """
    collate = Collate(graph_spec(model), model.num_elements)
    labels = () if task is None else LABELS[task]
    return DataLoader(
        store,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=PartCollate(collate, mesh.layout.graph, mesh.graph_rank, labels),
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


def validation_splits(path: Path, task: str = "s2ef") -> dict[str, Path]:
    """{name: data set}: the path itself if it is one, else the `val_*` ones in it (or in its `s2ef`, ...).

    Where there are none, the `test_*` ones, whose labels others keep.

    Raises:
        ValueError: if there is nothing to evaluate on.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.is_file() or is_data(path):
        return {path.name: path}
    for root, kind in ((path, "val_"), (path / task, "val_"), (path, "test_"), (path / task, "test_")):
        folders = [folder for folder in sorted(root.glob(f"{kind}*")) if folder.is_dir() and is_data(folder)]
        found = {folder.name: folder for folder in folders}
        if found:
            known = [name for name in (kind + split.removeprefix("val_") for split in SPLIT_ORDER) if name in found]
            return {name: found[name] for name in [*known, *(name for name in found if name not in known)]}
    raise ValueError(f"{path} is no store of egnscale, and holds no val_* stores")


def is_data(folder: Path) -> bool:
    """Whether a directory is a store, or holds files that `open_data` may read."""
    return (folder / "metadata.json").is_file() or holds_sources(folder)
