"""A thousand damaged and hostile records: no crash, no command run, and an error that names the structure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launchers import ENVIRONMENT, ROOT

COUNT = 1000


def fuzz(*words: object) -> str:
    """Run tests/oc20_record_fuzz.py; a crash of the process is an exit status that is not 0."""
    command = [sys.executable, str(ROOT / "tests" / "oc20_record_fuzz.py"), *map(str, words)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return result.stdout


def test_damaged_records(tmp_path: Path) -> None:
    file, marker = tmp_path / "data.lmdb", tmp_path / "ran"
    fuzz("write", file, COUNT, 0, marker)
    found = json.loads(fuzz("read", file))
    assert not marker.exists()
    assert not found["wrong"]
    # Some damage hits what is not read, or changes a number into another one.
    assert found["whole"] + sum(found["bad"].values()) == COUNT
    assert 50 < found["whole"] < COUNT / 2
    assert found["bad"]["damaged record"] > 200
    assert found["bad"]["refused name"] > 50
    assert found["bad"]["wrong shape"] + found["bad"]["wrong values"] > 20
    assert found["slowest"] < 5.0


def test_damaged_records_are_counted(tmp_path: Path) -> None:
    """Through the command."""
    file, marker = tmp_path / "data.lmdb", tmp_path / "ran"
    fuzz("write", file, 200, 1, marker)
    words = ["data", "convert", str(file), str(tmp_path / "out"), "--skip-bad", "--json", "--workers", "1"]
    command = [sys.executable, "-m", "egnscale.launch.cli", *words]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["structures"] + report["skipped"]["count"] == 200
    assert report["skipped"]["count"] > 100
    assert not marker.exists()
