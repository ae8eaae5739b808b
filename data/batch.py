"""From structures to a graph and its targets: what a loader's worker does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from egnscale.data.neighbors import GraphSpec, radius_graph
from egnscale.data.sample import Sample
from egnscale.models.graph import EdgeBuckets, ExtendedGraph, LeavingEdges


@dataclass(frozen=True, eq=False)
class AtomBatch:
    """What is known about a batch of structures besides the graph. V atoms, B systems.

    Where ranks share a graph, V are the atoms that one of them holds.
    """

    sid: Tensor  #: (B,) int64
    fid: Tensor  #: (B,) int64
    num_atoms: Tensor  #: (B,) int64, all of them
    fixed: Tensor  #: (V,) bool
    tags: Tensor  #: (V,) int64
    energy: Tensor | None  #: (B,) float64, eV
    energy_relaxed: Tensor | None  #: (B,) float64, eV
    forces: Tensor | None  #: (V, 3) float, eV/A

    @property
    def names(self) -> list[str]:
        """What error messages call these structures."""
        return [f"sid {sid} fid {fid}" for sid, fid in zip(self.sid.tolist(), self.fid.tolist(), strict=True)]

    def of_atoms(self, atoms: Tensor) -> AtomBatch:
        """The same structures, with what is known of some of their atoms only."""
        forces = None if self.forces is None else self.forces[atoms]
        return replace(self, fixed=self.fixed[atoms], tags=self.tags[atoms], forces=forces)

    def to(self, device: torch.device | str) -> AtomBatch:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.tensors().items()})

    def pin_memory(self) -> AtomBatch:
        return replace(self, **{name: value.pin_memory() for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Collate:
    """Callable that turns samples into (graph, batch). Picklable, so it runs in the loader's workers.

    Args:
        spec: which graph to build.
        num_elements: the largest atomic number that the model can embed.
        dtype: of positions and shifts; distances and everything geometric follow it.
    """

    spec: GraphSpec
    num_elements: int = 83
    dtype: torch.dtype = torch.float32

    def __call__(self, samples: Sequence[Sample]) -> tuple[ExtendedGraph, AtomBatch]:
        """Raises ValueError for structures that make no sense or hold an element that the model does not know."""
        for sample in samples:
            highest = sample.atomic_numbers.max(initial=1)
            if highest > self.num_elements:
                raise ValueError(f"{sample.name} holds atomic number {highest}; the model knows 1..{self.num_elements}")
        return build_graph(samples, self.spec, self.dtype), _batch(samples)


def build_graph(samples: Sequence[Sample], spec: GraphSpec, dtype: torch.dtype = torch.float32) -> ExtendedGraph:
    """One `ExtendedGraph` of all samples."""
    edges = radius_graph(samples, spec)
    counts = np.array([sample.num_atoms for sample in samples], dtype=np.int64)
    num_atoms = int(counts.sum())
    source, target, reverse = map(torch.from_numpy, (edges.source, edges.target, edges.reverse))
    return ExtendedGraph(
        positions=torch.from_numpy(_stack([sample.positions for sample in samples], 3)).to(dtype),
        atomic_numbers=torch.from_numpy(_stack([sample.atomic_numbers for sample in samples])),
        system=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        num_systems=len(samples),
        source=source,
        target=target,
        shift=torch.from_numpy(edges.shift).to(dtype),
        reverse=reverse,
        buckets=EdgeBuckets.build(torch.bincount(target, minlength=num_atoms)),
        leaving=LeavingEdges.build(source, reverse, num_atoms) if spec.leaving else None,
    )


def cell_coordinates(samples: Sequence[Sample]) -> Tensor:
    """(V, 3) float64, where atoms lie in their cells: fractional along periodic axes (0 to 1), as they are elsewhere.

    Axes without a cell vector are completed by unit vectors. Rounded, so that atoms of one layer have one coordinate on
    every machine.
    """
    parts = []
    for sample in samples:
        cell = np.where(sample.cell.any(axis=1, keepdims=True), sample.cell, np.eye(3))
        if abs(np.linalg.det(cell)) < 1e-9:
            cell = np.eye(3)
        fractional = sample.positions @ np.linalg.inv(cell)
        fractional = np.round(fractional, 6)
        parts.append(np.where(sample.pbc, fractional % 1.0, fractional))
    return torch.from_numpy(_stack(parts, 3))


def _batch(samples: Sequence[Sample]) -> AtomBatch:
    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def energies(values: list) -> Tensor | None:
        return None if None in values else torch.tensor(values, dtype=torch.float64)

    with_forces = all(sample.forces is not None for sample in samples)
    return AtomBatch(
        sid=column([sample.sid for sample in samples]),
        fid=column([sample.fid for sample in samples]),
        num_atoms=column([sample.num_atoms for sample in samples]),
        fixed=torch.from_numpy(_stack([sample.fixed for sample in samples]).astype(bool)),
        tags=torch.from_numpy(_stack([sample.tags for sample in samples]).astype(np.int64)),
        energy=energies([sample.energy for sample in samples]),
        energy_relaxed=energies([sample.energy_relaxed for sample in samples]),
        forces=torch.from_numpy(_stack([sample.forces for sample in samples], 3)) if with_forces else None,
    )


def _stack(arrays: list, columns: int = 0) -> np.ndarray:
    if not arrays:
        return np.zeros((0, columns)) if columns else np.zeros(0, dtype=np.int64)
    return np.concatenate(arrays)
