"""What graph parallelism sends: foretold from index lists, counted in real runs, and read off the network interface.

Schemes compared, for one GemNet block, forward and backward, over all ranks together:

* `owner`: this package's partition. Foretold by the model itself on the meta device, part by part.
* `paper`: all-reduces of the triplet aggregate and of the symmetric messages, (edges, emb_size_edge) each, and of the
  atom aggregate, (atoms, emb_size_edge); in a ring a rank sends 2 (P - 1) / P of an array. (Sriram et al., Figure 1b)

A real run has one block whose exchanges are those of the preset and whose products are as small as that allows: what
is sent depends on the widths of exchanged rows alone. The paper's all-reduces are made at the preset's full widths.

This module is also the program of one rank: `torchrun ... -m egnscale.launch.bench_comm SPEC`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, fcc211, molecule

from egnscale.data.batch import build_graph, cell_coordinates
from egnscale.data.neighbors import GraphSpec
from egnscale.data.sample import Sample
from egnscale.models import ExtendedGraph, GemNetConfig, GemNetT, build_model, model_config
from egnscale.scaling.collectives import CountedGroup, GraphGroup, Site, Tally, sum_over_parts
from egnscale.scaling.layout import Mesh
from egnscale.scaling.partition import OwnerExchange, partition_by_owner

#: What a run prints its result behind.
MARK = "egnscale-bench-comm "
METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt")


def slab(atoms: int, number: int = 0) -> Sample:
    """A slab of five layers with CO on top, of about so many atoms; others with other numbers."""
    width = max(2, round((atoms / 5) ** 0.5))
    metal = METALS[number % len(METALS)]
    made: Atoms = fcc211(metal, (3 * ((width + 2) // 3), width, 4), vacuum=10.0) if number % 5 == 4 else None
    made = made or fcc111(metal, (width, width, 5), vacuum=10.0)
    add_adsorbate(made, molecule("CO"), 1.9, (1.0, 1.0))
    made.pbc = True
    made.rattle(0.05, seed=number)
    return Sample.from_atoms(made, sid=number)


def gemnet_config(preset: str) -> GemNetConfig:
    """The configuration of a GemNet preset.

    Raises:
        ValueError: for any other model.
    """
    config = model_config(preset)
    if not isinstance(config, GemNetConfig):
        raise ValueError(f"--model is {preset}; what is sent is foretold and measured for GemNet only")
    return config


def parts_of(samples: list[Sample], config: GemNetConfig, ranks: int) -> tuple[ExtendedGraph, list[ExtendedGraph]]:
    """The whole graph and its parts."""
    graph = build_graph(samples, GraphSpec(config.cutoff, config.max_neighbors, config.symmetrize))  # type: ignore[arg-type]
    coordinates = cell_coordinates(samples)
    return graph, [partition_by_owner(graph, coordinates, ranks, part)[0] for part in range(ranks)]


def imbalance(part: ExtendedGraph) -> float:
    """Most edges of a part over the mean."""
    assert isinstance(part.exchange, OwnerExchange)
    edges = np.array(part.exchange.edges)
    return float(edges.max() / edges.mean())


def one_block(config: GemNetConfig, *, slim: bool) -> GemNetConfig:
    """The model with one block; `slim`: and narrow wherever that does not change what is exchanged."""
    if not slim:
        return replace(config, num_blocks=1)
    width = min(config.emb_size_atom, config.emb_size_edge)
    return replace(config, num_blocks=1, emb_size_atom=width, emb_size_edge=width, emb_size_trip=8, num_radial=16)


def foretell(config: GemNetConfig, parts: list[ExtendedGraph]) -> dict[Site, int]:
    """Bytes of a forward and backward in fp32, all ranks together, by layer, verb and direction."""
    found: Counter[Site] = Counter()
    with torch.device("meta"):
        model = build_model(one_block(config, slim=False))
    for rank, part in enumerate(parts):
        group = CountedGroup(len(parts), rank)
        assert isinstance(part.exchange, OwnerExchange)
        graph = replace(part, exchange=part.exchange.join(group)).to("meta")
        for site, tally in step(model, graph, group).items():
            found[site] += tally.bytes
    return dict(found)


def step(model: GemNetT, graph: ExtendedGraph, group: GraphGroup) -> dict[Site, Tally]:
    """Forward and backward; what was exchanged."""
    hooks = group.traffic.name_layers(model.layers)
    prediction = model(graph)
    (prediction.energy.sum() + graph.partition.total(prediction.forces).sum()).backward()
    for hook in hooks:
        hook.remove()
    return group.traffic.read()


def of_block(found: Mapping[Site, int]) -> dict[str, int]:
    """Bytes of the block alone, "verb direction": bytes."""
    return {f"{s.verb} {s.direction}": count for s, count in sorted(found.items()) if s.layer.endswith(" Block")}


def of_paper(config: GemNetConfig, graph: ExtendedGraph, ranks: int) -> dict[str, int]:
    """The same for the paper's scheme."""
    rows = {"triplets": graph.num_edges, "messages": graph.num_edges, "atoms": graph.num_atoms}
    ring = {name: 2 * (ranks - 1) * count * config.emb_size_edge * 4 for name, count in rows.items()}
    return {f"{name} {direction}": sent for name, sent in ring.items() for direction in ("backward", "forward")}


