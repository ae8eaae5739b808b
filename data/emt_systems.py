"""Which systems an EMT data set consists of: slab, adsorbate, site and split of each, decided before anything is built.

- Metals are those that EMT was fitted for; alloys are random solid solutions A3B, AB and AB3.
- What is held out is a *chemical system* (the set of metals in a slab) or an adsorbate, chosen by the seed.
  Everything held out is made of elements that also occur in training, so a model has an embedding for them.
- Every system draws from a generator seeded by (seed, sid): the data do not depend on who computes what.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from ase import Atoms

SPLITS = ("train", "val_id", "val_ood_ads", "val_ood_cat", "val_ood_both")
METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt")
FACETS = ("fcc111", "fcc100", "fcc110", "fcc211")
SITES = ("top", "bridge", "hollow", "random")
#: Atoms along the two lattice vectors of the surface, and layers. 36 to 100 atoms.
SIZES = ((3, 3, 4), (3, 3, 5), (3, 4, 4), (4, 4, 3), (4, 4, 4), (6, 3, 4), (5, 5, 4))
#: Adsorbates whose EMT geometry stays a molecule, and what `ase.build.molecule` calls them. EMT has no directional
#: bonds: it keeps distances near those of the real molecule, not every angle.
ADSORBATES = {
    **{name: name for name in ("H", "C", "N", "O", "CH", "NH", "OH", "CO", "CN", "NO", "N2", "O2", "H2")},
    **{name: name for name in ("NH2", "H2O", "HCO", "CH3", "NH3", "HCN", "CCH", "C2H2", "CO2", "N2O")},
    "CH2": "CH2_s3B1d",
    "CH2O": "H2CO",
}
MIN_STRUCTURES = 20
_TRAIN_FRACTION = 0.7
_HELD_OUT_FRACTION = 0.2
_MIXTURES = ((3, 1), (1, 1), (1, 3))  # A3B, AB, AB3

Item = TypeVar("Item")


@dataclass(frozen=True)
class EmtOptions:
    """What decides the content of an EMT data set."""

    structures: int = 200  #: relaxations over all splits together
    seed: int = 0
    metals: tuple[str, ...] = METALS
    size: tuple[int, int, int] | None = None  #: atoms, atoms, layers; None mixes SIZES
    adsorbates: tuple[str, ...] = tuple(sorted(ADSORBATES))
    max_steps: int = 60  #: optimizer steps; a relaxation has at most one frame more
    fmax: float = 0.05  #: eV/A; a relaxation ends when no free atom feels more
    rattle: float = 0.0  #: A, standard deviation of random displacements of the free atoms before the relaxation

    def __post_init__(self) -> None:
        if self.structures < MIN_STRUCTURES:
            raise ValueError(f"{self.structures} structures cannot fill five splits; ask for at least {MIN_STRUCTURES}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        _check_names("metal", self.metals, METALS)
        _check_names("adsorbate", self.adsorbates, ADSORBATES)
        if self.size is not None:
            along, across, layers = self.size
            if min(self.size) < 2 or layers < 3 or along * across * layers > 1000:
                raise ValueError(
                    f"size {along}x{across}x{layers}: a slab needs at least 2x2 atoms in 3 layers, and at most 1000"
                )
        if self.max_steps < 1 or not self.fmax > 0:
            raise ValueError(f"max_steps is {self.max_steps} and fmax {self.fmax}; both must be positive")
        if not 0 <= self.rattle <= 0.5:
            raise ValueError(f"rattle is {self.rattle} A; it must be from 0 to 0.5")


@dataclass(frozen=True)
class System:
    """One relaxation to run."""

    sid: int
    split: str
    metals: tuple[tuple[str, int], ...]  #: (symbol, parts), as in A3B
    facet: str
    size: tuple[int, int, int]
    adsorbate: str
    site: str

    @property
    def formula(self) -> str:
        return "".join(symbol if parts == 1 else f"{symbol}{parts}" for symbol, parts in self.metals)

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        return f"system {self.sid} ({self.adsorbate} {self.site} on {self.formula} {self.facet} {size})"


@dataclass(frozen=True)
class Plan:
    """All systems, by sid, and what training never sees."""

    systems: tuple[System, ...]
    held_out_metals: tuple[str, ...]  #: chemical systems such as Cu-Pt
    held_out_adsorbates: tuple[str, ...]


def plan_systems(options: EmtOptions) -> Plan:
    """Enumerate the systems of a data set."""
    rng = np.random.default_rng([options.seed, 0])
    pairs = itertools.combinations(options.metals, 2)
    mixtures = [(metal,) for metal in options.metals] + list(pairs)
    seen_metals, held_metals = _hold_out(mixtures, set, rng)
    seen_adsorbates, held_adsorbates = _hold_out(list(options.adsorbates), elements_of, rng)
    groups = [
        (("train", "val_id"), seen_metals, seen_adsorbates),  # one distribution, different systems
        (("val_ood_ads",), seen_metals, held_adsorbates),
        (("val_ood_cat",), held_metals, seen_adsorbates),
        (("val_ood_both",), held_metals, held_adsorbates),
    ]
    # A single metal, say, leaves none to hold out; the splits that would need one are left out.
    groups = [group for group in groups if group[1] and group[2]]
    counts = _counts([split for splits, _, _ in groups for split in splits], options.structures)
    systems: list[System] = []
    for splits, some_metals, some_adsorbates in groups:
        order = [split for split in splits for _ in range(counts[split])]
        metals = _deal(some_metals, len(order), set, rng)
        adsorbates = _deal(some_adsorbates, len(order), elements_of, rng)
        for split, mixture, adsorbate in zip(order, metals, adsorbates, strict=True):
            systems.append(_system(len(systems), split, mixture, adsorbate, options))
    return Plan(
        tuple(systems),
        tuple(sorted("-".join(sorted(mixture)) for mixture in held_metals)),
        tuple(sorted(held_adsorbates)),
    )


def generator(seed: int, sid: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers of one system; stream 0 of a seed belongs to the plan."""
    return np.random.default_rng([seed, 1, sid, attempt])


