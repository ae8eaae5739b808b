"""Training under the launchers that people use, on two ranks."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


def start(launcher: list[str], config: Path | list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Train under a launcher; or, given words in place of a configuration, run those."""
    script = [str(ROOT / "launch" / "train.py"), "--config", str(config), "data.workers=0", *words]
    command = config if isinstance(config, list) else script
    return subprocess.run(
        [*launcher, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600
    )


def deepspeed() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]


def torchrun() -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]


def log(run: Path) -> list[tuple[int, float]]:
    with open(run / "log.csv") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
