"""What people get wrong: one clear line, an exit status that is not 0, and nothing written or changed."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import labelled, make_dataset, slab, write_config

from egnscale.data.store import Store, write_store
from egnscale.launch import Calculator
from egnscale.launch.cli import main


def fingerprint(root: Path) -> dict[str, str]:
    """Every file below a directory with the digest of its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a finished run of 4 steps."""
    root = tmp_path_factory.mktemp("made")
    make_dataset(root / "data", train=8, val=3)
    config = write_config(root / "config.yaml", root / "data", root / "run")
    assert main(["train", str(config), "optim.max_steps=4", "data.workers=0", "--json"]) == 0
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    root = tmp_path / "place"
    shutil.copytree(made, root)
    config = (root / "config.yaml").read_text().replace(str(made), str(root))
    (root / "config.yaml").write_text(config)
    return root


def checkpoint(place: Path) -> Path:
    return place / "run" / "checkpoints" / "step_00000004"


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def train(*overrides: str) -> Callable[[Path], list[str]]:
    return lambda place: ["train", f"{place}/config.yaml", f"task.output={place}/new", "data.workers=0", *overrides]


def resume(*overrides: str) -> Callable[[Path], list[str]]:
    return lambda place: ["train", f"{place}/config.yaml", "data.workers=0", "--resume", *overrides]


def evaluate(place: Path) -> list[str]:
    return ["evaluate", f"{place}/run", f"{place}/data/s2ef/val_id"]


def relax(*more: str) -> Callable[[Path], list[str]]:
    return lambda place: ["relax", f"{place}/run", f"{place}/data/s2ef/val_id", f"{place}/new", *more]


def relax_file(name: str) -> Callable[[Path], list[str]]:
    return lambda place: ["relax", f"{place}/run", f"{place}/{name}", f"{place}/new"]


def evaluate_with(*more: str) -> Callable[[Path], list[str]]:
    return lambda place: [*evaluate(place), *more]


def nothing(place: Path) -> None:
    pass


def truncate(name: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        file = place / name
        os.truncate(file, file.stat().st_size // 2)

    return spoil


def alien_lmdb(place: Path) -> None:
    store = place / "data" / "s2ef" / "train"
    (store / "data.0000.lmdb").unlink()
    environment = lmdb.open(str(store / "data.0000.lmdb"), subdir=False, lock=False, map_size=1 << 20)
    with environment.begin(write=True) as transaction:
        transaction.put(b"0", b"a pickle")
    environment.close()


def fit_manifest(place: Path, name: str) -> None:
    """Let the manifest say that a changed file is as it should be."""
    content = (checkpoint(place) / name).read_bytes()
    manifest = json.loads((checkpoint(place) / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (checkpoint(place) / "manifest.json").write_text(json.dumps(manifest))


def other_weights(place: Path) -> None:
    """Weights of another model in place of this one's."""
    file = checkpoint(place) / "model.safetensors"
    weights = load_file(file)
    weights["blocks.0.interaction.dense_ca.weight"] = torch.zeros(3, 3)
    save_file(weights, file)
    fit_manifest(place, "model.safetensors")


def other_state(place: Path) -> None:
    """A training state that lacks a parameter."""
    file = checkpoint(place) / "training" / "index.json"
    index = json.loads(file.read_text())
    index["files"].pop(min(index["files"]))
    file.write_text(json.dumps(index))
    fit_manifest(place, "training/index.json")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text) and None


def unlabelled(place: Path) -> None:
    write_store(place / "plain", [replace(labelled(slab()), energy=None, forces=None)])


def partly(*names: str) -> Callable[[Path], None]:
    """A store whose second structure lacks labels."""

    def spoil(place: Path) -> None:
        made = [labelled(slab(seed=number), sid=number) for number in range(4)]
        made[1] = replace(made[1], **dict.fromkeys(names))
        write_store(place / "partly", made)

    return spoil


def evaluate_partly(*more: str) -> Callable[[Path], list[str]]:
    return lambda place: ["evaluate", f"{place}/run", f"{place}/partly", *more]


def train_partly(*more: str) -> Callable[[Path], list[str]]:
    return lambda place: train(f"data.train={place}/partly", "optim.max_steps=4", *more)(place)


