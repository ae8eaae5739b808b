"""Predictions in the files that OC20's leaderboard takes, one for each task.

    s2ef   ids (S,) "sid_fid"; energy (S,) eV; forces (all free atoms, 3) eV/A; chunk_idx (S - 1,)
    is2re  ids (S,) "sid"; energy (S,) eV
    is2rs  ids (S,) "sid"; pos (all atoms, 3) A; chunk_idx (S - 1,)

`chunk_idx` is where one structure's rows end and the next one's begin, `np.split(pos, chunk_idx)`: the cumulative
counts without the last. A file of one split has these names; a submission joins OC20's four splits in one file, each
name behind its split's: id_ids, id_energy, ood_ads_ids, ...
Source: the public OC20 repository (predictions of its trainers, and its script that joins four splits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from egnscale.data.files import replacing

Arrays = dict[str, np.ndarray]


def s2ef_predictions(
    ids: Sequence[tuple[int, int]],
    energies: Sequence[float],
    forces: Sequence[np.ndarray],
    *,
    full_precision: bool = False,
) -> Arrays:
    """Arrays of an s2ef file.

    Args:
        ids: (sid, fid) of each structure
        energies: eV
        forces: (free atoms, 3) eV/A of each structure
        full_precision: forces in float32; else, as OC20's own code does, in float16, which rounds by 0.05 percent
    """
    return {
        "ids": _ids([f"{sid}_{fid}" for sid, fid in ids]),
        "energy": np.asarray(energies, dtype=np.float64),
        "forces": _rows(forces, "float32" if full_precision else "float16"),
        "chunk_idx": _chunks(forces),
    }


def is2re_predictions(sids: Sequence[int], energies: Sequence[float]) -> Arrays:
    """Arrays of an is2re file: relaxed energies in eV."""
    return {"ids": _ids([str(sid) for sid in sids]), "energy": np.asarray(energies, dtype=np.float64)}


def is2rs_predictions(sids: Sequence[int], positions: Sequence[np.ndarray]) -> Arrays:
    """Arrays of an is2rs file: relaxed positions (N, 3) of all atoms, A."""
    return {
        "ids": _ids([str(sid) for sid in sids]),
        "pos": _rows(positions, "float64"),
        "chunk_idx": _chunks(positions),
    }


def write_predictions(path: Path, splits: Mapping[str, Arrays]) -> None:
    """Write a file, whole or not at all. Several splits are joined under their names, without `val_` or `test_`.

    Raises:
        ValueError: if the name does not end in .npz.
    """
    check_name(path)
    if len(splits) == 1:
        arrays = next(iter(splits.values()))
    else:
        arrays = {
            f"{split_name(split)}_{name}": array for split, part in splits.items() for name, array in part.items()
        }
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def check_name(path: Path) -> None:
    """Raises ValueError if a file of this name would not be found by those who read such files."""
    if path.suffix != ".npz":
        raise ValueError(f"predictions are written as .npz, so {path} must end in .npz")


def split_name(split: str) -> str:
    """What OC20 calls a split: val_ood_ads -> ood_ads."""
    return split.removeprefix("val_").removeprefix("test_")


def _ids(names: list[str]) -> np.ndarray:
    return np.array(names, dtype=str)


def _rows(parts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.concatenate([np.zeros((0, 3)), *parts]).astype(dtype)


def _chunks(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum([len(part) for part in parts], dtype=np.int64)[:-1]
