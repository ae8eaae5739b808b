"""Imported OC20 checkpoints against numbers of the public code (FAIR-Chem 1.9): what is left of a difference.

The reference in `tests/reference` holds two slabs, small random weights, and energies and forces of the public code in
fp64 and fp32. Its weights are written as a public checkpoint, imported, and used.

    python benchmarks/oc20_reference.py --out benchmarks/results/DATE-oc20-reference-cpu
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import environment, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oc20_files import FILES, checkpoint, reference
from public_reference import structures

from egnscale.data.batch import build_graph
from egnscale.launch.loading import graph_spec
from egnscale.launch.oc20_import import import_oc20
from egnscale.launch.run_files import load_trained

TITLES = {"gemnet_t": "GemNet-T", "dimenetplusplus": "DimeNet++"}


def differences(architecture: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Of (energies, forces), relative to the public code's in fp64."""
    _, _, arrays = reference(architecture)
    torch.save(checkpoint(architecture, scale=None), folder / "public.pt")
    import_oc20(folder / "public.pt", folder / "imported")
    found = {"the public code, fp32": (arrays["energy32"], arrays["forces32"])}
    for name, dtype in (("imported, fp32", torch.float32), ("imported, fp64", torch.float64)):
        model = load_trained(folder / "imported").model.to(dtype)
        prediction = model(build_graph(structures(arrays), graph_spec(model.config), dtype))
        assert prediction.forces is not None
        found[name] = (prediction.energy.detach().numpy(), prediction.forces.detach().numpy())
    exact = (arrays["energy64"], arrays["forces64"])
    errors = {}
    for name, values in reversed(found.items()):
        energy, forces = (
            float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            for ours, theirs in zip(values, exact, strict=True)
        )
        errors[name] = (energy, forces)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"environment": environment("cpu"), "differences": {}}
    for architecture in FILES:
        with tempfile.TemporaryDirectory() as folder:
            results["differences"][architecture] = differences(architecture, Path(folder))
    note = "|difference| / |value| over two slabs, of energies and of forces, from the public code in fp64."
    kinds = results["differences"]["gemnet_t"]
    rows = [
        (name, *(", ".join(f"{error:.0e}" for error in found[name]) for found in results["differences"].values()))
        for name in kinds
    ]
    header = ("", *(f"{TITLES[name]} energy, forces" for name in results["differences"]))
    write(args.out, "Imported checkpoints against the public code", [note, table(header, rows)], results)


if __name__ == "__main__":
    main()
