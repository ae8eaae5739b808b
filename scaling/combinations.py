"""Which settings of a run work together: one list of rules for the trainer, the planner, the tests and the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

#: How conservative forces are trained on: the gradient of a gradient, or one of a directional derivative.
SecondOrder = Literal["double_backward", "reverse_over_forward"]
Recompute = Literal["none", "selective", "block"]
Precision = Literal["fp32", "bf16", "fp16"]
#: What is kept in host memory (`optimizer`, `parameters`: these and the optimizer) or on a disk (`nvme`: both).
Offload = Literal["none", "optimizer", "parameters", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The settings of a run that depend on each other, under their names in `parallel` and `model`."""

    forces: Literal["direct", "conservative", "none"] = "direct"
    second_order: Literal["auto"] | SecondOrder = "auto"
    zero: int = 0
    recompute: Recompute = "none"
    precision: Precision = "fp32"
    offload: Offload = "none"
    fp16_device: bool = False  #: whether the device computes in fp16

    def why_not(self) -> str | None:
        """Why it cannot work, and what would: one line; None where it works."""
        for rule in RULES:
            if rule.applies(self):
                near = self.nearest()
                changes = [
                    f"{'model' if field.name == 'forces' else 'parallel'}.{field.name} to {getattr(near, field.name)}"
                    for field in fields(self)
                    if getattr(near, field.name) != getattr(self, field.name)
                ]
                others = f", {rule.otherwise}" if rule.otherwise else ""
                return f"{rule.reason.format(**vars(self))}; set {' and '.join(changes)}{others}"
        return None

    def nearest(self) -> Combination:
        """Itself where it works, else that which differs in the fewest settings, by the order of the rules."""
        found = self
        while broken := next((rule for rule in RULES if rule.applies(found)), None):
            found = replace(found, **broken.instead(found))
        return found

    @property
    def chosen_second_order(self) -> SecondOrder:
        """What `auto` stands for where memory does not decide."""
        if self.second_order != "auto":
            return self.second_order
        needed = self.forces == "conservative" and self.zero == 3
        return "reverse_over_forward" if needed else "double_backward"


class Rule(NamedTuple):
    """What cannot work."""

    applies: Callable[[Combination], bool]
    reason: str  #: with {fields} of the combination
    instead: Callable[[Combination], dict[str, Any]]  #: what to change
    otherwise: str = ""  #: another way out, in words


RULES = (
    Rule(
        lambda c: c.forces != "conservative" and c.second_order != "auto",
        "parallel.second_order is {second_order}, but model.forces is {forces}, which needs no second derivative",
        lambda c: {"second_order": "auto"},
    ),
    Rule(
        lambda c: c.second_order == "double_backward" and c.zero == 3,
        "double_backward does not work under ZeRO-3: DeepSpeed has given parameters back when the second derivative "
        "needs them",
        lambda c: {"second_order": "reverse_over_forward"},
        "or parallel.zero below 3",
    ),
    Rule(
        lambda c: c.precision == "fp16" and not c.fp16_device,
        "this device does not compute in fp16",
        lambda c: {"precision": "bf16"},
    ),
    Rule(
        lambda c: c.offload == "optimizer" and c.zero == 0,
        "parallel.offload is optimizer, and without ZeRO every rank steps on the device",
        lambda c: {"zero": 1},
    ),
    Rule(
        lambda c: c.offload in ("parameters", "nvme") and c.zero < 3,
        "parallel.offload is {offload}, which only ZeRO-3 can do",
        lambda c: {"zero": 3},
        "or parallel.offload to optimizer",
    ),
)


def every_combination(**fixed: Any) -> Iterator[Combination]:
    """All of them, legal or not, of the values given: `name=[values]`."""
    combinations = [Combination()]
    for name, values in fixed.items():
        combinations = [replace(one, **{name: value}) for one in combinations for value in values]
    yield from combinations