def equal_ids(place: Path) -> None:
    write_store(place / "equal", [labelled(slab(seed=seed), sid=7, fid=2) for seed in (1, 2)])


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], list[str]], str]] = {
    # the configuration
    "missing file": (nothing, lambda place: ["train", f"{place}/none.yaml"], "none.yaml"),
    "no file": (nothing, lambda place: ["train"], "CONFIG.yaml"),
    "not YAML": (write("config.yaml", "model: [1, 2"), train(), "config.yaml"),
    "not a mapping": (write("config.yaml", "42"), train(), "config.yaml"),
    "unknown key": (nothing, train("optim.batchsize=2"), "optim.batch_size"),
    "unknown section": (nothing, train("trainer.lr=1"), "trainer"),
    "wrong type": (nothing, train("optim.batch_size=four"), "optim.batch_size"),
    "malformed override": (nothing, train("optim.lr_initial"), "optim.lr_initial"),
    "unknown preset": (nothing, train("model.preset=gemnet-dx"), "gemnet-d"),
    "negative cutoff": (nothing, train("model.cutoff=-1"), "cutoff"),
    "NaN learning rate": (nothing, train("optim.lr_initial=.nan"), "lr_initial"),
    "two lengths": (nothing, train("optim.max_epochs=2"), "max_epochs"),
    "graph parallelism": (nothing, train("parallel.graph=2"), "parallel.graph"),
    "double backward, ZeRO-3": (
        nothing,
        train("model.forces=conservative", "parallel={zero: 3, second_order: double_backward}"),
        "set parallel.second_order to",
    ),
    "second order of direct forces": (
        nothing,
        train("parallel.second_order=reverse_over_forward"),
        "needs no second derivative",
    ),
    "conservative, two deviations": (
        nothing,
        train("model.forces=conservative", "task.normalizer={energy_mean: 0, energy_std: 1, force_std: 2}"),
        "both must be the same",
    ),
    "no forces": (nothing, train("model.forces=none"), "task s2ef trains forces"),
    # DeepSpeed's configuration
    "no DeepSpeed JSON": (nothing, train("--deepspeed_config", "none.json"), "none.json"),
    "bad DeepSpeed JSON": (
        write("ds.json", "{"),
        lambda place: [*train()(place), "--deepspeed_config", f"{place}/ds.json"],
        "ds.json",
    ),
    "contradiction": (
        write("ds.json", '{"gradient_clipping": 3.0}'),
        lambda place: [*train()(place), "--deepspeed_config", f"{place}/ds.json"],
        "gradient_clipping",
    ),
    "second optimizer": (
        write("ds.json", '{"optimizer": {"type": "Adam"}}'),
        lambda place: [*train()(place), "--deepspeed_config", f"{place}/ds.json"],
        "optimizer",
    ),
    # the data
    "no data": (nothing, train("data.train=nowhere"), "nowhere"),
    "truncated LMDB": (truncate("data/s2ef/train/data.0000.lmdb"), train(), "data.0000.lmdb"),
    "alien LMDB": (alien_lmdb, train(), "data.0000.lmdb"),
    "text for LMDB": (write("data/s2ef/train/data.0000.lmdb", "hello"), train(), "data.0000.lmdb"),
    "damaged metadata": (truncate("data/s2ef/train/metadata.json"), train(), "metadata.json"),
    "damaged columns": (truncate("data/s2ef/train/metadata.npz"), train(), "metadata.npz"),
    "unknown element": (nothing, train("model.num_elements=10"), "num_elements"),
    "no labels": (unlabelled, lambda place: ["evaluate", f"{place}/run", f"{place}/plain"], "no energy and no forces"),
    "some energies": (
        partly("energy", "forces"),
        evaluate_partly(),
        "partly: 1 of 4 structures have no energy, which s2ef needs; make a store without them",
    ),
    "some energies, predictions": (partly("energy"), evaluate_partly("--predictions", "x.npz"), "1 of 4 structures"),
    "some energies, training": (partly("energy"), train_partly(), "1 of 4 structures have no energy"),
    "some relaxed energies": (
        lambda place: write_store(
            place / "partly", [replace(labelled(slab(), sid=i), energy_relaxed=[1.0, None][i]) for i in range(2)]
        ),
        evaluate_partly("--task", "is2re"),
        "1 of 2 structures have no energy_relaxed, which is2re needs",
    ),
    "some forces": (partly("forces"), evaluate_partly(), "sid 1 fid 0 has no forces, unlike others"),
    "some forces, workers": (
        partly("forces"),
        evaluate_partly("--workers", "1"),
        "evaluate: sid 1 fid 0 has no forces",
    ),
    "some forces, training": (partly("forces"), train_partly(), "sid 1 fid 0 has no forces, unlike others"),
    "some forces, predictions": (
        partly("forces"),
        evaluate_partly("--predictions", "x.npz"),
        "sid 1 fid 0 has no forces",
    ),
    "equal ids": (
        equal_ids,
        lambda place: ["evaluate", f"{place}/run", f"{place}/equal", "--predictions", f"{place}/x.npz"],
        "equal: two structures are called 7_2 (sid_fid)",
    ),
    "no store": (nothing, lambda place: ["data", "info", f"{place}/run"], "run"),
    # the run
    "existing run": (nothing, lambda place: ["train", f"{place}/config.yaml"], "--resume"),
    "a file in the way": (write("new", "here"), train(), "new"),
    "another model": (nothing, resume("model.emb_size_edge=16"), "emb_size_edge"),
    "another batch": (nothing, resume("optim.batch_size=3"), "optim.batch_size=2"),
    "another accumulation": (nothing, resume("optim.gradient_accumulation=2"), "gradient_accumulation"),
    "another optimizer": (nothing, resume("optim.amsgrad=true"), "amsgrad"),
    "state on NVMe": (
        write("ds.json", '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}'),
        lambda place: [*train("parallel.zero=3")(place), "--deepspeed_config", f"{place}/ds.json"],
        "NVMe",
    ),
    "NaN loss": (nothing, train("optim.lr_initial=1e30", "optim.clip_grad_norm=null", "optim.max_steps=8"), "sid"),
    # checkpoints
    "no checkpoint": (nothing, lambda place: ["evaluate", f"{place}/none", f"{place}/data"], "none"),
    "no checkpoint here": (nothing, lambda place: ["evaluate", f"{place}/data", f"{place}/data"], "no checkpoint"),
    "latest names nothing": (write("run/checkpoints/latest", "step_9"), evaluate, "step_9"),
    "truncated weights": (truncate("run/checkpoints/step_00000004/model.safetensors"), evaluate, "model.safetensors"),
    "truncated state": (truncate("run/checkpoints/step_00000004/run.json"), resume("optim.max_steps=6"), "run.json"),
    "truncated training state": (
        truncate("run/checkpoints/step_00000004/training/00000.safetensors"),
        resume("optim.max_steps=6"),
        "00000.safetensors",
    ),
    "other training state": (other_state, resume("optim.max_steps=6"), "lacks model."),
    "old checkpoint": (
        lambda place: rewrite(checkpoint(place) / "manifest.json", '"format": 2', '"format": 1'),
        resume("optim.max_steps=6"),
        "format 1",
    ),
    "other weights": (other_weights, evaluate, "dense_ca"),
    "nothing to evaluate on": (nothing, lambda place: ["evaluate", f"{place}/run", f"{place}/run"], "val_"),
    "batch of none": (nothing, lambda place: [*evaluate(place), "--batch-size", "0"], "--batch-size"),
    "none of them": (nothing, evaluate_with("--max-structures", "0"), "--max-structures"),
    "not npz": (nothing, evaluate_with("--predictions", "out.csv"), ".npz"),
    "relaxations of s2ef": (nothing, evaluate_with("--out", "new"), "--out"),
    "reference of s2ef": (nothing, evaluate_with("--reference", "emt"), "--reference is for --task is2rs"),
    "two references": (
        nothing,
        evaluate_with("--task", "is2rs", "--reference", "emt", "--reference-results", "x.traj"),
        "give one",
    ),
    "steps of s2ef": (nothing, evaluate_with("--steps", "9"), "--steps is for relaxations"),
    "fmax of s2ef": (nothing, evaluate_with("--fmax", "0.1"), "--fmax is for relaxations"),
    "dtype of s2ef": (nothing, evaluate_with("--dtype", "float64"), "--dtype is for relaxations"),
    "all atoms of is2re": (nothing, evaluate_with("--task", "is2re", "--all-atoms"), "--all-atoms is for --task s2ef"),
    "workers of is2rs": (nothing, evaluate_with("--task", "is2rs", "--workers", "2"), "--workers is for --task s2ef"),
    "precision of is2rs": (
        nothing,
        evaluate_with("--task", "is2rs", "--full-precision", "--predictions", "x.npz"),
        "--full-precision is for --task s2ef",
    ),
    "precision of nothing": (nothing, evaluate_with("--full-precision"), "--full-precision is for the forces in"),
    "no results": (nothing, evaluate_with("--task", "is2rs", "--reference-results", "x.traj"), "x.traj does not exist"),
    "shared graphs": (nothing, evaluate_with("--task", "is2rs", "--graph", "2"), "--graph"),
    "no relaxed structures": (nothing, evaluate_with("--task", "is2rs"), "positions_relaxed"),
    "no relaxed energies": (nothing, evaluate_with("--task", "is2re"), "energy_relaxed"),
    # relaxations
    "no structures": (nothing, relax_file("none.traj"), "none.traj does not exist"),
    "empty file": (write("in.extxyz", ""), relax_file("in.extxyz"), "in.extxyz"),
    "no structure file": (write("in.traj", "hello"), relax_file("in.traj"), "in.traj cannot be read as structures"),
    "another type of file": (nothing, relax_file("config.yaml"), "config.yaml cannot be read as structures: Unknown"),
    "a directory": (nothing, relax_file("run"), "run"),
    "damaged store": (
        truncate("data/s2ef/val_id/metadata.json"),
        relax(),
        "metadata.json",
    ),
    "results in the way": (write("new", "here"), relax(), "new is a file"),
    "something in the way": (
        nothing,
        lambda place: [*relax()(place)[:3], f"{place}/data"],
        "holds no relaxations",
    ),
    "negative fmax": (nothing, relax("--fmax", "-1"), "fmax"),
    "no step": (nothing, relax("--maxstep", "0"), "maxstep"),
    "no memory": (nothing, relax("--memory", "0"), "memory"),
    "relax none": (nothing, relax("--batch-size", "0"), "--batch-size"),
    "unknown device": (nothing, relax("--device", "quantum"), "--device quantum"),
    # making data
    "too few systems": (nothing, lambda place: ["data", "make", f"{place}/new", "--structures", "3"], "3"),
    "unknown metal": (nothing, lambda place: ["data", "make", f"{place}/new", "--metals", "Cu,Xx"], "Xx"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, command, expected = CASES[case]
    spoil(place)
    before = fingerprint(place)
    capfd.readouterr()
    status = main(command(place))
    out, err = capfd.readouterr()
    assert status != 0
    lines = [line for line in err.splitlines() if line.startswith("egnscale")]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert expected in lines[0]
    assert "Traceback" not in err
    assert "--debug shows" not in lines[0], f"an error of the program, not of its user: {lines[0]}"
    assert not out.strip()
    after = fingerprint(place)
    if case in ("NaN loss", "some forces, training"):
        # It had begun to train: what it wrote stays, and holds no checkpoint.
        after = {name: digest for name, digest in after.items() if not name.startswith("new/")}
        assert not list(place.glob("new/checkpoints/step_*"))
    assert after == before


def test_the_healthy_place_is_accepted(place: Path) -> None:
    """The cases above fail for what was spoiled, not by themselves."""
    assert main([*evaluate(place), "--json"]) == 0
    assert main([*relax("--steps", "1", "--device", "cpu")(place), "--json"]) == 0
    assert main([*resume("optim.max_steps=5")(place), "--json"]) == 0


@pytest.mark.parametrize("words", [["trian"], ["train", "--resum", "x", "--nope"], ["data"], ["evaluate"], []])
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2


STRUCTURES = {
    "NaN position": (lambda atoms: atoms.positions.__setitem__((2, 1), np.nan), "positions"),
    "infinite cell": (lambda atoms: atoms.cell.__setitem__((0, 0), np.inf), "cell"),
    "zero cell": (lambda atoms: atoms.set_cell(np.zeros((3, 3))), "cell"),
    "flat cell": (lambda atoms: atoms.cell.__setitem__(1, atoms.cell[0]), "cell"),
    "unknown element": (lambda atoms: atoms.numbers.__setitem__(0, 92), "92"),
    "no element": (lambda atoms: atoms.numbers.__setitem__(0, 0), "atomic number 0"),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_that_make_no_sense(case: str, made: Path) -> None:
    spoil, expected = STRUCTURES[case]
    atoms = slab()
    atoms.calc = Calculator(made / "run", device="cpu")
    assert np.isfinite(atoms.get_potential_energy())
    spoil(atoms)
    with pytest.raises(ValueError, match=expected):
        atoms.get_forces()


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from egnscale.launch.cli import main
sys.exit(main(sys.argv[1:]))
"""


def limited(limit: int, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command that cannot write a file beyond `limit` bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(limit=limit), *words], capture_output=True, text=True, check=False
    )


def test_full_disk_leaves_the_last_checkpoint(place: Path) -> None:
    before = fingerprint(place / "run" / "checkpoints")
    largest = max(path.stat().st_size for path in checkpoint(place).rglob("*"))
    result = limited(largest // 2, resume("optim.max_steps=6")(place))
    assert result.returncode == 1, result.stderr
    assert "was not written" in result.stderr.splitlines()[-1]
    assert fingerprint(place / "run" / "checkpoints") == before
    assert main([*resume("optim.max_steps=6")(place), "--json"]) == 0


def test_full_disk_while_making_data(tmp_path: Path) -> None:
    words = ["data", "make", str(tmp_path / "new"), "--structures", "20", "--size", "2x2x3", "--max-steps", "2"]
    result = limited(20_000, words)
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("egnscale data:"), result.stderr
    # Stores that are there are whole; the same command goes on from them.
    for metadata in tmp_path.glob("new/s2ef/*/metadata.json"):
        Store(metadata.parent).verify()
    assert main(words) == 0
    assert main(["data", "info", str(tmp_path / "new"), "--verify"]) == 0


def test_limit_is_in_force() -> None:
    """The two tests above rest on it."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
