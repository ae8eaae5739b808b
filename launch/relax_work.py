"""What the commands that relax share: whose part, and where the results go."""

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

from egnscale.launch.relaxation import Potential, Relaxed, RelaxOptions, relax
from egnscale.launch.relaxation_folder import RelaxationFolder
from egnscale.launch.structures import Structures
from egnscale.scaling.engine import gather_over_ranks, once
from egnscale.scaling.layout import Mesh

#: Between lines of progress where there is no terminal.
_SECONDS = 30.0


def settings_of(checkpoint: Path, options: RelaxOptions, dtype: str) -> dict[str, Any]:
    """What decides the results of relaxations, besides the structures."""
    flat = asdict(options)
    return {"checkpoint": str(checkpoint.resolve()), "dtype": dtype, **flat.pop("optimizer"), **flat}


def share_of(samples: Structures, mesh: Mesh) -> list[int]:
    """Which of the structures this replica relaxes, large ones first; all have some of every size."""
    order = np.argsort(-samples.num_atoms.astype(np.int64), kind="stable")
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
    samples: Structures,
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


def _to_do(folder: RelaxationFolder, samples: Structures, mesh: Mesh) -> tuple[bool, list[int]]:
    """Whether all is done, and what of this replica's share is not: the same on all stages of its pipeline. Collective.

    As one of them sees it: file systems may show the others something older.
    """
    mine: tuple[bool, list[int]] = folder.finished, []
    if mesh.stage == 0 and not folder.finished:
        mine = False, [index for index in share_of(samples, mesh) if folder.load(index, samples[index]) is None]
    every = gather_over_ranks(mine)
    return every[0][0], every[mesh.layout.rank(data=mesh.data_rank)][1]


def relax_into(
    folder: RelaxationFolder,
    samples: Structures,
    potential: Potential,
    options: RelaxOptions,
    mesh: Mesh,
    *,
    batch_size: int,
    trajectories: bool = False,
    retry: bool = False,
    quiet: bool = True,
    title: str = "relaxing",
) -> list[Relaxed]:
    """Relax what is not there yet, each replica a part; returns all results, on every rank. Collective.

    Args:
        retry: try again what failed, also where all was done.

    Raises:
        ValueError, OSError: as `RelaxationFolder.claim`, on every rank.
    """

    def claim() -> None:
        folder.claim()
        if retry:
            folder.reopen(samples)

    patience = Patience()
    try:
        once(claim)
        finished, missing = _to_do(folder, samples, mesh)
        if not finished:
            share = share_of(samples, mesh)
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
                if mesh.stage == 0:  # the other stages have the same
                    folder.save(relaxed)
            patience.wait()
            once(lambda: folder.finish(samples))
    finally:
        folder.release()
    return folder.read(samples)
