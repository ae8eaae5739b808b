"""Ranks that were started differently say so before they train.

Different code, versions or settings show late: as a hang where one rank enters a collective that another one does not,
or as a result that nobody can explain.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Fact = str | int | float

#: Facts that a message lists.
SHOWN = 4


def check_agreement(facts: Mapping[str, Fact], gather: Callable[[Any], list[Any]]) -> None:
    """Compare the facts of all ranks. Collective.

    Args:
        facts: of this rank, by the names that a message shall have for them.
        gather: returns the argument of every rank, in the order of ranks.

    Raises:
        ValueError: on every rank, naming what differs, the values and the ranks that have them.
    """
    # Almost always equal: one number per rank is enough to see that.
    if len(set(gather(zlib.crc32(repr(sorted(facts.items())).encode())))) == 1:
        return
    found: list[Mapping[str, Fact]] = gather(dict(facts))
    names = dict.fromkeys(name for rank in found for name in rank)
    differences = []
    for name in names:
        ranks: dict[Fact, list[int]] = {}
        for rank, theirs in enumerate(found):
            ranks.setdefault(theirs.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            differences.append(f"{name} is {_values(ranks)}")
    more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    raise ValueError(
        f"ranks disagree: {'; '.join(differences[:SHOWN])}{more} "
        "(start all ranks from the same environment, with the same configuration)"
    )


def run_facts(config: Mapping[str, Any], deepspeed: Mapping[str, Any], **others: Fact) -> dict[str, Fact]:
    """What must be the same on every rank: versions, settings, source files.

    Args:
        config: the run's configuration, resolved.
        deepspeed: DeepSpeed's.
        others: further facts, by name.
    """
    return {
        **{name: _version(name) for name in ("egnscale", "torch", "deepspeed")},
        "python": platform.python_version(),
        "default dtype": str(torch.get_default_dtype()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        **others,
        **_flat(config),
        **_flat({"deepspeed_config": deepspeed}),
        **source_facts(),
    }


def source_facts() -> dict[str, Fact]:
    """A checksum of each of egnscale's source files."""
    root = Path(__file__).parents[1]
    files = (
        path for folder in ("models", "scaling", "data", "launch") for path in sorted((root / folder).glob("*.py"))
    )
    return {f"{path.parent.name}/{path.name} (checksum)": f"{zlib.crc32(path.read_bytes()):08x}" for path in files}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Fact]:
    """`{"optim": {"eps": 1e-8}}` as `{"optim.eps": "1e-08"}`."""
    flat: dict[str, Fact] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def _values(ranks: Mapping[Fact, list[int]]) -> str:
    """`0.1 on rank 2 and 0.2 on the other 3`; without one value that most ranks have, all ranks are listed."""
    *few, most = sorted(ranks, key=lambda value: (len(ranks[value]), -ranks[value][0]))
    if len(ranks[few[-1]]) == len(ranks[most]):
        parts = [f"{value} on {_ranks(theirs)}" for value, theirs in ranks.items()]
    else:
        parts = [f"{value} on {_ranks(ranks[value])}" for value in few] + [f"{most} on the other {len(ranks[most])}"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
