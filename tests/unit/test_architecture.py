"""Rules of the house, checked against the files: who may import whom, and that the package list is what is on disk."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("models", "scaling", "data", "launch", "ds_configs")
#: Our own modules that a folder may import, by prefix.
ALLOWED = {
    "models": ("egnscale.models",),
    "scaling": ("egnscale.scaling", "egnscale.models.graph"),
    "data": ("egnscale.data", "egnscale.models.graph"),
    "launch": ("egnscale.",),
    "ds_configs": (),
}
DEEPSPEED_ONLY_IN = {"scaling/engine.py", "scaling/pipeline.py"}
STDLIB_AND_TORCH = sys.stdlib_module_names | {"torch", "torch_scatter"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def violations(folder: str, name: str, imported: set[str]) -> list[str]:
    bad = []
    for module in imported:
        top = module.split(".")[0]
        if top == "egnscale":
            parents = {module.rsplit(".", depth)[0] for depth in range(3)}
            if not any(parent.startswith(ALLOWED[folder]) for parent in parents if ALLOWED[folder]):
                bad.append(f"{name} imports {module}")
        elif top in FOLDERS:
            bad.append(f"{name} imports the bare {module}")
        elif top == "deepspeed" and name not in DEEPSPEED_ONLY_IN:
            bad.append(f"{name} imports deepspeed")
        elif folder == "models" and top not in STDLIB_AND_TORCH:
            bad.append(f"{name} imports {module}; models import torch only")
    return bad


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    bad = [line for path in files(folder) for line in violations(folder, str(path.relative_to(ROOT)), imports(path))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("folder", "module"),
    [
        ("models", "egnscale.data.batch"),
        ("models", "numpy"),
        ("models", "deepspeed"),
        ("data", "egnscale.models.gemnet"),
        ("scaling", "egnscale.launch.trainer"),
        ("launch", "deepspeed"),
        ("launch", "models"),
    ],
)
def test_the_rules_can_fail(folder: str, module: str) -> None:
    assert violations(folder, f"{folder}/example.py", {module})


def test_package_list_is_what_is_on_disk() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    on_disk = {
        str(Path(name).parent) for name in tracked if name.endswith("__init__.py") and not name.startswith("tests")
    }
    assert on_disk == set(FOLDERS), "folders are flat: one package each"
    assert set(setup["packages"]) == {f"egnscale.{folder}" for folder in FOLDERS}
    assert setup["package-dir"] == {f"egnscale.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_import_says_what_to_do(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].endswith(f"write `import egnscale.{folder}`")


@pytest.mark.parametrize("path", files("models"), ids=lambda path: path.name)
def test_models_mention_no_rank(path: Path) -> None:
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"rank", "world_size", "get_rank", "process_group", "all_reduce", "distributed"}
