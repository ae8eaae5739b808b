"""The balanced batch sampler: every structure once, the same deal everywhere, and less idle time."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from egnscale.data.sampler import BalancedBatchSampler, deal


def _sizes(count: int, seed: int = 0) -> np.ndarray:
    """Sizes as uneven as those of OC20: log-normal."""
    return np.random.default_rng(seed).lognormal(8, 0.7, count).astype(np.int64)


def _epoch(sizes: np.ndarray, batch_size: int, replicas: int, position: tuple[int, int] = (0, 0), **options) -> list:
    """[step][replica] -> indices."""
    samplers = [
        BalancedBatchSampler(sizes, batch_size, replicas, rank, seed=7, start=position, **options)
        for rank in range(replicas)
    ]
    return list(zip(*(list(sampler) for sampler in samplers), strict=True))


def _flat(steps: list) -> list[int]:
    return [index for step in steps for part in step for index in part]


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [8, 31, 48, 50, 97])
def test_each_structure_at_most_once(count: int, replicas: int) -> None:
    together = 3 * replicas
    rest = count % together
    dropped = rest if rest < replicas else 0
    steps = _epoch(_sizes(count), 3, replicas)
    flat = _flat(steps)
    assert len(set(flat)) == len(flat) == count - dropped
    assert all(len(part) > 0 for step in steps for part in step)
    assert len(steps) == len(BalancedBatchSampler(_sizes(count), 3, replicas))

    assert sorted(_flat(_epoch(_sizes(count), 3, replicas, shuffle=False))) == list(range(count))

    for shuffle in (True, False):
        if count >= together:
            steps = _epoch(_sizes(count), 3, replicas, shuffle=shuffle, drop_last=True)
            assert [sum(map(len, step)) for step in steps] == [together] * (count // together)


def test_evaluation_reads_in_order_and_allows_empty_batches() -> None:
    steps = _epoch(_sizes(13), 2, 4, shuffle=False)
    assert [sorted(_flat([step])) for step in steps] == [list(range(8)), list(range(8, 13))]
    steps = _epoch(_sizes(10), 2, 4, shuffle=False)
    assert sorted(len(part) for part in steps[-1]) == [0, 0, 1, 1]
    assert _epoch(_sizes(0), 2, 4, shuffle=False) == []


def test_epochs_differ_and_repeat() -> None:
    sizes = _sizes(40)
    assert _epoch(sizes, 2, 2) == _epoch(sizes, 2, 2)
    assert _epoch(sizes, 2, 2) != _epoch(sizes, 2, 2, position=(1, 0))
    other_seed = [list(BalancedBatchSampler(sizes, 2, 2, rank, seed=8)) for rank in range(2)]
    assert list(zip(*other_seed, strict=True)) != _epoch(sizes, 2, 2)


@pytest.mark.parametrize("shuffle", [True, False])
def test_position(shuffle: bool) -> None:
    sizes = _sizes(50)
    for epoch in range(2):
        whole = _epoch(sizes, 2, 3, position=(epoch, 0), shuffle=shuffle)
        for batch in range(len(whole) + 1):
            assert _epoch(sizes, 2, 3, position=(epoch, batch), shuffle=shuffle) == whole[batch:]
    sampler = BalancedBatchSampler(sizes, 2, 3, shuffle=shuffle)
    sampler.set_position(1, 4)
    assert list(sampler) == list(sampler), "iterating does not move the position"
    assert len(sampler) == len(whole)


@pytest.mark.parametrize("accumulation", [2, 3, 4])
@pytest.mark.parametrize("replicas", [1, 2])
def test_batches_of_an_optimizer_step_are_dealt_together(accumulation: int, replicas: int) -> None:
    """Over two epochs that end in the middle of a step: every structure once, and the same wherever one begins."""
    sizes, batch_size = _sizes(59), 4 // replicas
    found = []
    for epoch in range(2):
        whole = _epoch(sizes, batch_size, replicas, position=(epoch, 0), accumulation=accumulation)
        for batch in range(len(whole) + 1):
            options = {"position": (epoch, batch), "accumulation": accumulation}
            assert _epoch(sizes, batch_size, replicas, **options) == whole[batch:]
        assert len(whole) % accumulation or accumulation == 3, "a step has batches of both epochs"
        assert sorted(_flat(whole)) == list(range(59))
        found += [sorted(_flat([step])) for step in whole]
    # The structures of a step are those of as many steps of single batches, however many replicas share them.
    plain = [sorted(_flat([s])) for epoch in range(2) for s in _epoch(sizes, 4, 1, position=(epoch, 0))]
    for begin in range(0, len(found), accumulation):
        mine, theirs = (sorted(chain(*them[begin : begin + accumulation])) for them in (found, plain))
        assert mine == theirs


def test_micro_batches_are_alike() -> None:
    sizes = _sizes(4000)
    together = [[sizes[part].sum() for part in step] for step in _epoch(sizes, 4, 1, accumulation=8)]
    alone = [[sizes[part].sum() for part in step] for step in _epoch(sizes, 4, 1)]

    def heaviest_over_mean(loads: list) -> float:
        of_steps = np.array(loads[: len(loads) // 8 * 8], float).reshape(-1, 8)
        return float((of_steps.max(1) / of_steps.mean(1)).mean())

    assert heaviest_over_mean(together) < 1.1
    assert heaviest_over_mean(alone) > 1.4
    sampler = BalancedBatchSampler(sizes, 4, 1, seed=7, accumulation=8)
    assert sizes[sampler.largest(sizes, 100)].sum() == max(map(max, together[:100]))


def test_deal_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        bins = int(rng.integers(1, 7))
        sizes = rng.integers(0, 5, int(rng.integers(bins, 30)))
        loads, parts = [0] * bins, [[] for _ in range(bins)]
        for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
            lightest = min(range(bins), key=lambda bin: (loads[bin], len(parts[bin])))
            parts[lightest].append(item)
            loads[lightest] += sizes[item]
        assert [part.tolist() for part in deal(sizes, bins)] == parts
        assert all(parts), "no bin stays empty, not even when sizes are zero"


def test_balance() -> None:
    sizes = _sizes(4000)
    balanced = BalancedBatchSampler(sizes, 4, 8)
    assert balanced.imbalance() < 1.1
    # What the same structures cost when dealt by number alone.
    by_number = [
        [sizes[part].sum() for part in np.split(np.random.default_rng(step).permutation(4000)[:32], 8)]
        for step in range(100)
    ]
    assert np.mean([max(loads) / np.mean(loads) for loads in by_number]) > 1.5
    loads = [[sizes[part].sum() for part in step] for step in _epoch(sizes, 4, 8)]
    expected = np.mean([max(row) / np.mean(row) for row in loads])
    assert BalancedBatchSampler(sizes, 4, 8, seed=7).imbalance() == pytest.approx(expected)


def test_equal_sizes_give_equal_counts() -> None:
    assert {len(part) for step in _epoch(np.ones(64), 4, 4) for part in step} == {4}
    assert {len(part) for step in _epoch(np.zeros(64), 4, 4) for part in step} == {4}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones(3), 2, 4), "3 structures are too few to train on 4 replicas; at least 4"),
        ((np.ones(3), 0), "batch_size is 0"),
        ((np.ones(3), 1, 2, 2), "rank is 2; with 2 replicas it must be 0..1"),
        ((np.array([1, -1]), 1), "non-negative"),
        ((np.array([1, np.nan]), 1), "non-negative"),
    ],
)
def test_mistakes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(*arguments)


def test_position_out_of_range() -> None:
    with pytest.raises(ValueError, match="no batch 6 in epoch 0; an epoch has 5 batches"):
        BalancedBatchSampler(np.ones(10), 2).set_position(0, 6)
