"""What the cases of a large test matrix came to, from pytest's XML files; in parts, if it is run in parts.

pytest tests/distributed/test_layouts.py --junitxml=FILE -o junit_family=xunit1
python benchmarks/matrix.py FILE --test tests/distributed/test_layouts.py --out benchmarks/results/DATE-combinations-cpu
python benchmarks/matrix.py --test ... --out ... --missing > CASES; pytest @CASES --junitxml=FILE ...    # go on
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

from report import environment, table, write


def read(path: Path) -> dict[str, dict[str, float] | None]:
    """{case: deviations} of those that were run; None of those that did not pass."""
    found: dict[str, dict[str, float] | None] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name") or ""
        if "[" in name:
            values = {str(p.get("name")): float(str(p.get("value"))) for p in case.iter("property")}
            passed = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
            found[name[name.index("[") + 1 : name.rindex("]")]] = values if passed else None
    return found


def collected(test: str) -> dict[str, str]:
    """{case: what pytest calls it} of all cases, in order."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", test]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line[line.index("[") + 1 : line.rindex("]")]: line for line in lines if "[" in line}


def row_of(case: str) -> str:
    """Which row of the table a case belongs to."""
    words = case.split(", ")
    control = " (controls)" * any(word.startswith("control") for word in words)
    kind = next(word for word in words if word in ("sgd", "adamw", "fp64"))
    way = next(
        (w for w in words if w in ("double_backward", "reverse_over_forward", "conservative", "dimenet")), "direct"
    )
    return f"{ {'sgd': 'SGD', 'adamw': 'AdamW', 'fp64': 'fp64 gradient'}[kind] }, {way.replace('_', ' ')}{control}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("xml", nargs="*", type=Path)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--missing", action="store_true", help="print the cases that have not been run, for pytest @FILE"
    )
    parser.add_argument("--commit", default="", help="what was tested")
    parser.add_argument("--note", default="", help="what to know of this part")
    args = parser.parse_args()
    kept: dict[str, Any] = {"parts": [], "passed": {}}
    if args.out.with_suffix(".json").exists():
        kept = json.loads(args.out.with_suffix(".json").read_text())
    every = collected(args.test)
    if not args.xml and not args.missing:
        parser.error("give the XML file of a run, or --missing")
    if args.missing:
        print("\n".join(line for case, line in every.items() if case not in kept["passed"]))
        return
    for path in args.xml:
        run = {case: values for case, values in read(path).items() if case in every}
        passed = {case: values for case, values in run.items() if values is not None}
        kept["passed"] = {case: values for case, values in kept["passed"].items() if case not in run} | passed
        kept["parts"].append(
            {**environment("cpu"), "commit": args.commit, "run": len(run), "passed": len(passed), "note": args.note}
        )
    groups: dict[str, list[str]] = defaultdict(list)
    for case in every:
        groups[row_of(case)].append(case)
    rows = []
    for name, cases in sorted(groups.items()):
        done = [kept["passed"][case] for case in cases if case in kept["passed"]]
        columns = sorted({column for values in done for column in values})
        extreme = min if "control" in name else max
        worst = "; ".join(f"{c}: {extreme(values[c] for values in done):.1e}" for c in columns)
        rows.append((name, len(cases), len(done), worst))
    passed = sum(case in kept["passed"] for case in every)
    facts = f"{passed} of {len(every)} cases have been run and passed, in {len(kept['parts'])} part(s)."
    results = {"environment": kept["parts"][-1], **kept}
    title = f"Every case of {args.test}"
    write(args.out, title, [facts, table(["", "cases", "passed", "largest (of controls: smallest)"], rows)], results)


if __name__ == "__main__":
    main()
