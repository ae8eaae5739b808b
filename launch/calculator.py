"""An ASE calculator from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.launch.loading import graph_spec
from egnscale.launch.run_files import load_trained


class Calculator(AseCalculator):
    """Energy (eV) and forces (eV/A) of a trained model.

        atoms.calc = Calculator("runs/quickstart")
        atoms.get_potential_energy(), atoms.get_forces()

    The energy is the quantity that the model was trained on: for OC20-like data, the adsorption energy.

    Args:
        checkpoint: a checkpoint, or a run directory (its latest).
        device: "cpu", "cuda", ...; by default a GPU if there is one.
        dtype: precision of the computation; float64 makes relaxations smoother.

    Raises:
        ValueError: if there is no whole checkpoint; from `calculate`, if the structure makes no sense or holds an
            element that the model does not know.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        trained = load_trained(checkpoint)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = trained.model.to(self.device, dtype)
        self.normalizer = trained.normalizer
        self.collate = Collate(graph_spec(self.model.config), self.model.config.num_elements, dtype)

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties or ["energy"], system_changes)
        graph, _ = self.collate([Sample.from_atoms(self.atoms)])
        with torch.no_grad():
            prediction = self.normalizer.physical(self.model(graph.to(self.device)))
        self.results = {
            "energy": prediction.energy.item(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
