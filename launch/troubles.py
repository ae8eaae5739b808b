"""What must not go on in a training run: losses and gradients that are not finite, losses that leap up, steps that fp16
leaves out.

Such a step is undone where a rollback may follow (`egnscale.launch.spikes`). Elsewhere the run ends in one line that
names the structures, and the first layer whose numbers are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from egnscale.data.batch import AtomBatch
from egnscale.launch.config import RunConfig
from egnscale.launch.evaluation import non_finite
from egnscale.launch.spikes import SpikeGuard
from egnscale.launch.steps import Computation, Computed, Read
from egnscale.launch.tasks import IS2RE, S2EF
from egnscale.launch.trace import what_is_not_finite
from egnscale.models import ExtendedGraph, Prediction
from egnscale.models.layered import LayeredModel
from egnscale.scaling.checkpoint import whole_checkpoints
from egnscale.scaling.engine import Engine, gather_over_ranks, sum_over_ranks
from egnscale.scaling.layout import Mesh

#: Steps in a row that fp16 may leave out. DeepSpeed halves the loss scale each time, from 2^16 or 2^32 down to 1: after
#: 50 there is nothing left to halve.
MAX_SKIPPED_STEPS = 50


class Troubles:
    """Looks at each step of a run. All is collective, and all ranks find the same.

    Args:
        config: of the run.
        objective: with the model.
        engine: with its gradients.
        mesh: where its graphs are put.
        computation: to run batches once more.
        guard: what is remembered of losses and rollbacks.
        checkpoints: directory of those that a rollback may go back to.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: S2EF | IS2RE,
        engine: Engine,
        mesh: Mesh,
        computation: Computation,
        guard: SpikeGuard,
        checkpoints: Path,
    ) -> None:
        self.config, self.objective, self.engine, self.mesh = config, objective, engine, mesh
        self.computation = computation
        self.guard, self.checkpoints = guard, checkpoints
        self.skipped_in_a_row = 0

    # Each says why a step must be undone, "" where it need not, and raises ValueError where it must and cannot be.

    def of_losses(self, step: int, computed: Sequence[Computed], read: Sequence[Read]) -> str:
        """Whether any rank's loss is NaN or infinite."""
        losses = torch.stack([one.loss for one in computed])
        failed = sum_over_ranks((~torch.isfinite(losses)).double()).tolist()
        number = next((number for number, ranks in enumerate(failed) if ranks), None)
        if number is None:
            return ""
        prediction, loss = computed[number].prediction, losses[number]
        names: list[str] = []
        graph, atoms = self.mesh.place(read[number][0]), read[number][1].to(self.mesh.device)
        if not torch.isfinite(loss) and prediction is not None:
            names = non_finite(prediction, graph, atoms) or self._bad_labels(graph, atoms)
        value = next(one for one in gather_over_ranks(loss.item()) if not math.isfinite(one))
        reason = f"the loss became {value} at step {step} on {_some_of_all_ranks(names)}"
        if self._may_roll_back():
            return reason
        raise ValueError(
            f"{reason}; {self._trace([read[number]], backward=False)}{self._after_rollbacks()}; "
            "the last checkpoint is untouched "
            "(lower optim.lr_initial, set optim.clip_grad_norm, or look at these structures)"
        )

    def of_gradient(self, step: int, norm: float, read: Sequence[Read]) -> str:
        """Whether the norm of the step's gradient is finite."""
        if math.isfinite(norm):
            return ""
        names = _some_of_all_ranks([name for _, atoms in read for name in atoms.names])
        reason = f"the gradient's norm became {norm} at step {step} on {names}"
        if self._may_roll_back():
            return reason
        raise ValueError(
            f"{reason}; {self._trace(read, backward=True)}{self._after_rollbacks()}; the last checkpoint is untouched "
            "(lower optim.lr_initial, or look at these structures)"
        )

    def of_spike(self, step: int, loss: float) -> str:
        """Whether the loss has leapt up."""
        reason = self.guard.spike(loss) if self.config.task.rollback else None
        if reason is None:
            return ""
        reason = f"{reason} at step {step}"
        if self._may_roll_back():
            return reason
        raise ValueError(f"{reason}{self._after_rollbacks()}; the last checkpoint is untouched")

    def count_skipped(self, step: int, *, skipped: bool) -> bool:
        """Whether a step was taken, which fp16 may have left out.

        Raises:
            ValueError: after too many in a row that were not.
        """
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise ValueError(
                f"fp16 left out {self.skipped_in_a_row} steps in a row, to step {step}, and its scale is down "
                f"to {self.engine.loss_scale:g}: gradients are not finite; the last checkpoint is untouched "
                "(set parallel.precision to bf16, or lower optim.lr_initial)"
            )
        return not skipped

    def whole_checkpoints(self) -> list[Path]:
        """As rank 0 sees them: file systems may show the others something older."""
        mine = whole_checkpoints(self.checkpoints) if self.engine.world.is_main else []
        return gather_over_ranks(mine)[0]

    def _may_roll_back(self) -> bool:
        return len(self.guard.rollbacks) < self.guard.max and bool(self.whole_checkpoints())

    def _after_rollbacks(self) -> str:
        """What to add to the reason why a run stops."""
        if not self.config.task.rollback:
            return ""
        if not self.guard.rollbacks:
            return "; there is no checkpoint to go back to yet"
        return (
            f"; {len(self.guard.rollbacks)} rollbacks have been made, of at most {self.guard.max} (task.rollback.max)"
        )

    def _bad_labels(self, graph: ExtendedGraph, atoms: AtomBatch) -> list[str]:
        """Structures whose labels are not finite; all of them where no label is to blame."""
        energy, forces = (
            (atoms.energy_relaxed, None) if self.config.task.name == "is2re" else (atoms.energy, atoms.forces)
        )
        assert energy is not None
        return non_finite(Prediction(energy, forces), graph, atoms) or atoms.names

    def _trace(self, read: Sequence[Read], *, backward: bool) -> str:
        """Where the first number that is not finite comes from, by running batches once more."""
        model = self.objective.model
        assert isinstance(model, LayeredModel)
        again = [self.computation.again(one) for one in read]
        return what_is_not_finite(self.objective, model, self.engine, again, backward=backward)


def _some_of_all_ranks(names: list[str]) -> str:
    """The first few names of structures; ranks that share a graph have the same. Collective."""
    every = list(dict.fromkeys(name for part in gather_over_ranks(names) for name in part))
    more = f" and {len(every) - 8} more" if len(every) > 8 else ""
    return f"{', '.join(every[:8])}{more}"
