"""IS2RE and IS2RS metrics against plain loops over structures, atoms and thresholds; distances against a search."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111

from egnscale.launch.relaxation_metrics import (
    DISTANCE_THRESHOLDS,
    FORCE_THRESHOLDS,
    IS2REMetrics,
    IS2RSMetrics,
    distance_score,
    force_score,
    largest_force,
    mean_distance,
    nearest_image,
)

CUBE = 10.0 * np.eye(3)
SLAB = np.array([[8.0, 0.0, 0.0], [4.0, 6.9, 0.0], [0.0, 0.0, 30.0]])
ALL = np.ones(3, dtype=bool)


def by_search(vector: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> float:
    """The shortest image, of all within two cells."""
    ranges = [range(-2, 3) if periodic else (0,) for periodic in pbc]
    return min(float(np.linalg.norm(vector + np.array(image) @ cell)) for image in itertools.product(*ranges))


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("cell", [CUBE, SLAB], ids=["cube", "slab"])
def test_small_moves_across_any_boundary(cell: np.ndarray, pbc: tuple[bool, bool, bool]) -> None:
    """A move much shorter than the cell is found whatever images the two positions are written in."""
    rng = np.random.default_rng(0)
    periodic = np.array(pbc)
    move = rng.uniform(-0.4, 0.4, size=(40, 3))
    images = rng.integers(-2, 3, size=(40, 3)) * periodic
    folded = nearest_image(move + images @ cell, cell, periodic)
    assert np.allclose(folded, move, atol=1e-12)
    for vector, distance in zip(move, np.linalg.norm(folded, axis=1), strict=True):
        assert distance == pytest.approx(by_search(vector, cell, periodic), abs=1e-12)


def test_agrees_with_ase_in_a_slab() -> None:
    slab = fcc111("Cu", (3, 3, 4), vacuum=10.0)
    slab.pbc = True
    other = slab.copy()
    other.rattle(0.2, seed=1)
    other.wrap()
    other.positions += slab.cell[0] - 2 * slab.cell[1]
    expected = [
        Atoms("Cu2", [a, b], cell=slab.cell, pbc=True).get_distance(0, 1, mic=True)
        for a, b in zip(slab.positions, other.positions, strict=True)
    ]
    free = slab.positions[:, 2] > 12.0
    found = mean_distance(other.positions, slab.positions, slab.cell.array, ALL, free)
    assert found == pytest.approx(np.mean(np.array(expected)[free]), abs=1e-10)


def test_half_a_cell_and_tiny_negatives() -> None:
    assert nearest_image(np.array([[5.0, 5.1, -1e-18]]), CUBE, ALL) == pytest.approx(np.array([[5.0, -4.9, 0.0]]))


def test_axes_that_are_not_periodic() -> None:
    """They are not folded, and may have no cell vector."""
    flat = np.array([[8.0, 0.0, 0.0], [4.0, 6.9, 0.0], [0.0, 0.0, 0.0]])
    pbc = np.array([True, True, False])
    vector = np.array([[0.1, 0.2, 25.0]])
    for cell in (flat, SLAB):
        assert np.allclose(nearest_image(vector + SLAB[1] - SLAB[0], cell, pbc), vector)
    assert np.array_equal(nearest_image(vector, np.zeros((3, 3)), ~ALL), vector)


def test_thresholds() -> None:
    assert len(DISTANCE_THRESHOLDS) == 490
    assert len(FORCE_THRESHOLDS) == 390
    assert (DISTANCE_THRESHOLDS[0], FORCE_THRESHOLDS[0]) == (0.01, 0.01)
    assert DISTANCE_THRESHOLDS[-1] == pytest.approx(0.499)
    assert FORCE_THRESHOLDS[-1] == pytest.approx(0.399)
    assert distance_score(0.0) == force_score(0.0) == 1.0
    assert distance_score(0.5) == force_score(0.4) == distance_score(math.nan) == 0.0
    assert distance_score(0.01) == pytest.approx(489 / 490)  # strictly below


def structures(seed: int, count: int = 12) -> list[dict]:
    """Errors from 0.005 A to more than the largest threshold, written in random images; some atoms fixed."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        atoms = int(rng.integers(1, 7))
        cell = SLAB + rng.normal(scale=0.3, size=(3, 3))
        target = rng.uniform(size=(atoms, 3)) @ cell
        scale = 10 ** rng.uniform(-2.3, -0.3)
        made.append(
            {
                "predicted": target + rng.normal(scale=scale, size=(atoms, 3)) + rng.integers(-1, 2, (atoms, 3)) @ cell,
                "target": target,
                "initial": target + rng.normal(scale=0.2, size=(atoms, 3)),
                "cell": cell,
                "pbc": np.array([True, True, number % 3 == 0]),
                "free": rng.random(atoms) < 0.7 if number else np.zeros(atoms, dtype=bool),
                "steps": int(rng.integers(1, 200)),
                "converged": bool(rng.random() < 0.5),
                "forces": None if number == 3 else rng.normal(scale=10 ** rng.uniform(-2.5, 0), size=(atoms, 3)),
            }
        )
        for key in ("predicted",):
            # Images along axes that are not periodic are other places.
            if not made[-1]["pbc"][2]:
                shift = np.linalg.solve(cell.T, (made[-1][key] - target).T).T[:, 2:].round() * cell[2]
                made[-1][key] = made[-1][key] - shift
    return made


