"""Files that are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from egnscale.data import files
from egnscale.data.files import leftovers, replacing


def test_file_and_directory_are_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: order.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    out = tmp_path / "folder" / "a.b.npz"
    for text in ("old", "new"):
        with replacing(out) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".npz"
            assert leftovers(out.parent) == [temporary]
            assert not out.exists() or out.read_text() == "old"
        assert out.read_text() == text
    assert order == [temporary.name, "rename", "folder"] * 2
    assert os.listdir(out.parent) == ["a.b.npz"]


def test_nothing_is_left_of_an_error(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "POSCAR") as temporary:
            temporary.write_text("a part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from egnscale.data.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("a part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["12.traj", "POSCAR", "a.b.npz", "relax.json"])
def test_leftovers_of_a_killed_process_are_recognised(tmp_path: Path, name: str) -> None:
    for other in ("12.traj", ".hidden", "a.tmp", ".12.tmp.traj", "12.99.tmp.traj", ".a.b.tmp"):
        (tmp_path / other).touch()
    before = set(tmp_path.iterdir())
    assert leftovers(tmp_path) == []
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
    assert {*leftovers(tmp_path)} == {*tmp_path.iterdir()} - before
    assert len(leftovers(tmp_path)) == 1
    assert leftovers(tmp_path / "nowhere") == []
