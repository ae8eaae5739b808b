"""What the commands that relax share: which structures, whose part, where the results go."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from egnscale.data.dataset import Dataset, ForeignDataset
from egnscale.data.sample import Sample
from egnscale.data.store import Store
from egnscale.launch.loading import open_data
from egnscale.launch.reference import read_atoms
from egnscale.launch.relaxation import Potential, Relaxed, RelaxOptions, relax
from egnscale.launch.relaxation_folder import RelaxationFolder
from egnscale.launch.run_files import TrainedModel
from egnscale.scaling.engine import once
from egnscale.scaling.layout import Mesh

#: Between lines of progress where there is no terminal.
_SECONDS = 30.0


def settings_of(trained: TrainedModel, options: RelaxOptions, dtype: str) -> dict[str, Any]:
    """What decides the results of relaxations, besides the structures."""
    flat = asdict(options)
    return {"checkpoint": str(trained.path.resolve()), "dtype": dtype, **flat.pop("optimizer"), **flat}


def read_structures(path: Path, num_elements: int) -> Sequence[Sample]:
    """A data set, or the structures of a file that ASE reads.

    A structure's sid is `info["sid"]` where all have different ones, else its number.

    Raises:
        ValueError: naming the first structure that makes no sense, holds an unknown element, or has constraints other
            than fixed atoms.
    """
    if path.is_dir() or path.suffix in (".lmdb", ".aselmdb"):
        store = open_data(path)
        check_elements(path, store, num_elements)
        return store  # type: ignore[return-value]
    structures = read_atoms(path)
    given = [atoms.info.get("sid") for atoms in structures]
    own = all(str(sid).isdigit() for sid in given) and len(set(map(str, given))) == len(given)
    samples = []
    for number, atoms in enumerate(structures):
        where = f"{path}: structure {number}"
        others = [type(one).__name__ for one in atoms.constraints if type(one).__name__ != "FixAtoms"]
        if others:
            raise ValueError(f"{where} has the constraint {others[0]}; only FixAtoms can be kept, remove it")
        if not len(atoms):
            raise ValueError(f"{where} has no atoms")
        sample = Sample.from_atoms(atoms, sid=int(given[number]) if own else number)
        try:
            sample.validate()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        highest = int(sample.atomic_numbers.max())
        if highest > num_elements:
            raise ValueError(f"{where} holds atomic number {highest}; the model knows 1..{num_elements}")
        samples.append(sample)
    return samples


def check_elements(path: Path, store: Dataset, num_elements: int) -> None:
    """Raises ValueError if the store holds an element that the model does not know."""
    highest = max(store.metadata["statistics"]["elements"])
    if highest > num_elements:
        raise ValueError(f"{path} holds atomic number {highest}; the model knows 1..{num_elements}")


def ids(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """sids and fids."""
    if isinstance(samples, Store | ForeignDataset):
        return samples.sid.tolist(), samples.fid.tolist()
    return [sample.sid for sample in samples], [sample.fid for sample in samples]


def share_of(samples: Sequence[Sample], mesh: Mesh, count: int) -> list[int]:
    """Which of the first `count` structures this replica relaxes, large ones first; all have some of every size."""
    if isinstance(samples, Store | ForeignDataset):
        sizes = samples.num_atoms[:count].astype(np.int64)
    else:
        sizes = np.array([sample.num_atoms for sample in samples[:count]], dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    return order[mesh.data_rank :: mesh.layout.data].tolist()


class Patience:
    """A meeting point for replicas that are not done at the same time. Making it and waiting are collective.

    Relaxations take hours, and the usual collectives give up after half of one. A rank that ends while others wait
    here is noticed by the watch (`egnscale.scaling.failure`).
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def wait(self) -> None:
        """Until every rank is here."""
        if self._group is not None:
            dist.barrier(self._group)


def relax_share(
    samples: Sequence[Sample],
    share: Sequence[int],
    potential: Potential,
    options: RelaxOptions,
    *,
    batch_size: int,
    keep_frames: bool = False,
    quiet: bool = True,
    title: str = "relaxing",
    done: int = 0,
) -> Iterator[Relaxed]:
    """Relax some of the structures, with progress on standard error.

    Args:
        share: their numbers, in the order in which they are begun.
        done: how many more are done already, for the progress.
    """
    total, said = done + len(share), time.monotonic()
    live = sys.stderr.isatty()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    console = Console(stderr=True)
    evaluated = 0

    def observe(structures: int) -> None:
        nonlocal evaluated
        evaluated += structures
        bar.update(task, what=f"{evaluated:,} steps")

    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet or not live) as bar:
        task = bar.add_task(title, total=total, completed=done, what="")
        for relaxed in relax(
            samples,
            potential,
            options,
            order=share,
            batch_size=batch_size,
            max_atoms=potential.max_atoms,
            lanes=potential.lanes,
            keep_frames=keep_frames,
            observe=observe,
        ):
            bar.advance(task)
            done += 1
            if not quiet and not live and time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                print(f"{title}: {done}/{total} structures, {evaluated:,} steps", file=sys.stderr, flush=True)
            yield relaxed


def relax_into(
    folder: RelaxationFolder,
    samples: Sequence[Sample],
    potential: Potential,
    options: RelaxOptions,
    mesh: Mesh,
    *,
    batch_size: int,
    trajectories: bool = False,
    quiet: bool = True,
    title: str = "relaxing",
) -> list[Relaxed]:
    """Relax what is not there yet, each replica a part; returns all results, on every rank. Collective.

    Raises:
        ValueError, OSError: as `RelaxationFolder.claim`, on every rank.
    """
    once(folder.claim)
    patience = Patience()
    try:
        if not folder.finished:
            share = share_of(samples, mesh, len(folder.names))
            missing = [index for index in share if folder.load(index, samples[index]) is None]
            for relaxed in relax_share(
                samples,
                missing,
                potential,
                options,
                batch_size=batch_size,
                keep_frames=trajectories,
                quiet=quiet,
                title=title,
                done=len(share) - len(missing),
            ):
                folder.save(relaxed)
            patience.wait()
            once(lambda: folder.finish(samples))
    finally:
        folder.release()
    return folder.read(samples)
