"""Which structures each data-parallel replica reads at each step, so that all have the same amount of work.

Structures of OC20 have from a few hundred to many thousand edges, and a step takes as long as its slowest replica; in a
pipeline, every stage waits for the slowest micro-batch. Each optimizer step's structures are therefore drawn together
for all replicas and micro-batches and dealt out by size. Every replica computes the same deal from the same seed:
nothing is communicated.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of indices, for `DataLoader(batch_sampler=...)`; the same for the same (seed, epoch).

    Each optimizer step takes the next batch_size * num_replicas * accumulation indices of the epoch's permutation and
    deals them out, so that the summed sizes of all its batches are close. Counts may differ, by design. Which
    structures make up a step does not depend on how many replicas share them, as long as their product stays.

    No structure is ever repeated. At the end of an epoch a smaller step is left over:
    * for training (`shuffle=True`) it is dealt out if every replica gets a structure of it; a remainder smaller than
      `num_replicas` is dropped (another one each epoch), since an empty batch has no gradient to average;
    * for evaluation (`shuffle=False`) it is always dealt out, and some replicas may then get an empty batch: all
      yield the same number of batches, and every structure is counted once;
    * `drop_last=True` drops it in either case.

    Iteration begins at the position that was set, (0, 0) at first, and ends with that epoch. The position does not
    move by itself, since a loader reads ahead of the training: call `set_position(epoch + 1)` for the next epoch.

    Args:
        sizes: (structures,) what to balance: edges or atoms of each structure; all ones deals equal counts.
        batch_size: structures per replica, on average.
        num_replicas: data-parallel replicas.
        rank: this replica, 0 .. num_replicas - 1.
        seed: of the shuffling.
        shuffle: a new permutation every epoch; False reads in order.
        drop_last: drop the smaller last step.
        start: (epoch, batch) to begin with.
        accumulation: batches of an optimizer step, which are dealt together. Steps go on across epochs, and are counted
            from batch 0 of epoch 0; the two parts of one that an epoch's end cuts are dealt each by itself.

    Raises:
        ValueError: for arguments out of range, and where there is nothing to train on.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        start: tuple[int, int] = (0, 0),
        accumulation: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank}; with {num_replicas} replicas it must be 0..{num_replicas - 1}")
        self.sizes = np.asarray(sizes)
        if self.sizes.ndim != 1 or (self.sizes.size and not self.sizes.min() >= 0):
            raise ValueError(f"sizes must be one non-negative number per structure, got shape {self.sizes.shape}")
        self.batch_size = batch_size
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.accumulation = accumulation
        whole, rest = divmod(len(self.sizes), batch_size * num_replicas)
        keep_rest = rest > 0 and not drop_last and (rest >= num_replicas or not shuffle)
        self._batches = whole + keep_rest
        if shuffle and self._batches == 0:
            need = batch_size * num_replicas if drop_last else num_replicas
            raise ValueError(
                f"{len(self.sizes)} structures are too few to train on {num_replicas} replicas; "
                f"at least {need} are needed"
            )
        self.set_position(*start)

    def __len__(self) -> int:
        """Batches per epoch, the same on every replica and wherever the position is."""
        return self._batches

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin with batch number `batch` of `epoch`, exactly as if it had come that far."""
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"no batch {batch} in epoch {epoch}; an epoch has {len(self)} batches")
        self.epoch, self.batch = epoch, batch

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for begin, end in self._steps(self.batch):
            dealt = self._deal(order, begin, end)
            for batch in range(max(begin, self.batch), end):
                yield dealt[(batch - begin) * self.num_replicas + self.rank].tolist()

    def imbalance(self, max_steps: int | None = None) -> float:
        """Largest over mean summed size of the replicas, averaged over the steps of the current epoch; 1 is perfect.

        Steps without any size are left out; 1 if nothing remains.
        """
        steps = len(self) if max_steps is None else min(max_steps, len(self))
        loads = np.array([[self.sizes[part].sum() for part in parts] for parts in self._of_replicas(steps)])
        loads = loads.reshape(steps, self.num_replicas).astype(np.float64)
        loads = loads[loads.sum(1) > 0]
        return float((loads.max(1) / loads.mean(1)).mean()) if len(loads) else 1.0

    def largest(self, weights: np.ndarray, max_batches: int) -> list[int]:
        """Indices of the batch, of any replica, whose weights sum to most, among the first batches of the epoch."""
        dealt = (part for parts in self._of_replicas(min(len(self), max_batches)) for part in parts)
        return max(dealt, key=lambda part: int(weights[part].sum())).tolist()

    def _of_replicas(self, batches: int) -> Iterator[list[np.ndarray]]:
        """What each replica gets, for the first batches of the epoch."""
        order = self._order(self.epoch)
        for begin, end in self._steps():
            if begin >= batches:
                return
            dealt = self._deal(order, begin, end)
            for batch in range(begin, min(end, batches)):
                first = (batch - begin) * self.num_replicas
                yield dealt[first : first + self.num_replicas]

    def _steps(self, batch: int = 0) -> Iterator[tuple[int, int]]:
        """(first, last + 1) of each optimizer step's batches in this epoch, from the step that a batch belongs to."""
        begin = batch - (self.epoch * len(self) + batch) % self.accumulation
        while begin < len(self):
            yield max(begin, 0), min(begin + self.accumulation, len(self))
            begin += self.accumulation

    def _order(self, epoch: int) -> np.ndarray:
        """(structures,) the epoch's permutation; 32 bits where they suffice, since OC20 has 134 million structures."""
        order = np.arange(len(self.sizes), dtype=np.uint32 if len(self.sizes) < 2**32 else np.int64)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def _deal(self, order: np.ndarray, begin: int, end: int) -> list[np.ndarray]:
        """Indices of batches begin..end - 1, which belong to one optimizer step, of every replica: batch by batch."""
        together = self.batch_size * self.num_replicas
        indices = order[begin * together : end * together]
        return [indices[part] for part in deal(self.sizes[indices], self.num_replicas * (end - begin))]


def deal(sizes: np.ndarray, bins: int) -> list[np.ndarray]:
    """Deal items to bins, largest first, each to the bin that is lightest so far (LPT).

    The heaviest bin ends at most 4/3 as heavy as it must be (Graham 1969). With at least as many items as bins, no
    bin stays empty.

    Args:
        sizes: (N,) non-negative

    Returns:
        for each bin the indices into `sizes`, largest first.
    """
    # Ties go to the bin with fewer items, so that items of size zero are spread as well, then to the lower number.
    heap = [(0.0, 0, bin) for bin in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for item in np.argsort(-sizes.astype(np.float64), kind="stable").tolist():
        load, count, bin = heap[0]
        dealt[bin].append(item)
        heapq.heapreplace(heap, (load + float(sizes[item]), count + 1, bin))
    return [np.array(items, dtype=np.int64) for items in dealt]
