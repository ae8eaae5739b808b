"""From an exception on one rank to one line on every rank.

with watched(rank, size, "egnscale train"):
    ...                      # rank 3 raises here: every other rank prints that and ends
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from egnscale.scaling.watch import PERIOD, SILENT, Watch


class PeerFailed(ConnectionError):
    """Another rank is the reason why this one cannot go on."""


@contextmanager
def watched(rank: int, size: int, name: str) -> Iterator[None]:
    """Watch the ranks during the block; alone, do nothing.

    Raises:
        PeerFailed: instead of a collective's error, where it is known which rank caused it.
        ValueError: where EGNSCALE_WATCH_SECONDS makes no sense.
    """
    silent = _limit()
    if size == 1 or not silent:
        yield
        return
    watch = Watch.start(rank, size, socket.gethostname(), name, silent)
    try:
        yield
    except BaseException as error:
        doubtful = _in_a_collective(error)
        watch.fail(_describe(error), doubtful=doubtful)
        verdict = watch.verdict()
        if doubtful and verdict and not verdict.startswith(f"rank {rank} "):
            raise PeerFailed(verdict) from error
        raise
    else:
        watch.stop()


def _limit() -> float:
    """Seconds of silence that are too long; 0 for no watch."""
    given = os.environ.get("EGNSCALE_WATCH_SECONDS", SILENT)
    try:
        silent = float(given)
    except ValueError:
        silent = -1.0
    if silent and not silent >= 2 * PERIOD:
        raise ValueError(f"EGNSCALE_WATCH_SECONDS is {given}; give {2 * PERIOD:.0f} seconds or more, or 0 for no watch")
    return silent


def _describe(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())[:500]
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def _in_a_collective(error: BaseException) -> bool:
    """Whether the error may be the consequence of another rank's end."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in words for word in ("gloo", "nccl", "closed by peer"))
    )
