"""The planner's memory against that of real runs: `egnscale train` on made-up slabs, with DeepSpeed.

Each configuration is trained for two steps, from the first import to the first checkpoint; measured is the most memory
that any of its processes had. On a CPU that is the peak of the resident set; on a GPU, what torch has reserved there.

    python benchmarks/planner.py --out benchmarks/results/DATE-planner-cpu
    python benchmarks/planner.py --out ... --measured benchmarks/results/DATE-planner-cpu.json    # foretell again
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import environment, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy import labelled, slab

from egnscale.data.dataset import open_dataset
from egnscale.data.store import write_store
from egnscale.launch.config import RunConfig, load_config
from egnscale.launch.planning import Planner
from egnscale.launch.run_files import run_model
from egnscale.scaling.combinations import Combination
from egnscale.scaling.layout import ParallelLayout
from egnscale.scaling.memory import peak_memory
from egnscale.scaling.planner import ALLOWANCE, MACHINES, Plan

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
    Case("dt", "fp32", 1, 1, 3, "block"),
    Case("dt", "fp32", 1, 1, 2, "selective"),
    Case("dt", "bf16", 1, 1, 1, "none"),
    Case("dt", "bf16", 1, 1, 0, "block"),
    Case("dimenet++", "fp32", 1, 1, 0, "none", (DOUBLE,)),
    Case("dimenet++", "fp32", 1, 1, 3, "block", (REVERSE,)),
    Case("dimenet++", "fp32", 1, 1, 2, "selective", (DOUBLE,)),
    Case("dt conservative", "fp32", 1, 1, 1, "none", (DOUBLE,)),
    Case("dt conservative", "fp32", 1, 1, 3, "selective", (REVERSE,)),
    Case("dt", "bf16", 1, 1, 3, "none"),
    Case("dt", "fp32", 1, 1, 1, "block"),
    Case("dimenet++", "fp32", 1, 1, 1, "block", (REVERSE,)),
    Case("dt conservative", "fp32", 1, 1, 0, "block", (REVERSE,)),
    Case("dt", "bf16", 1, 1, 2, "selective"),
    Case("dt", "fp32", 2, 2, 0, "block"),
    Case("dt", "bf16", 2, 2, 3, "block"),
    Case("dimenet++", "fp32", 2, 2, 3, "none", (REVERSE,)),
    Case("dt conservative", "fp32", 2, 2, 2, "none", (DOUBLE,)),
    Case("wide", "fp32", 2, 2, 3, "block"),
    Case("dimenet++", "fp32", 2, 1, 1, "selective", (DOUBLE,)),
    Case("dt conservative", "fp32", 2, 2, 1, "block", (REVERSE,)),
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
    peak = peak_memory(world.device)
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


def foretell(case: Case, folder: Path, device: str) -> Plan:
    config = case.config(folder)
    parallel, model = config.parallel, run_model(config, None)
    machine = MACHINES["h100" if device == "cuda" else "cpu"]
    planner = Planner(config, model, machine, open_dataset(config.data.train))
    combination = Combination(
        forces=model.forces,
        second_order=parallel.second_order,
        zero=case.zero,
        recompute=parallel.recompute,
        precision=parallel.precision,
    )
    return planner.plan(ParallelLayout.of_world(case.ranks, graph=case.graph), combination, 1, 1)


NOTE = """\
Bytes of the rank that has most, from its first import to its first checkpoint. CPU runs have
`MALLOC_MMAP_THRESHOLD_=65536`, so that resident memory is what tensors hold; with glibc's default settings its heap
may keep as much again ([docs/planning.md](../../docs/planning.md)). "Fits" adds a safety allowance of {allowance:.0%}
to what is foretold; a row is not safe where the measured peak is above that."""


def report(cases: list[Case], peaks: dict[str, int], folder: Path, results: dict[str, Any]) -> list[str]:
    rows, errors, wrong = [], [], 0
    for case in cases:
        plan, peak = foretell(case, folder, results["device"]), peaks[json.dumps(case)]
        error = plan.foretold / peak - 1
        errors.append(error)
        wrong += plan.needed < peak
        ways = [word.split(".", 1)[1].removeprefix("second_order=") for word in case.more]
        results["cases"].append(
            {
                **case._asdict(),
                "measured": peak,
                "foretold": plan.foretold,
                "needed": plan.needed,
                "error": error,
                "peak_in": plan.peak.when,
                "kinds": dict(plan.peak.kinds),
            }
        )
        name = ", ".join([case.model, case.precision, *ways])
        rows.append(
            (
                *(name, case.ranks, case.graph, case.zero, case.recompute, f"{plan.foretold / GIB:.3f}"),
                *(f"{peak / GIB:.3f}", f"{100 * error:+.1f}", plan.peak.when, "yes" if plan.needed >= peak else "NO"),
            )
        )
    header = (
        "model",
        "ranks",
        "graph",
        "ZeRO",
        "recompute",
        "foretold GiB",
        "measured GiB",
        "error %",
        "peak in",
        "safe",
    )
    worst = max(errors, key=abs)
    within = sum(abs(error) <= 0.1 for error in errors)
    summary = (
        f"{len(errors)} configurations: {within} within 10 %, the worst {100 * worst:+.1f} %, mean of the absolute "
        f"errors {100 * sum(map(abs, errors)) / len(errors):.1f} %; {wrong} would be said to fit and do not."
    )
    return [NOTE.format(allowance=ALLOWANCE), table(header, rows), summary]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--measured", type=Path, help="take measured peaks from these results, measure only the others")
    parser.add_argument("--no-run", action="store_true", help="measure nothing; report what --measured has")
    parser.add_argument("--run-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_of:
        train(args.run_of)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peaks: dict[str, int] = {}
    if args.measured:
        peaks = json.loads(args.measured.read_text())["peaks"]
    results: dict[str, Any] = {"environment": environment(device), "device": device, "peaks": peaks, "cases": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        cases = [case for case in CASES if json.dumps(case) in peaks or not args.no_run]
        for case in cases:
            if json.dumps(case) not in peaks:
                peaks[json.dumps(case)] = measure(case, folder)
                print(*case, f"{peaks[json.dumps(case)] / GIB:.3f} GiB", file=sys.stderr, flush=True)
        sections = report(cases, peaks, folder, results)
    write(args.out, "What the planner foretells, and what runs take", sections, results)


if __name__ == "__main__":
    main()
