"""L-BFGS for many structures at once, each as if it were alone.

Every structure has a history of its own: nothing that one does depends on which others are in the batch. (OC20's first
release took dot products over the whole batch, which coupled the structures in it.)

What is notable: the two-loop recursion is taken as two triangular solves, so that a step is a dozen batched operations
and not 2 x memory of them. With R_ij = s_i . y_j for i <= j (oldest pair first), D = diag(R) and g the gradient,

    first loop    R a = S g            second loop    R^T c = D a - Y z
                  z = (g - Y^T a) / alpha             z + S^T c  is the recursion's result

which is the recursion line by line: a_i and c_i = a_i - b_i are its numbers. R gains a column with each step.

B structures, W atoms in the largest of them, K pairs remembered; atoms that are held fixed do not take part and are not
given. Lengths A, forces eV/A, all float64.
Source: Nocedal, Math. Comp. 35, 773 (1980); step length and convergence as in ASE's LBFGS. Defaults: OC20 v0.1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class LBFGSOptions:
    """What decides the steps. ASE's own defaults are memory 100 and maxstep 0.2, the others the same."""

    memory: int = 50  #: steps that are remembered
    damping: float = 1.0  #: what a step is multiplied by, after it was limited
    alpha: float = 70.0  #: eV/A^2, curvature where nothing is known: the inverse Hessian starts as 1 / alpha
    maxstep: float = 0.04  #: A, how far an atom moves at most; the whole step of its structure is scaled down

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory is {self.memory}; it must be at least 1")
        for name in ("damping", "alpha", "maxstep"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive")


class LBFGS:
    """Positions and histories of a changing batch of structures.

    optimizer = LBFGS()
    optimizer.extend([positions, ...])           # structures enter
    optimizer.step(optimizer.pack(forces))       # all of them move
    optimizer.keep(torch.tensor([0, 2]))         # structures leave, and their histories with them
    """

    def __init__(self, options: LBFGSOptions | None = None, device: torch.device | str = "cpu") -> None:
        self.options = options or LBFGSOptions()
        self.positions = torch.zeros(0, 0, 3, dtype=torch.float64, device=device)  #: (B, W, 3) A; zeros in padding
        self.real = torch.zeros(0, 0, dtype=torch.bool, device=device)  #: (B, W), False in padding
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)  #: (B,), taken so far
        self._moved = torch.zeros(
            0, 0, 3, dtype=torch.float64, device=device
        )  # the last step, and the forces before it
        self._forces = torch.zeros(0, 0, 3, dtype=torch.float64, device=device)
        # Flattened displacements s and gradient differences y, oldest first, and R; a pair that a structure does not
        # have is zero, with a one on R's diagonal, and changes nothing.
        self._s = torch.zeros(0, 0, 0, dtype=torch.float64, device=device)  # (B, K, 3 W)
        self._y = torch.zeros(0, 0, 0, dtype=torch.float64, device=device)
        self._r = torch.zeros(0, 0, 0, dtype=torch.float64, device=device)  # (B, K, K)

    def __len__(self) -> int:
        """B."""
        return len(self.positions)

    def extend(self, positions: Sequence[Tensor]) -> None:
        """Let structures enter, behind those that are here: (atoms, 3) A each, in any precision."""
        if not positions:
            return
        lengths = torch.tensor([len(one) for one in positions], device=self.real.device)
        width = max(self.real.shape[1], int(lengths.max()))
        new = pad_sequence([one.to(self.positions) for one in positions], batch_first=True)
        real = torch.arange(width, device=lengths.device) < lengths[:, None]
        count, pairs = len(positions), self._r.shape[1]
        self._set_width(width)
        self.positions = torch.cat([self.positions, pad(new, (0, 0, 0, width - new.shape[1]))])
        self.real = torch.cat([self.real, real])
        self.steps = torch.cat([self.steps, self.steps.new_zeros(count)])
        self._moved = pad(self._moved, (0, 0, 0, 0, 0, count))
        self._forces = pad(self._forces, (0, 0, 0, 0, 0, count))
        self._s, self._y = (pad(x, (0, 0, 0, 0, 0, count)) for x in (self._s, self._y))
        self._r = torch.cat([self._r, torch.eye(pairs).to(self._r).expand(count, pairs, pairs)])

    def keep(self, index: Tensor) -> None:
        """Keep the structures of these numbers (n,), in this order; the others leave."""
        names = ("positions", "real", "steps", "_moved", "_forces", "_s", "_y", "_r")
        for name in names:
            setattr(self, name, getattr(self, name).index_select(0, index))
        self._set_width(int(self.real.sum(1).max()) if len(index) else 0)
        # Pairs older than anyone's history are zeros.
        longest = min(int(self.steps.max().clamp_min(1)) - 1 if len(index) else 0, self._r.shape[1])
        first = self._r.shape[1] - longest
        self._s, self._y, self._r = self._s[:, first:], self._y[:, first:], self._r[:, first:, first:]

    def pack(self, rows: Tensor) -> Tensor:
        """(atoms of all structures, 3), one structure after the other -> (B, W, 3)."""
        packed = torch.zeros_like(self.positions)
        packed[self.real] = rows.to(packed)
        return packed

    def largest_force(self, forces: Tensor) -> Tensor:
        """(B, W, 3) eV/A -> (B,) the largest norm of a force: what is compared with fmax. Zero where nothing moves."""
        if not forces.shape[1]:
            return forces.new_zeros(len(forces))
        return torch.linalg.vector_norm(torch.where(self.real[..., None], forces, 0.0), dim=-1).amax(-1)

    def step(self, forces: Tensor) -> Tensor:
        """Move every structure once, given its forces (B, W, 3) in eV/A; returns the displacements (B, W, 3) in A."""
        forces = torch.where(self.real[..., None], forces, 0.0).to(self.positions)
        self._remember(forces)
        gradient = -forces.flatten(1)
        direction = -self._times_inverse_hessian(gradient)
        # Where pairs contradict each other so much that nothing finite comes out: as if there were none.
        sound = torch.isfinite(direction).all(-1, keepdim=True)
        direction = torch.where(sound, direction, -gradient / self.options.alpha).view_as(forces)
        longest = self.largest_force(direction).clamp_min(1e-300)
        scale = (self.options.maxstep / longest).clamp_max(1.0) * self.options.damping
        self._moved = direction * scale[:, None, None]
        self._forces = forces
        self.positions = self.positions + self._moved
        self.steps = self.steps + 1
        return self._moved

    def _remember(self, forces: Tensor) -> None:
        """Add the pair of the last step to the histories, and forget what is too old."""
        if not bool((self.steps > 0).any()):
            return
        s, y = self._moved.flatten(1), (self._forces - forces).flatten(1)
        curvature = (s * y).sum(-1)
        # A structure that has just entered has no pair yet; one that did not move has none that says anything.
        known = (self.steps > 0) & (curvature != 0) & torch.isfinite(curvature)
        s, y = s * known[:, None], y * known[:, None]
        kept = min(self._r.shape[1], self.options.memory - 1)
        first = self._r.shape[1] - kept
        self._s = torch.cat([self._s[:, first:], s[:, None]], 1)
        self._y = torch.cat([self._y[:, first:], y[:, None]], 1)
        column = (self._s @ y[..., None]).squeeze(-1)
        column[:, -1] = torch.where(known, curvature, 1.0)
        self._r = torch.cat([pad(self._r[:, first:, first:], (0, 0, 0, 1)), column[..., None]], 2)

    def _times_inverse_hessian(self, gradient: Tensor) -> Tensor:
        """(B, 3 W) -> (B, 3 W)."""
        if not self._r.shape[1]:
            return gradient / self.options.alpha
        s, y, r = self._s, self._y, self._r
        a = torch.linalg.solve_triangular(r, s @ gradient[..., None], upper=True)
        z = (gradient[..., None] - y.mT @ a) / self.options.alpha
        diagonal = torch.diagonal(r, dim1=1, dim2=2)[..., None]
        c = torch.linalg.solve_triangular(r.mT, diagonal * a - y @ z, upper=False)
        return (z + s.mT @ c).squeeze(-1)

    def _set_width(self, width: int) -> None:
        """Pad to W = width, or cut padding off."""
        more = width - self.real.shape[1]
        if not more:
            return
        self.real = pad(self.real, (0, more))
        for name in ("positions", "_moved", "_forces"):
            setattr(self, name, pad(getattr(self, name), (0, 0, 0, more)))
        self._s, self._y = (pad(x, (0, 3 * more)) for x in (self._s, self._y))