def by_loops(made: list[dict]) -> dict[str, float]:
    """The definitions, one threshold, structure and atom at a time."""
    below_distance, below_force, fbt, errors = [], [], [], []
    for one in made:
        distances = [
            by_search(p - t, one["cell"], one["pbc"])
            for p, t, free in zip(one["predicted"], one["target"], one["free"], strict=True)
            if free
        ]
        mean = sum(distances) / len(distances) if distances else 0.0
        below_distance += [mean < 0.01 + 0.001 * k for k in range(490)]
        errors += [
            abs(x) for row, free in zip(one["predicted"] - one["target"], one["free"], strict=True) if free for x in row
        ]
        if one["forces"] is None:
            below_force += [False] * 390
            fbt.append(False)
            continue
        norms = [math.hypot(*force) for force, free in zip(one["forces"], one["free"], strict=True) if free]
        below_force += [max(norms, default=0.0) < 0.01 + 0.001 * k for k in range(390)]
        fbt.append(max(norms, default=0.0) < 0.05)

    def average(values: list) -> float:
        return sum(values) / len(values)

    return {
        "adwt": average(below_distance),
        "afbt": average(below_force),
        "fbt": average(fbt),
        "positions_mae": average(errors),
        "positions_mse": average([error**2 for error in errors]),
        "steps": average([one["steps"] for one in made]),
        "converged": sum(one["converged"] for one in made),
        "structures": len(made),
        "forces_missing": sum(one["forces"] is None for one in made),
    }


def metrics_of(made: list[dict]) -> IS2RSMetrics:
    metrics = IS2RSMetrics()
    for one in made:
        metrics.update(**{name: value for name, value in one.items() if name != "forces"})
        metrics.update_forces(one["forces"], one["free"])
    return metrics


def test_is2rs_definitions() -> None:
    made = structures(0) + structures(1)
    expected = by_loops(made)
    assert 0 < expected["fbt"] < 1, "the case must have structures on both sides"
    assert 0 < expected["adwt"] < 1
    found = metrics_of(made).compute()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    untouched = [one | {"predicted": one["initial"]} for one in made]
    expected = by_loops(untouched)
    for name in ("adwt", "positions_mae", "positions_mse"):
        assert found[f"{name}_initial"] == pytest.approx(expected[name], rel=1e-10)
    assert math.isnan(found["fbt_initial"])


def test_is2rs_without_a_relaxed_structure() -> None:
    """It counts for everything but the distances."""
    made = structures(3)
    metrics, known = metrics_of(made), metrics_of(made).compute()
    one = {name: value for name, value in made[5].items() if name != "forces"}
    metrics.update(**(one | {"target": None, "steps": 7, "converged": True}))
    found = metrics.compute()
    for name in ("adwt", "adwt_initial", "positions_mae", "positions_mse_initial", "fbt", "afbt"):
        assert found[name] == known[name]
    assert (found["structures"], found["converged"]) == (known["structures"] + 1, known["converged"] + 1)
    assert found["steps"] == pytest.approx((known["steps"] * known["structures"] + 7) / found["structures"])


def test_is2rs_replicas_add_up() -> None:
    made = structures(2)
    whole = metrics_of(made)
    together = metrics_of([])
    together.load_tensor(metrics_of(made[:5]).tensor() + metrics_of(made[5:]).tensor() + metrics_of([]).tensor())
    assert together.compute() == pytest.approx(whole.compute(), rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match="accumulators"):
        together.load_tensor(torch.zeros(3))


def test_no_free_atoms_and_nothing_at_all() -> None:
    none = np.zeros(2, dtype=bool)
    there, elsewhere = np.zeros((2, 3)), np.full((2, 3), 3.0)
    metrics = IS2RSMetrics()
    metrics.update(elsewhere, there, there, CUBE, ALL, none, steps=0, converged=True)
    metrics.update_forces(np.full((2, 3), np.nan), none)
    found = metrics.compute()
    assert (found["adwt"], found["fbt"], found["afbt"]) == (1.0, 1.0, 1.0)
    assert math.isnan(found["positions_mae"])
    assert largest_force(np.full((2, 3), 9.0), none) == 0.0
    assert all(math.isnan(value) or value == 0 for value in IS2RSMetrics().compute().values())
    assert all(math.isnan(value) or value == 0 for value in IS2REMetrics(0.0).compute().values())


def test_forces_that_are_not_finite_count_as_missing() -> None:
    metrics = IS2RSMetrics()
    metrics.update_forces(np.full((1, 3), np.nan), np.ones(1, dtype=bool))
    metrics.update_forces(np.zeros((1, 3)), np.ones(1, dtype=bool))
    found = metrics.compute()
    assert (found["fbt"], found["afbt"], found["forces_missing"]) == (0.5, 0.5, 1.0)


def test_is2re_definitions() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=30)
    predicted = target + rng.normal(scale=0.03, size=30)
    metrics = IS2REMetrics(energy_mean=0.2)
    for p, t in zip(predicted, target, strict=True):
        metrics.update(float(p), float(t))
    errors = [abs(p - t) for p, t in zip(predicted, target, strict=True)]
    found = metrics.compute()
    assert found == pytest.approx(
        {
            "energy_mae": sum(errors) / 30,
            "energy_mse": sum(error**2 for error in errors) / 30,
            "energy_within_threshold": sum(error < 0.02 for error in errors) / 30,
            "energy_mae_mean": sum(abs(t - 0.2) for t in target) / 30,
            "structures": 30,
            "failed": 0,
        }
    )
    assert 0 < found["energy_within_threshold"] < 1
    # A structure that could not be relaxed has no error, and is not within.
    metrics.update(None, 0.0)
    metrics.update(math.nan, 0.0)
    again = metrics.compute()
    assert again["energy_mae"] == pytest.approx(found["energy_mae"])
    assert again["energy_within_threshold"] == pytest.approx(found["energy_within_threshold"] * 30 / 32)
    assert again["failed"] == 2
    # Strictly below.
    exact = IS2REMetrics(0.0)
    exact.update(0.02, 0.0)
    assert exact.compute()["energy_within_threshold"] == 0.0