def elements_of(adsorbate: str) -> set[str]:
    return set(Atoms(adsorbate).symbols)


def _counts(splits: Sequence[str], structures: int) -> dict[str, int]:
    """Systems in each split: most for training, the rest shared evenly."""
    train = round(_TRAIN_FRACTION * structures)
    each, more = divmod(structures - train, len(splits) - 1)
    return {split: train if split == "train" else each + (i <= more) for i, split in enumerate(splits)}


def _system(sid: int, split: str, mixture: Sequence[str], adsorbate: str, options: EmtOptions) -> System:
    rng = generator(options.seed, sid)
    parts = _MIXTURES[rng.integers(len(_MIXTURES))] if len(mixture) == 2 else (1,)
    size = options.size or SIZES[rng.integers(len(SIZES))]
    # A step of fcc211 is three atoms long.
    facets = FACETS if size[0] % 3 == 0 else FACETS[:-1]
    return System(
        sid=sid,
        split=split,
        metals=tuple(zip(mixture, parts, strict=True)),
        facet=facets[rng.integers(len(facets))],
        size=size,
        adsorbate=adsorbate,
        site=SITES[rng.integers(len(SITES))],
    )


def _hold_out(
    items: list[Item], elements: Callable[[Item], set[str]], rng: np.random.Generator
) -> tuple[list[Item], list[Item]]:
    """Split items into (seen, held out), about a fifth held out, so that the seen ones contain every element."""
    wanted = max(1, round(_HELD_OUT_FRACTION * len(items)))
    seen, held = list(items), list[Item]()
    for i in rng.permutation(len(items)):
        rest = [item for item in seen if item != items[i]]
        if len(held) < wanted and set().union(*map(elements, rest)) >= elements(items[i]):
            seen, held = rest, [*held, items[i]]
    return seen, held


def _deal(items: list[Item], count: int, elements: Callable[[Item], set[str]], rng: np.random.Generator) -> list[Item]:
    """`count` items in random order, each as often as any other; the first few contain every element between them."""
    dealt: list[Item] = []
    while len(dealt) < count:
        deck = [items[i] for i in rng.permutation(len(items))]
        if not dealt:
            first: list[Item] = []
            for item in deck:
                if not elements(item) <= set().union(*map(elements, first)):
                    first.append(item)
            deck = first + [item for item in deck if item not in first]
        dealt += deck
    return dealt[:count]


def _check_names(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    if not names:
        raise ValueError(f"no {what} given; choose from {', '.join(known)}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; choose from {', '.join(known)}")
    if len(set(names)) != len(names):
        raise ValueError(f"a {what} is named twice in {','.join(names)}")
