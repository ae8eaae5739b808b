"""The first structures of a data set, as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from toy import make_dataset, write_config

from egnscale.data.dataset import First
from egnscale.data.store import Store
from egnscale.launch.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), train=8, val=2)


def test_it_is_the_beginning_of_the_whole(data: Path) -> None:
    whole = Store(data / "s2ef" / "train")
    first = First(whole, 3)
    assert len(first) == 3
    for name in ("num_atoms", "num_edges", "sid", "fid"):
        assert np.array_equal(getattr(first, name), getattr(whole, name)[:3])
    assert np.array_equal(first[-1].positions, whole[2].positions)
    assert first.metadata == whole.metadata
    with pytest.raises(IndexError):
        first[3]
    assert len(First(whole, 100)) == len(whole)


def test_a_run_on_the_first_structures_sees_no_other(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[int] = set()
    original = Store.__getitem__

    def noting(self: Store, i: int) -> object:
        if self.path == data / "s2ef" / "train":
            read.add(i)
        return original(self, i)

    monkeypatch.setattr(Store, "__getitem__", noting)
    write_config(tmp_path / "config.yaml", data, tmp_path / "run")
    words = ["data.limit=3", "data.workers=0", "optim.max_steps=6", "task.eval_every=100", "--json"]
    assert main(["train", str(tmp_path / "config.yaml"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6
    assert read == {0, 1, 2}
