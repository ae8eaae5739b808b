"""`egnscale bench comm`: what is foretold is what is sent, and far less than the paper's scheme."""

from __future__ import annotations

import json

import pytest

from egnscale.launch.cli import main


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["bench", "comm", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("ranks", [2, 4])
def test_real_runs_send_what_was_foretold(ranks: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--model", "gemnet-xl", "--ranks", str(ranks), "--atoms", "80")
    (system,) = found["systems"]
    measured = system["measured"]
    assert measured["block"] == system["owner"]
    assert measured["all"] == system["step"]
    assert all(calls == ranks for calls in measured["calls"].values())
    if not measured["wire"]:
        pytest.skip("no network namespace of its own: the interface cannot be read")
    # The interface counts headers, and the barriers around the step.
    assert system["step"] < measured["wire"]["owner"] < 1.1 * system["step"]
    paper = sum(system["paper"].values())
    assert paper < measured["wire"]["paper"] < 1.02 * paper


def test_far_less_than_the_papers_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--model", "gemnet-xl", "--ranks", "4", "--no-run")
    small, large = found["systems"]
    assert 70 <= small["atoms"] <= 90
    assert 950 <= large["atoms"] <= 1050
    assert small["ratio"] >= 50
    assert large["ratio"] >= 200
    assert found["imbalance"]["1 slab over 8 ranks"] <= 1.06
    assert found["imbalance"]["32 slabs over 8 ranks"] <= 1.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "1"], "fewer than 2"),
        (["--atoms", "3"], "at least 20 atoms"),
        (["--model", "gemnet-x1"], "did you mean 'gemnet-xl'"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "comm", *words]) == 1
    assert message in capsys.readouterr().err
