"""The planner's memory against that of real runs: `egnscale train` on made-up slabs, with DeepSpeed.

Each configuration is trained for two steps,
from the first import to the first checkpoint; measured is the most memory that any of its processes had. On a CPU that is the peak of the resident set; on a GPU, what torch has reserved there.

    python benchmarks/planner.py --out benchmarks/results/DATE-planner-cpu
    python benchmarks/planner.py --out ... --measured benchmarks/results/DATE-planner-cpu.json    # foretell again
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy import labelled, slab

from egnscale.data.store import write_store
from egnscale.launch.config import RunConfig, load_config

MARK = "egnscale-planner "
GIB = 2**30
MODELS = {
    "dt": ["model.preset=gemnet-dt"],
    "wide": [
        *("model.num_blocks=4", "model.emb_size_atom=768", "model.emb_size_edge=768"),
        *("model.emb_size_trip=96", "model.emb_size_bil_trip=96"),
    ],
    "dt conservative": ["model.preset=gemnet-dt", "model.forces=conservative"],
    "dimenet++": ["model.preset=dimenet++-large"],
}
SLABS = {"dt": (2, 2, 4), "wide": (2, 2, 3), "dt conservative": (2, 2, 4), "dimenet++": (3, 2, 4)}


class Case(NamedTuple):
    model: str
    precision: str
    ranks: int
    graph: int
    zero: int
    recompute: str
    more: tuple[str, ...] = ()

    def words(self, folder: Path) -> list[str]:
        data = folder / self.model.replace(" ", "-")
        return [
            *MODELS[self.model],
            *(f"data.train={data}", "data.workers=0", f"task.output={folder / 'run'}"),
            *("optim.batch_size=1", "optim.max_steps=2", "optim.lr_initial=1e-4", "optim.weight_decay=0.01"),
            *(f"parallel.graph={self.graph}", f"parallel.zero={self.zero}", f"parallel.recompute={self.recompute}"),
            f"parallel.precision={self.precision}",
            *self.more,
        ]

    def config(self, folder: Path) -> RunConfig:
        return load_config(None, self.words(folder))


DOUBLE, REVERSE = "parallel.second_order=double_backward", "parallel.second_order=reverse_over_forward"
CASES = [
    Case("dt", "fp32", 1, 1, 0, "none"),
    Case("dt", "fp32", 2, 1, 0, "selective"),
    Case("dt", "fp32", 2, 2, 1, "none"),
    Case("dt", "fp32", 2, 1, 2, "none"),
    Case("dt", "fp32", 2, 1, 3, "none"),
    Case("dt", "fp32", 2, 2, 3, "selective"),
    Case("wide", "fp32", 1, 1, 0, "none"),
    Case("wide", "fp32", 2, 1, 1, "block", ("optim.amsgrad=true", "optim.ema_decay=0.99")),
    Case("wide", "fp32", 2, 2, 2, "selective"),
    Case("wide", "fp32", 2, 1, 3, "block"),
    Case("dimenet++", "fp32", 1, 1, 0, "none", (DOUBLE,)),
    Case("dimenet++", "fp32", 2, 2, 1, "block", (REVERSE,)),
    Case("dimenet++", "fp32", 2, 1, 3, "block", (REVERSE,)),
    Case("dt", "bf16", 1, 1, 0, "none"),
    Case("dt", "bf16", 2, 1, 1, "none"),
    Case("dt", "bf16", 2, 2, 3, "none"),
    Case("wide", "bf16", 2, 1, 2, "none"),
    Case("wide", "bf16", 2, 2, 3, "block"),
    Case("dt conservative", "fp32", 2, 1, 1, "none", (DOUBLE,)),
    Case("dt conservative", "fp32", 2, 2, 3, "selective", (REVERSE,)),
    Case("dt", "fp32", 2, 2, 0, "block"),
    Case("dt", "fp32", 2, 1, 1, "block"),
    Case("wide", "fp32", 2, 2, 3, "none"),
    Case("wide", "fp32", 2, 1, 1, "none"),
    Case("wide", "bf16", 2, 1, 1, "block"),
    Case("dimenet++", "fp32", 2, 1, 2, "selective", (DOUBLE,)),
    Case("dimenet++", "fp32", 2, 2, 3, "none", (REVERSE,)),
    Case("dt conservative", "fp32", 2, 2, 2, "none", (REVERSE,)),
]


def make_data(folder: Path) -> None:
    for model, size in SLABS.items():
        samples = [labelled(slab(metal, size, seed=i), sid=i) for i, metal in enumerate(("Cu", "Cu"))]
        write_store(folder / model.replace(" ", "-"), samples)


def train(words: list[str]) -> None:
    """One rank of a run; prints the most memory that it had."""
    from egnscale.launch.trainer import Trainer
    from egnscale.scaling.engine import start_world

    world = start_world()
    Trainer(load_config(None, words), world).run(progress=False)
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(f"{MARK}{json.dumps({'rank': world.rank, 'peak': peak})}", flush=True)


def measure(case: Case, folder: Path) -> int:
    """Bytes, of the rank that had most."""
    program = [sys.executable]
    if case.ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.ranks)]
    words = [*case.words(folder), f"task.output={tempfile.mkdtemp(dir=folder)}"]
    done = subprocess.run(
        [*program, __file__, "--run-of", json.dumps(words)],
        capture_output=True,
        text=True,
        check=False,
        # As in `report.in_fresh_process`: resident memory is then what tensors hold, not what glibc's heap has kept.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or len(lines) < case.ranks:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return max(json.loads(line.removeprefix(MARK))["peak"] for line in lines)
