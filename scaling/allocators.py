"""How much memory an allocator takes from the system for a sequence of allocations: more than is alive at any time.

On CUDA torch keeps every block that it ever had, so the sequence is gone through with its allocator's own rules
(CUDACachingAllocator.cpp: two pools, 2 and 20 MiB segments, best fit, splitting). On a CPU it depends on glibc's heap.
Addresses and counts are in bytes.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

KIB, MIB = 2**10, 2**20


class Allocator(Protocol):
    """Follows a process's allocations."""

    taken: int  #: from the system, now
    peak: int  #: the most so far

    def allocate(self, key: int, size: int) -> None: ...

    def free(self, key: int) -> None: ...


@dataclass(slots=True)
class _Chunk:
    start: int
    size: int
    free: bool = False
    before: _Chunk | None = None
    after: _Chunk | None = None


class _Chunks:
    """Adjacent chunks, the free ones in order of size: best fit, splitting, coalescing."""

    def __init__(self) -> None:
        self.free_ones: list[tuple[int, int]] = []  # (size, start)
        self.by_start: dict[int, _Chunk] = {}

    def best(self, size: int) -> _Chunk | None:
        """The smallest free chunk that is large enough, no longer among the free ones."""
        at = bisect_left(self.free_ones, (size, -1))
        if at == len(self.free_ones):
            return None
        return self.by_start[self.free_ones.pop(at)[1]]

    def split(self, chunk: _Chunk, size: int) -> None:
        """Keep `size` bytes of a chunk and let the rest be free."""
        rest = _Chunk(chunk.start + size, chunk.size - size, before=chunk, after=chunk.after)
        if chunk.after is not None:
            chunk.after.before = rest
        chunk.after, chunk.size = rest, size
        self.by_start[rest.start] = rest
        self.release(rest)

    def release(self, chunk: _Chunk) -> _Chunk:
        """Free a chunk, joined with free neighbours."""
        for other in (chunk.before, chunk.after):
            if other is not None and other.free:
                self.remove(other)
                first, second = (other, chunk) if other is chunk.before else (chunk, other)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                del self.by_start[second.start]
                chunk = first
        chunk.free = True
        insort(self.free_ones, (chunk.size, chunk.start))
        return chunk

    def remove(self, chunk: _Chunk) -> None:
        self.free_ones.pop(bisect_left(self.free_ones, (chunk.size, chunk.start)))
        chunk.free = False


class Pages:
    """A CPU process that gives freed memory back at once: whole pages of what is alive."""

    PAGE = 4 * KIB

    def __init__(self) -> None:
        self.taken = self.peak = 0
        self._sizes: dict[int, int] = {}

    def allocate(self, key: int, size: int) -> None:
        self._sizes[key] = size = -(-size // self.PAGE) * self.PAGE
        self.taken += size
        self.peak = max(self.peak, self.taken)

    def free(self, key: int) -> None:
        self.taken -= self._sizes.pop(key)


def give_back_at_once() -> bool:
    """Let glibc map each tensor by itself from now on; returns whether this is glibc.

    Otherwise aligned tensors leave holes in its heap that the next tensor of the same size does not fit into, and a
    training step takes up to twice the memory of its tensors. Mapping them costs time: pages are made anew.
    """
    if not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 64 * KIB))


_M_MMAP_THRESHOLD = -3


class CudaCache:
    """torch's caching allocator on one stream: what `torch.cuda.max_memory_reserved` counts."""

    ROUND = 512
    SMALL = MIB
    SMALL_SEGMENT = 2 * MIB
    LARGE_SEGMENT = 20 * MIB
    LARGE = 10 * MIB
    ROUND_LARGE = 2 * MIB

    def __init__(self) -> None:
        self.taken = self.peak = 0
        self._pools = {True: _Chunks(), False: _Chunks()}
        self._where: dict[int, tuple[bool, _Chunk]] = {}
        self._next = 0

    def allocate(self, key: int, size: int) -> None:
        size = -(-max(size, 1) // self.ROUND) * self.ROUND
        small = size <= self.SMALL
        pool = self._pools[small]
        chunk = pool.best(size)
        if chunk is None:
            if small:
                segment = self.SMALL_SEGMENT
            elif size < self.LARGE:
                segment = self.LARGE_SEGMENT
            else:
                segment = -(-size // self.ROUND_LARGE) * self.ROUND_LARGE
            chunk = _Chunk(self._next, segment)
            pool.by_start[chunk.start] = chunk
            self._next += segment + 1  # segments are not joined
            self.taken += segment
            self.peak = max(self.peak, self.taken)
        chunk.free = False
        if chunk.size - size >= (self.ROUND if small else self.SMALL + 1):
            pool.split(chunk, size)
        self._where[key] = small, chunk

    def free(self, key: int) -> None:
        small, chunk = self._where.pop(key)
        self._pools[small].release(chunk)
