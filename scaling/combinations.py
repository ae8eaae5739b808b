"""Which settings of a run work together: one list of rules for the trainer, the planner, the tests and the docs.

python -m egnscale.scaling.combinations docs/combinations.md    # writes its tables anew
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

#: Of positions -> energy: an energy and forces by a head, forces as its gradient, no forces.
Forces = Literal["direct", "conservative", "none"]

#: How conservative forces are trained on: the gradient of a gradient, or one of a directional derivative.
SecondOrder = Literal["double_backward", "reverse_over_forward"]
Recompute = Literal["none", "selective", "block"]
Precision = Literal["fp32", "bf16", "fp16"]
#: What is kept in host memory (`optimizer`, `parameters`: these and the optimizer) or on a disk (`nvme`: both).
Offload = Literal["none", "optimizer", "parameters", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The settings of a run that depend on each other, under their names in `parallel` and `model`."""

    forces: Forces = "direct"
    second_order: Literal["auto"] | SecondOrder = "auto"
    pipe: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    precision: Precision = "fp32"
    offload: Offload = "none"
    fp16_device: bool = False  #: whether the device computes in fp16

    def why_not(self) -> str | None:
        """Why it cannot work, and what would: one line; None where it works."""
        rule = self._broken()
        if rule is None:
            return None
        near = self.nearest()
        changes = [
            f"{'model' if field.name == 'forces' else 'parallel'}.{field.name} to {getattr(near, field.name)}"
            for field in fields(self)
            if getattr(near, field.name) != getattr(self, field.name)
        ]
        others = f", {rule.otherwise}" if rule.otherwise else ""
        return f"{rule.reason.format(**vars(self))}; set {' and '.join(changes)}{others}"

    def nearest(self) -> Combination:
        """Itself where it works, else that which differs in the fewest settings, by the order of the rules."""
        found = self
        while broken := found._broken():
            found = replace(found, **broken.instead(found))
        return found

    def _broken(self) -> Rule | None:
        """The first rule that it breaks."""
        return next((rule for rule in RULES if rule.applies(self)), None)

    @property
    def chosen_second_order(self) -> SecondOrder:
        """What `auto` stands for where memory does not decide."""
        if self.second_order != "auto":
            return self.second_order
        needed = self.forces == "conservative" and (self.zero == 3 or self.pipe > 1)
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
        lambda c: c.pipe > 1 and c.zero == 0,
        "parallel.pipe is {pipe} without ZeRO, where DeepSpeed clips gradients by the norm of one stage",
        lambda c: {"zero": 1},
    ),
    Rule(
        lambda c: c.pipe > 1 and c.zero > 1,
        "parallel.pipe is {pipe}, and DeepSpeed's pipelines know no ZeRO-{zero}",
        lambda c: {"zero": 1},
        "or parallel.pipe to 1",
    ),
    Rule(
        lambda c: c.pipe > 1 and c.second_order == "double_backward",
        "parallel.pipe is {pipe}, and no second derivative goes through DeepSpeed's pipelines",
        lambda c: {"second_order": "reverse_over_forward"},
        "or parallel.pipe to 1",
    ),
    Rule(
        lambda c: c.pipe > 1 and c.offload != "none",
        "parallel.pipe is {pipe}, and offloading has not been tried in a pipeline",
        lambda c: {"offload": "none"},
        "or parallel.pipe to 1",
    ),
    Rule(
        lambda c: c.pipe > 1 and c.precision == "fp16",
        "parallel.pipe is {pipe}, and fp16 has not been tried in a pipeline",
        lambda c: {"precision": "bf16"},
        "or parallel.pipe to 1",
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


# The tables of docs/combinations.md

BEGIN, END = "<!-- tables of egnscale.scaling.combinations -->\n", "<!-- end of tables -->\n"
ZERO = (0, 1, 2, 3)


def legal_tables() -> str:
    """Markdown: what goes with what, each cell with all that has no part in its table; and why not, numbered."""
    broken: dict[Rule, str] = {}  # what each says of the first combination that breaks it

    def cell(**settings: Any) -> str:
        found = set()
        for one in every_combination(**{name: [value] for name, value in settings.items()}, recompute=_RECOMPUTE):
            rule = one._broken()
            if rule is not None:
                broken.setdefault(rule, one.why_not() or "")
            found.add("yes" if rule is None else f"no ({list(broken).index(rule) + 1})")
        assert len(found) == 1, "recomputation has a part in this"
        auto = settings.get("forces") == "conservative" and settings["second_order"] == "auto" and found == {"yes"}
        return f"`{Combination(**settings).chosen_second_order}`" if auto else found.pop()

    orders = [
        [f"`{forces}`", f"`{order}`", *(cell(forces=forces, second_order=order, zero=zero) for zero in ZERO)]
        for forces in get_args(Forces)
        for order in ("auto", *get_args(SecondOrder))
    ]
    pipes = [
        [f"`{forces}`", f"`{order}`", *(cell(forces=forces, second_order=order, pipe=2, zero=zero) for zero in ZERO)]
        for forces in get_args(Forces)
        for order in (("auto", *get_args(SecondOrder)) if forces == "conservative" else ("auto",))
    ]
    offloads = [[f"`{kept}`", *(cell(offload=kept, zero=zero) for zero in ZERO)] for kept in get_args(Offload)]
    precisions = [
        [
            f"`{precision}`",
            *(cell(precision=precision, fp16_device=able) for able in (True, False)),
            cell(precision=precision, fp16_device=True, pipe=2, zero=1),
        ]
        for precision in get_args(Precision)
    ]
    stages = [f"ZeRO-{zero}" for zero in ZERO]
    return "\n".join(
        [
            "Forces (`model.forces`) and how they are trained (`parallel.second_order`; of `auto`, what is taken where "
            "it fits):\n",
            _table(["forces", "second order", *stages], orders),
            "The same in a pipeline (`parallel.pipe` of 2 or more):\n",
            _table(["forces", "second order", *stages], pipes),
            "What is kept off the device (`parallel.offload`):\n",
            _table(["offload", *stages], offloads),
            "Precision of matrix products (`parallel.precision`):\n",
            _table(["precision", "device computes in fp16", "it does not", "in a pipeline"], precisions),
            "What is refused, in the words of the refusal, which end with what to set instead:\n",
            *(f"{number}. {reason}" for number, reason in enumerate(broken.values(), start=1)),
            "",
        ]
    )


_RECOMPUTE = get_args(Recompute)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_tables(page: str) -> str:
    """A page whose tables, between the markers, are those of the rules."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "a page with both markers"
    return f"{before}{BEGIN}\n{legal_tables()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text()))
