"""OC20's raw S2EF files: NAME.extxyz with many frames, NAME.txt with a line for each; either may be compressed (.xz).

A line is `random<sid>,frame<fid>,<reference energy>`. The reference is that of the clean slab and the adsorbate in the
gas phase, so that energy - reference is the adsorption energy, which OC20's models learn.
"""

from __future__ import annotations

import lzma
import math
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from egnscale.data.extxyz import frames, open_text, parse
from egnscale.data.sample import Sample
from egnscale.data.source import BadSample, Source, from_ase

SUFFIXES = (".extxyz", ".extxyz.xz")
_LINE = re.compile(r"(?:random)?(\d{1,18}),(?:frame)?(\d{1,18}),(\S+)")
_MAX_LINE = 1000


class OC20Raw(Source):
    """Pairs of extxyz and txt; a unit is a pair. Numbered names are in the order of their numbers.

    Args:
        path: what was asked for.
        files: the extxyz files; each has its txt beside it.
        total_energies: leave the energies as the calculator gave them.
    """

    kind = "OC20 extxyz + txt"

    def __init__(self, path: Path, files: list[Path], total_energies: bool = False) -> None:
        self.path = path
        self.files = sorted(files, key=lambda file: [_number(part) for part in re.split(r"(\d+)", file.name)])
        self.num_units = len(files)
        self._total_energies = total_energies

    @property
    def total_energies(self) -> bool:
        return self._total_energies

    def read(self, start: int, stop: int) -> Iterator[Sample | BadSample]:
        for file in self.files[start:stop]:
            labels = labels_of(file)
            if labels is None:
                yield BadSample(f"{file} has no .txt beside it", "missing record")
                continue
            yield from self._read_pair(file, labels)

    def _read_pair(self, file: Path, labels: Path) -> Iterator[Sample | BadSample]:
        number = 0
        with open_text(labels) as lines, closing(frames(file)) as texts:
            try:
                while True:
                    frame, line = next(texts, None), lines.readline(_MAX_LINE)
                    if frame is None or not line.strip():
                        break
                    try:
                        yield self._sample(frame, line, f"{file}: frame {number}")
                    except BadSample as error:
                        yield error
                    number += 1
            except (ValueError, EOFError, OSError, lzma.LZMAError) as error:
                yield BadSample(f"{file}: frame {number} and what follows cannot be read: {error}", "damaged file")
                return
        if frame is not None or line.strip():
            longer, shorter = (file, labels) if frame is not None else (labels, file)
            yield BadSample(f"{longer} has more than the {number} frames of {shorter.name}", "damaged file")

    def _sample(self, frame: str, line: str, where: str) -> Sample:
        match = _LINE.fullmatch(line.strip())
        try:
            if match is None:
                raise ValueError(f"its line {line.strip()[:60]!r} is not `random<sid>,frame<fid>,<energy>`")
            reference = float(match[3])
            if not math.isfinite(reference):
                raise ValueError(f"its reference energy is {reference}")
            atoms = parse(frame)
        except Exception as error:  # the parser lets anything out that damaged text makes it do
            raise BadSample(f"{where} cannot be read: {error}", "damaged record") from error
        atoms.info.clear()
        sample = from_ase(atoms, where, int(match[1]), int(match[2]))
        if sample.energy is None or self._total_energies:
            return sample
        return replace(sample, energy=sample.energy - reference)


def labels_of(file: Path) -> Path | None:
    """The txt file that belongs to an extxyz file; None where there is none."""
    name = file.name[: file.name.index(".extxyz")]
    return next((path for ending in (".txt", ".txt.xz") if (path := file.with_name(name + ending)).is_file()), None)


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (-1, text)
