"""Processes that do a job together: this one alone, or those of `mpirun`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Alone:
    """The only process."""

    rank = 0
    size = 1

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; an error there ends all ranks."""
        return function()

    def on_each(self, function: Callable[[], None]) -> None:
        """Call `function` on every rank and wait for all; an error on any ends all ranks."""
        function()


class MpiRanks(Alone):
    """The ranks of an MPI communicator. An error is raised where it happened; the other ranks exit silently."""

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()

    def on_first(self, function: Callable[[], T]) -> T:
        result, error = None, None
        if self.rank == 0:
            result, error = _attempt(function)
        result, failed = self._communicator.bcast((result, error is not None))
        self._leave(error, 0 if failed else None)
        return result

    def on_each(self, function: Callable[[], None]) -> None:
        _, error = _attempt(function)
        failed = self._communicator.allgather(error is not None)
        self._leave(error, failed.index(True) if True in failed else None)

    def _leave(self, error: BaseException | None, speaker: int | None) -> None:
        """Raise on the rank that speaks for all, where one does."""
        if speaker is not None:
            if error is not None and speaker == self.rank:
                raise error
            raise SystemExit(1)


def find_ranks() -> Alone:
    """The ranks that `mpirun` started, or this process alone.

    Raises:
        ValueError: under `mpirun` without mpi4py.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", 1))) == 1:
        return Alone()
    if importlib.util.find_spec("mpi4py") is None:
        raise ValueError("started by mpirun, but mpi4py is not installed: pip install 'egnscale[mpi]'")
    from mpi4py import MPI

    return MpiRanks(MPI.COMM_WORLD)


def _attempt(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error
