"""Numbers of the public OC20 implementations (FAIR-Chem 1.9): weights, structures, outputs and gradients, in fp64."""

from __future__ import annotations

import numpy as np
import oc20_files
import torch
from torch import Tensor, nn

from egnscale.data.batch import build_graph
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import Prediction
from egnscale.models.oc20_names import to_our_names


class PublicReference:
    """What the file of one architecture holds, and the graph built from its structures."""

    def __init__(self, architecture: str, spec: GraphSpec) -> None:
        self.config, _, arrays = oc20_files.reference(architecture)
        self.arrays = {name: torch.as_tensor(x) for name, x in arrays.items() if x.dtype.kind in "fi"}
        self.graph = build_graph(structures(arrays), spec, torch.float64)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Parameters or their gradients, under our names."""
        return to_our_names({k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)})

    def relative_errors(self, model: nn.Module, prediction: Prediction) -> dict[str, float]:
        """|ours - theirs| / |theirs| of energies, forces and the gradient of every parameter."""
        arrays = self.arrays
        loss = (arrays["we"] * prediction.energy).sum() + (arrays["wf"] * prediction.forces).sum()
        names, parameters = zip(*model.named_parameters(), strict=True)
        ours = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        theirs = self.under("grad64/")
        assert set(ours) == set(theirs)
        ours |= {"energy": prediction.energy.detach(), "forces": prediction.forces.detach()}
        theirs |= {"energy": arrays["energy64"], "forces": arrays["forces64"]}
        return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}


def structures(arrays: dict[str, np.ndarray]) -> list[Sample]:
    """The structures of a file's arrays."""
    made = []
    for system, cell in enumerate(arrays["cell"]):
        atoms = arrays["batch"] == system
        none = np.zeros(atoms.sum(), dtype=np.int64)
        numbers, positions = arrays["atomic_numbers"][atoms], arrays["positions"][atoms]
        made.append(Sample(numbers, positions, cell, np.ones(3, dtype=bool), none, none.astype(bool)))
    return made
