"""How much memory an allocator takes from the system for a sequence of allocations: more than is alive at any time.

Freed memory is not always given back. On the CPU, glibc keeps what lies below something that is still in use; on CUDA,
torch keeps every block that it ever had. How much that is follows from sizes and order, so the sequence is gone
through with the allocators' own rules. Addresses and counts are in bytes.

Sources: glibc's malloc.c (dlmalloc: best fit, coalescing, dynamic mmap threshold, trimming of the top);
torch's CUDACachingAllocator.cpp (two pools, 2 and 20 MiB segments, best fit, splitting).
"""

from __future__ import annotations

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

    def peek(self, size: int) -> int | None:
        """The size of the chunk that `best` would give."""
        at = bisect_left(self.free_ones, (size, -1))
        return None if at == len(self.free_ones) else self.free_ones[at][0]

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


class GlibcHeap:
    """The main arena of glibc's malloc with its default settings, for tensors: 64-byte aligned."""

    ALIGNMENT = 64 + 32  #: what posix_memalign and a chunk's header add
    PAGE = 4 * KIB
    TOP_PAD = 128 * KIB
    LARGEST_THRESHOLD = 32 * MIB
    SMALLEST_SPLIT = 32

    def __init__(self) -> None:
        self.taken = self.peak = 0
        self.mmap_threshold = 128 * KIB
        self.trim_threshold = 128 * KIB
        self._chunks = _Chunks()
        self._last: _Chunk | None = None  # the chunk below the top
        self._top = 0  # where the top begins
        self._top_size = 0
        self._where: dict[int, _Chunk | int] = {}  # a chunk, or the size of a mapping of its own

    def allocate(self, key: int, size: int) -> None:
        size = (size + self.ALIGNMENT + 15) // 16 * 16
        chunk = self._chunks.best(size)
        if chunk is not None:
            chunk.free = False
            if chunk.size - size >= self.SMALLEST_SPLIT:
                was_last = chunk is self._last
                self._chunks.split(chunk, size)
                if was_last:
                    self._last = chunk.after
            self._where[key] = chunk
        elif size > self._top_size and size >= self.mmap_threshold:
            mapped = -(-size // self.PAGE) * self.PAGE
            self._where[key] = mapped
            self.taken += mapped
        else:
            if size > self._top_size:
                more = -(-(size + self.TOP_PAD - self._top_size) // self.PAGE) * self.PAGE
                self._top_size += more
                self.taken += more
            chunk = _Chunk(self._top, size, before=self._last)
            if self._last is not None:
                self._last.after = chunk
            self._chunks.by_start[chunk.start] = chunk
            self._last = chunk
            self._top, self._top_size = self._top + size, self._top_size - size
            self._where[key] = chunk
        self.peak = max(self.peak, self.taken)

    def free(self, key: int) -> None:
        found = self._where.pop(key)
        if isinstance(found, int):
            self.taken -= found
            if self.mmap_threshold < found <= self.LARGEST_THRESHOLD:
                self.mmap_threshold, self.trim_threshold = found, 2 * found
            return
        chunk = self._chunks.release(found)
        if chunk.after is None:
            self._chunks.remove(chunk)
            del self._chunks.by_start[chunk.start]
            self._top, self._top_size = chunk.start, self._top_size + chunk.size
            self._last = chunk.before
            if self._last is not None:
                self._last.after = None
        if self._top_size >= self.trim_threshold:
            spare = (self._top_size - self.TOP_PAD) // self.PAGE * self.PAGE
            self._top_size -= spare
            self.taken -= spare


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
