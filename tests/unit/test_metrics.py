"""S2EF metrics and loss, against loops over structures and atoms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from egnscale.launch.metrics import S2EFMetrics, s2ef_loss
from egnscale.models.graph import segment_sum

MEAN = 0.3


def _batch(seed: int, counts: list[int], error: float = 0.02) -> dict[str, Tensor]:
    """Structures with the given numbers of atoms; errors straddle both thresholds, some atoms are fixed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    V = sum(counts)
    energy, forces = normal(len(counts)), normal(V, 3)
    return {
        "prediction_energy": energy + error * normal(len(counts)),
        "prediction_forces": forces + error * normal(V, 3),
        "target_energy": energy,
        "target_forces": forces,
        "system": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)),
        "free": torch.rand(V, generator=generator) < 0.6,
    }


def _by_loops(batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """The definitions, one structure and one atom at a time."""
    energy, mean, within, axes, cos, magnitude, zero = [], [], [], [], [], [], []
    for batch in batches:
        for b in range(len(batch["target_energy"])):
            energy.append(abs(float(batch["prediction_energy"][b] - batch["target_energy"][b])))
            mean.append(abs(float(batch["target_energy"][b]) - MEAN))
            worst = 0.0
            for v in range(len(batch["system"])):
                if batch["system"][v] != b or not batch["free"][v]:
                    continue
                f, g = batch["prediction_forces"][v].tolist(), batch["target_forces"][v].tolist()
                error = [abs(x - y) for x, y in zip(f, g, strict=True)]
                worst = max(worst, *error)
                axes.append(error)
                zero.append(sum(abs(y) for y in g))
                cos.append(sum(x * y for x, y in zip(f, g, strict=True)) / (math.hypot(*f) * math.hypot(*g)))
                magnitude.append(abs(math.hypot(*f) - math.hypot(*g)))
            within.append(energy[-1] < 0.02 and worst < 0.03)

    def average(values: list) -> float:
        return sum(values) / len(values)

    return {
        "energy_mae": average(energy),
        "forces_mae": average([sum(error) / 3 for error in axes]),
        **{f"forces{axis}_mae": average([error[i] for error in axes]) for i, axis in enumerate("xyz")},
        "forces_cos": average(cos),
        "forces_magnitude_error": average(magnitude),
        "energy_forces_within_threshold": average(within),
        "energy_mae_mean": average(mean),
        "forces_mae_zero": average(zero) / 3,
    }


def _metrics(batches: list[dict[str, Tensor]]) -> S2EFMetrics:
    metrics = S2EFMetrics(MEAN)
    for batch in batches:
        system = batch["system"]
        number = len(batch["target_energy"])
        values = {name: value for name, value in batch.items() if name != "system"}
        metrics.update(**values, total=lambda x, system=system, number=number: segment_sum(x, system, number))
    return metrics


def test_definitions() -> None:
    batches = [_batch(0, [3, 1, 4, 1, 5, 9]), _batch(1, [2, 6, 1], error=0.01), _batch(2, [1] * 40)]
    expected = _by_loops(batches)
    assert 0 < expected["energy_forces_within_threshold"] < 1, "the case must have structures on both sides"
    assert _metrics(batches).compute() == pytest.approx(expected, rel=1e-12)


def test_replicas_add_up() -> None:
    batches = [_batch(seed, [4, 2, 7]) for seed in range(4)]
    total = S2EFMetrics(MEAN)
    total.load_tensor(_metrics(batches[:1]).tensor() + _metrics(batches[1:]).tensor() + _metrics([]).tensor())
    assert total.compute() == pytest.approx(_metrics(batches).compute(), rel=1e-12)
    with pytest.raises(ValueError, match="11 accumulators"):
        total.load_tensor(torch.zeros(3))


def test_fixed_atoms_do_not_matter_even_when_not_a_number() -> None:
    batch = _batch(3, [5, 8])
    expected = _metrics([batch]).compute()
    forces = batch["prediction_forces"].clone()
    forces[~batch["free"]] = float("nan")
    assert _metrics([{**batch, "prediction_forces": forces}]).compute() == expected


def test_structure_without_free_atoms_is_judged_by_its_energy() -> None:
    batch = _batch(4, [2, 2, 0], error=0.0)
    batch["free"] = torch.tensor([True, True, False, False])
    batch["prediction_energy"] = batch["target_energy"] + torch.tensor([0.0, 0.0, 0.1])
    batch["prediction_forces"] = batch["target_forces"] + 10 * ~batch["free"][:, None]
    computed = _metrics([batch]).compute()
    assert computed["energy_forces_within_threshold"] == pytest.approx(2 / 3)
    assert computed["forces_mae"] == 0


@pytest.mark.parametrize("error, within", [(0.0299, 1.0), (0.03, 0.0), (-0.0301, 0.0), (float("nan"), 0.0)])
def test_one_component_decides(error: float, within: float) -> None:
    batch = _batch(5, [6], error=0.0)
    batch["free"][:] = True
    batch["target_forces"][4, 1] = 0.0
    batch["prediction_forces"][4, 1] = error
    assert _metrics([batch]).compute()["energy_forces_within_threshold"] == within


def test_nothing_added() -> None:
    assert all(math.isnan(value) for value in _metrics([]).compute().values())
    assert all(math.isnan(value) for value in _metrics([_batch(0, [])]).compute().values())


def _loss(batch: dict[str, Tensor], energy_count: float | Tensor, force_count: float | Tensor) -> Tensor:
    return s2ef_loss(
        *(batch[name] for name in ("prediction_energy", "prediction_forces", "target_energy", "target_forces", "free")),
        energy_coefficient=2.0,
        force_coefficient=30.0,
        energy_count=energy_count,
        force_count=force_count,
    )


def test_loss_by_loops() -> None:
    batch = _batch(6, [3, 4], error=1.0)
    energy = sum(abs(float(e)) for e in batch["prediction_energy"] - batch["target_energy"]) / 2
    difference = batch["prediction_forces"] - batch["target_forces"]
    norms = [math.hypot(*row.tolist()) for row, free in zip(difference, batch["free"], strict=True) if free]
    expected = 2.0 * energy + 30.0 * sum(norms) / len(norms)
    assert float(_loss(batch, 2, len(norms))) == pytest.approx(expected, rel=1e-12)
    assert float(_loss(batch, torch.tensor(2), torch.tensor(len(norms)))) == pytest.approx(expected, rel=1e-12)


def test_replicas_average_to_the_whole() -> None:
    """The gradient convention: with counts of (global / replicas), the mean of the replicas' losses is the loss."""
    parts = [_batch(7, [3, 4, 2], error=1.0), _batch(8, [6], error=1.0)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    free = int(whole["free"].sum())
    mean = sum(float(_loss(part, 4 / 2, free / 2)) for part in parts) / 2
    assert mean == pytest.approx(float(_loss(whole, 4, free)), rel=1e-12)


def test_gradient_is_zero_where_there_is_no_error_and_where_atoms_are_fixed() -> None:
    batch = _batch(9, [4], error=0.0)
    batch["free"] = torch.tensor([True, True, False, False])
    batch["prediction_forces"][1] += 1.0
    batch["prediction_forces"][2] += 1.0
    batch["target_forces"][3] = float("nan")
    for name in ("prediction_energy", "prediction_forces"):
        batch[name].requires_grad_()
    _loss(batch, 1, 2).backward()
    assert batch["prediction_energy"].grad.tolist() == [0.0]
    gradient = batch["prediction_forces"].grad
    assert gradient[[0, 2, 3]].abs().max() == 0
    assert gradient[1].norm() == pytest.approx(30.0 / 2)


@pytest.mark.parametrize("count", [0, torch.tensor(0.0)])
def test_no_atoms(count: float | Tensor) -> None:
    batch = _batch(10, [])
    batch["prediction_forces"].requires_grad_()
    loss = _loss(batch, count, count)
    loss.backward()
    assert loss.item() == 0
