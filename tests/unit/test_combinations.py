"""What goes with what: every refusal says why and what would do, in the docs as in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from toy import make_dataset, write_config

from egnscale.launch.cli import main
from egnscale.scaling import combinations
from egnscale.scaling.combinations import (
    RULES,
    Combination,
    Forces,
    Offload,
    Precision,
    Recompute,
    SecondOrder,
    every_combination,
    with_tables,
)

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
EVERY = list(
    every_combination(
        forces=get_args(Forces),
        second_order=("auto", *get_args(SecondOrder)),
        pipe=(1, 2),
        zero=range(4),
        recompute=get_args(Recompute),
        precision=get_args(Precision),
        offload=get_args(Offload),
        fp16_device=(False, True),
    )
)


def test_a_refusal_says_what_would_do() -> None:
    for one in EVERY:
        reason, near = one.why_not(), one.nearest()
        assert near.why_not() is None, one
        if reason is None:
            assert near == one
            continue
        changed = {name: value for name, value in vars(near).items() if value != getattr(one, name)}
        assert changed, one
        assert "\n" not in reason
        assert "{" not in reason
        for name, value in changed.items():
            assert f"parallel.{name} to {value}" in reason, one
        # What the user cannot change stays.
        assert not changed.keys() & {"forces", "recompute", "pipe", "fp16_device"}


def test_every_rule_refuses_something_that_no_other_does() -> None:
    for rule in RULES:
        assert any([other.applies(one) for other in RULES].count(True) == 1 and rule.applies(one) for one in EVERY)
    assert Combination().why_not() is None


def test_auto_is_legal_wherever_a_choice_is() -> None:
    for one in EVERY:
        if one.second_order == "auto" and one.forces == "conservative" and one.why_not() is None:
            explicit = Combination(**{**vars(one), "second_order": one.chosen_second_order})
            assert explicit.why_not() is None


def test_the_docs_have_the_tables_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, f"python -m egnscale.scaling.combinations {PAGE.relative_to(PAGE.parents[1])}"
    monkeypatch.setattr(combinations, "RULES", RULES[1:])
    assert with_tables(page) != page


@pytest.mark.parametrize(
    "settings, words",
    [
        (["model.forces=conservative", "parallel.second_order=double_backward", "parallel.zero=3"], "under ZeRO-3"),
        (["parallel.second_order=reverse_over_forward"], "which needs no second derivative"),
        (["parallel.offload=parameters", "parallel.zero=2"], "which only ZeRO-3 can do"),
    ],
)
def test_training_refuses_in_one_line(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", make_dataset(tmp_path / "data", 4, 2), tmp_path / "run")
    assert main(["train", str(config), "data.workers=0", *settings]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if words in line]
    assert len(said) == 1
    assert "; set parallel." in said[0]
    assert not (tmp_path / "run").exists()
