"""An ASE calculator from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes

from egnscale.data.batch import Collate
from egnscale.data.sample import Sample
from egnscale.launch.loading import PartCollate, graph_spec
from egnscale.launch.run_files import load_trained
from egnscale.scaling.layout import Mesh


class Calculator(AseCalculator):
    """Energy (eV) and forces (eV/A) of a trained model.

        atoms.calc = Calculator("runs/quickstart")
        atoms.get_potential_energy(), atoms.get_forces()

    The energy is the quantity that the model was trained on: for OC20-like data, the adsorption energy.

    Args:
        checkpoint: a checkpoint, or a run directory (its latest).
        device: "cpu", "cuda", ...; by default a GPU if there is one.
        dtype: precision of the computation; float64 makes relaxations smoother.
        mesh: spread each structure over the ranks of its graph group, or the model over stages
            (`Mesh.of_world(device, graph=P, pipe=S)`), for what does not fit one device. Every rank runs the same
            script with the same structures and has whole results.

    Raises:
        ValueError: if there is no whole checkpoint; from `calculate`, if the structure makes no sense or holds an
            element that the model does not know.
    """

    implemented_properties: list[str] = ["energy", "forces"]  # noqa: RUF012 (ASE's own declaration)

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        mesh: Mesh | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if mesh is not None and device is not None and torch.device(device) != mesh.device:
            raise ValueError(f"device is {device}, but this rank of the mesh is on {mesh.device}; leave device out")
        trained = load_trained(checkpoint, mesh)
        if trained.model.config.forces == "none":
            self.implemented_properties = ["energy"]
        self.mesh = mesh
        fallback = mesh.device if mesh else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device or fallback)
        self.model = trained.model.to(self.device, dtype)
        self.normalizer = trained.normalizer
        collate = Collate(graph_spec(self.model.config), self.model.config.num_elements, dtype)
        self.collate = PartCollate(collate, mesh.layout.graph, mesh.graph_rank) if mesh else PartCollate(collate)

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        super().calculate(atoms, properties or ["energy"], system_changes)
        graph, _ = self.collate([Sample.from_atoms(self.atoms)])
        graph = self.mesh.place(graph) if self.mesh else graph.to(self.device)
        with torch.no_grad():
            energy, forces = self.normalizer.physical(self.model(graph))
            self.results: dict[str, Any] = {"energy": energy.item()}
            if forces is not None:
                forces = self.mesh.collect(forces, graph) if self.mesh else forces
                self.results["forces"] = forces.double().cpu().numpy()
