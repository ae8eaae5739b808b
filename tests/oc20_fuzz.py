"""Import mutated OC20 checkpoints and say what came of it, as JSON: `python oc20_fuzz.py COUNT SEED DIRECTORY`.

A process of its own, so that a crash is seen from outside, with little memory to spare, so that a file that claims much
cannot have it. Mutations are of the file (bits, cuts), of the pickle within it with checksums put right, of the content
(shapes, types, settings, whatever else anywhere), and payloads that would run a command if they were unpickled.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from egnscale.launch.checkpoint_info import describe
from egnscale.launch.oc20_export import export_oc20, public_state
from egnscale.launch.oc20_import import import_oc20
from egnscale.launch.oc20_settings import to_public_settings
from egnscale.launch.run_files import load_trained
from egnscale.models import build_model

#: What no reading of a file does.
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
SPARE_MEMORY = 1 << 30  #: bytes
_GEMNET = "num_blocks emb_size_atom emb_size_edge emb_size_trip emb_size_bil_trip emb_size_rbf emb_size_cbf num_radial"
_DIMENET = "num_blocks hidden_channels out_emb_channels int_emb_size basis_emb_size num_spherical num_radial"
MODELS: tuple[dict[str, Any], ...] = (
    dict(zip(_GEMNET.split(), (1, 3, 4, 3, 2, 2, 2, 5), strict=True))
    | {"num_spherical": 3, "num_atom": 1, "num_after_skip": 1, "num_elements": 6, "symmetrize": "oc20"},
    dict(zip(_DIMENET.split(), (1, 4, 3, 2, 2, 3, 3), strict=True)) | {"num_output_layers": 1, "angles": "detached"},
)


class Payload:
    """Runs a command if it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch {self.canary}",)


def content(model: dict[str, Any]) -> dict[str, Any]:
    made = build_model(**model)
    public = public_state(made.state_dict(), made.config)
    names = [name for name in public if ".seq_energy." not in name and not name.endswith((".offset", ".scale_factor"))]
    moments = {"mean": torch.tensor(0.5), "std": torch.tensor(2.0)}
    return {
        "epoch": 1.0,
        "step": 5,
        "state_dict": OrderedDict((f"module.{name}", value) for name, value in public.items()),
        "ema": {"decay": 0.9, "shadow_params": [public[name].clone() for name in names]},
        "normalizers": {"target": dict(moments), "grad_target": {**moments, "mean": torch.tensor(0.0)}},
        "config": {"model": to_public_settings(made.config), "dataset": [{"target_mean": 0.0, "target_std": 1.0}]},
        "val_metrics": {"forces_mae": {"metric": 0.1}},
    }


def saved(what: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(what, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def junk(rng: random.Random) -> Any:
    """A value that is out of place nearly everywhere."""
    itself: list[Any] = []
    itself.append(itself)
    deep: Any = ()
    for _ in range(150):
        deep = (deep,)
    return rng.choice(
        [
            *(None, True, -1, 0, 10**40, 1e308, float("nan"), float("inf"), "", "x" * 500, b"\0", [], {}, {1: 2}),
            *(itself, deep, {"mean": itself}, {"name": {}}, {None: 1}, (1, 2), "module", "gemnet_t", 2**62, 1e-320),
            *(torch.zeros(0), torch.zeros(0, 1 << 40), torch.zeros(1).expand(1 << 20), torch.ones(3, 3).t()),
            *(torch.ones(2, dtype=torch.int64), torch.tensor(float("nan")), torch.ones(1, 1, 1, dtype=torch.float64)),
            *(torch.tensor(True), torch.ones(4)[1:3], torch.full((2, 2), float("inf")), torch.tensor(-1.0)),
        ]
    )


def places(tree: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every (container, key) in the content."""
    found = [] if found is None else found
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            places(tree[key], found)
    return found


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def splice(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 8, 100))
    other = rng.randrange(len(data))
    return rng.choice(
        (
            data[:at],
            data[:at] + data[at + length :],
            data[:at] + rng.randbytes(length) + data[at:],
            data[:at] + data[other : other + length] + data[at + length :],
            data + rng.randbytes(length),
            data[:at] + bytes(length) + data[at + length :],
            data[:at] + b"\xff" * length + data[at + length :],
        )
    )


def repacked(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with its pickle changed, and checksums to match."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, value in entries.items():
            archive.writestr(name, change(value) if name.endswith("data.pkl") else value)
    return buffer.getvalue()


def mutated(rng: random.Random, canary: Path) -> tuple[str, bytes]:
    """(kind of mutation, a file)."""
    what, zipped = content(rng.choice(MODELS)), rng.random() < 0.5
    kind = rng.choice(("bits", "cuts", "pickle bits", "pickle cuts", "content", "content", "content", "payload"))
    if kind in ("content", "payload"):
        everywhere = places(what)
        for _ in range(rng.choice((1, 1, 1, 3))):
            container, key = rng.choice(everywhere)
            if isinstance(container, dict) and key not in container:
                continue  # an earlier change took it away
            value = Payload(canary) if kind == "payload" else junk(rng)
            if kind == "content" and isinstance(container[key], torch.Tensor) and rng.random() < 0.7:
                shape = list(container[key].shape) or [1]
                shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 7))
                value = torch.zeros(shape)
            if isinstance(container, dict) and rng.random() < 0.2:
                container[rng.choice(("extra", "module.extra", key))] = value
            elif isinstance(container, dict) and rng.random() < 0.1:
                del container[key]
            else:
                container[key] = value
        if kind == "payload":
            what["here"] = Payload(canary)  # what was put in may be gone again
        return kind, saved(what, zipped)
    change = flip if kind.endswith("bits") else splice
    if kind.startswith("pickle"):
        return kind, repacked(saved(what, True), lambda data: change(data, rng))
    return kind, change(saved(what, zipped), rng)


def outcome(path: Path, out: Path, rng: random.Random) -> str:
    """ "imported", "refused", or what went wrong."""
    try:
        if rng.random() < 0.3:
            describe(path)
        import_oc20(path, out)
        load_trained(out)
        if rng.random() < 0.1:
            export_oc20(out, path.with_name("again.pt"))
            path.with_name("again.pt").unlink()
    except (ValueError, OSError) as error:
        text = str(error)
        return "refused" if text and "\n" not in text and len(text) < 2000 else f"no plain line: {text[:300]}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "imported"


def run(count: int, seed: int, directory: Path) -> dict[str, Any]:
    events: list[str] = []
    sys.addaudithook(lambda event, args: events.append(event) if event in FORBIDDEN else None)
    canary, path, out = directory / "canary", directory / "file.pt", directory / "out"
    for model in MODELS:  # what they allocate once is not counted
        path.write_bytes(saved(content(model), True))
        import_oc20(path, out)
        load_trained(out)
        shutil.rmtree(out)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_MEMORY, size + SPARE_MEMORY))
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    for number in range(count):
        rng = random.Random(f"{seed}-{number}")
        torch.manual_seed(number)
        kind, data = mutated(rng, canary)
        path.write_bytes(data)
        began = time.monotonic()
        result = outcome(path, out, rng)
        slowest = max(slowest, time.monotonic() - began)
        shutil.rmtree(out, ignore_errors=True)
        left = [name for name in os.listdir(directory) if name != path.name]
        if result not in ("imported", "refused") or left or (kind == "payload" and result == "imported"):
            wrong.append(f"{number} ({kind}): {result} {left}")
        outcomes[f"{kind}: {result.split(':')[0]}"] += 1
    return {"outcomes": outcomes, "wrong": wrong, "events": events, "slowest": slowest}


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