# A real run


def measure(preset: str, atoms: int, ranks: int) -> dict[str, Any]:
    """What `ranks` processes on the CPU count, in a network of their own where the system allows it.

    Raises:
        ValueError: if a process fails; with its error.
    """
    spec = json.dumps({"model": preset, "atoms": atoms})
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    program += ["-m", "egnscale.launch.bench_comm", spec]
    apart = _own_network()
    # On the CPU, whatever else is here: what is sent is the same, and it goes through the interface.
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*apart, *program], capture_output=True, text=True, check=False, env=variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line] or ["no error was printed"]
        raise ValueError(f"the run on {ranks} ranks failed: {errors[0]}")
    found = json.loads(lines[-1].removeprefix(MARK))
    if not apart:
        found["wire"] = {}  # others may be using the interface
    return found


def _own_network() -> list[str]:
    """A prefix that runs a command in a network namespace with nothing but a loopback interface; empty if it cannot."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return []
    prefix = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    works = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if works else []


def _on_interface() -> int:
    """Bytes that have passed the loopback interface."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def run_rank(preset: str, atoms: int) -> None:
    """One rank of a real run; rank 0 prints what was counted on all of them."""
    import torch.distributed as dist

    from egnscale.scaling.engine import gather_over_ranks, start_world

    torch.set_num_threads(1)
    world = start_world()
    mesh = Mesh.of_world(world.device, graph=world.size)
    group = mesh.graph_group
    assert group is not None
    config = gemnet_config(preset)
    whole, parts = parts_of([slab(atoms)], config, world.size)
    torch.manual_seed(0)
    model = build_model(one_block(config, slim=True)).to(world.device)
    graph = mesh.place(parts[world.rank])
    step(model, graph, group)  # the first also compares shapes

    def on_wire(work: Any) -> tuple[int, Any]:
        dist.barrier()
        before = _on_interface()
        result = work()
        dist.barrier()
        return _on_interface() - before, result

    def paper() -> None:
        for rows in (whole.num_edges, whole.num_edges, whole.num_atoms):
            x = torch.zeros(rows, config.emb_size_edge, device=world.device, requires_grad=True)
            sum_over_parts(x, group, "paper").sum().backward()

    wire, tallies = on_wire(lambda: step(model, graph, group))
    paper_wire, _ = on_wire(paper)
    gathered = gather_over_ranks(
        [(tuple(site), tally.calls, tally.bytes, tally.seconds) for site, tally in tallies.items()]
    )
    sums: Counter[Site] = Counter()
    calls: Counter[Site] = Counter()
    waited: Counter[Site] = Counter()
    for site, number, sent, seconds in (row for rank in gathered for row in rank):
        sums[Site(*site)] += sent
        calls[Site(*site)] += number
        waited[Site(*site)] += seconds
    if world.is_main:
        found = {
            "block": of_block(sums),
            "calls": of_block(calls),
            "seconds_waited": of_block(waited),
            "all": sum(sums.values()),
            "wire": {"owner": wire, "paper": paper_wire},
        }
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_rank(given["model"], given["atoms"])
