"""Reference forces at predicted structures, for FbT and AFbT.

Three sources: ASE's EMT, for the data of `egnscale data make`; nothing; or a calculation elsewhere, which takes
structures from a directory (`write_inputs`) and whose results come back as one file (`read_results`).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from egnscale.data.files import replacing
from egnscale.data.sample import Sample

#: Results must be of the structure that was asked for: no atom farther from where it was, in A.
SAME_STRUCTURE = 1e-3
INDEX = "index.csv"
STRUCTURES = "structures.extxyz"

#: A predicted structure to the reference's unconstrained forces (N, 3) in eV/A; None where there are none.
Reference = Callable[[Sample], np.ndarray | None]


def made_with_emt(metadata: Mapping[str, Any]) -> bool:
    """Whether a store says that its energies are ASE's EMT's."""
    return "emt" in str((metadata.get("provenance") or {}).get("calculator", "")).lower()


def emt_forces(sample: Sample) -> np.ndarray | None:
    """Those of ASE's EMT; None where it has no parameters for an element or the structure is beyond it."""
    from ase.calculators.emt import EMT

    atoms = _bare(sample)
    atoms.calc = EMT()
    try:
        return atoms.get_forces()
    except (NotImplementedError, ValueError, KeyError):
        return None


def write_inputs(directory: Path, samples: Sequence[Sample]) -> None:
    """Write structures for a calculation elsewhere, whose results are found by sid.

        DIRECTORY/structures.extxyz      all, with `sid` and fixed atoms (move_mask)
        DIRECTORY/index.csv              number, sid, atoms, formula, POSCAR
        DIRECTORY/poscar/SID/POSCAR      each, in VASP's format, atoms in the same order

    Raises:
        ValueError: as `check_sids`.
        OSError: if a file cannot be written.
    """
    import ase.io

    check_sids([sample.sid for sample in samples])
    everything, rows = [], []
    for number, sample in enumerate(samples):
        atoms = _bare(sample, constrained=True)
        atoms.info["sid"] = sample.sid
        everything.append(atoms)
        poscar = directory / "poscar" / str(sample.sid) / "POSCAR"
        with replacing(poscar) as temporary:
            # Not sorted by element: forces come back atom by atom.
            ase.io.write(temporary, atoms, format="vasp", direct=False)
        rows.append([number, sample.sid, sample.num_atoms, atoms.get_chemical_formula(), poscar.relative_to(directory)])
    with replacing(directory / STRUCTURES) as temporary:
        ase.io.write(temporary, everything, format="extxyz")
    with replacing(directory / INDEX) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "sid", "atoms", "formula", "poscar"])
        writer.writerows(rows)


def check_sids(sids: Sequence[int]) -> None:
    """Raises ValueError if two structures have the same sid."""
    twice = [sid for sid, count in Counter(sids).items() if count > 1]
    if twice:
        raise ValueError(
            f"two structures have sid {twice[0]}, by which their reference forces would be found; "
            "write those of one split at a time, or give each structure a sid of its own"
        )


def read_results(path: Path) -> Reference:
    """Forces from any file that ASE reads, structures found by `sid` in their info.

    Raises:
        ValueError: if it cannot be read, or a structure has no sid, no forces, or the sid of another; from the
            reference, if a result is not of the structure asked for.
    """
    results: dict[int, tuple[Atoms, np.ndarray]] = {}
    for number, atoms in enumerate(read_atoms(path)):
        sid = _integer(atoms.info.get("sid"))
        if sid is None:
            raise ValueError(f"{path}: structure {number} has no sid; keep the one that {STRUCTURES} has in its info")
        forces = getattr(atoms.calc, "results", {}).get("forces") if atoms.calc is not None else None
        if forces is None:
            raise ValueError(f"{path}: structure {number} (sid {sid}) has no forces")
        if sid in results:
            raise ValueError(f"{path}: structure {number} has sid {sid}, which an earlier one has too")
        results[sid] = (atoms, np.asarray(forces, dtype=np.float64))

    def reference(sample: Sample) -> np.ndarray | None:
        if sample.sid not in results:
            return None
        atoms, forces = results[sample.sid]
        if not np.array_equal(atoms.numbers, sample.atomic_numbers):
            raise ValueError(
                f"{path}: sid {sample.sid} has other atoms, or in another order, than the predicted structure"
            )
        # Calculators wrap atoms into the cell: images of a place are the same place.
        from egnscale.launch.relaxation_metrics import nearest_image

        apart = nearest_image(atoms.positions - sample.positions, sample.cell, sample.pbc)
        farthest = float(np.linalg.norm(apart, axis=1).max(initial=0.0))
        if not farthest <= SAME_STRUCTURE:
            raise ValueError(
                f"{path}: sid {sample.sid} is another structure, {farthest:.3g} A from the predicted one; "
                "calculate forces at the structures as they were written, without moving atoms"
            )
        return forces

    return reference


def read_atoms(path: Path) -> list[Atoms]:
    """All structures of a file that ASE reads.

    Raises:
        ValueError: if there is none, or it is no such file.
    """
    import ase.io

    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        found = ase.io.read(path, ":")
    except Exception as error:  # whatever a reader of some format raises when it meets another
        text = " ".join(str(error).split())[:200]
        # Of a type that it does not know, ASE says the name and nothing else.
        text = text if " " in text else f"{type(error).__name__}: {text}"
        raise ValueError(f"{path} cannot be read as structures: {text}") from error
    structures = found if isinstance(found, list) else [found]
    if not structures:
        raise ValueError(f"{path} holds no structures")
    return structures


def _integer(value: Any) -> int | None:
    """A file may hold numbers as text."""
    return int(str(value)) if str(value).lstrip("-").isdigit() else None


def _bare(sample: Sample, constrained: bool = False) -> Atoms:
    """Positions, cell and elements, without energies and forces."""
    from dataclasses import replace

    atoms = replace(sample, energy=None, forces=None).to_atoms()
    if not constrained:
        atoms.set_constraint()
    return atoms
