"""The house rules that code can check: which package may import which, and what no file may say."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lowrank", "experiment", "classification", "segmentation", "report", "benchmarks")
MAY_IMPORT = {
    "lowrank": {"lowrank"},
    "experiment": {"experiment", "lowrank"},
    "classification": {"classification", "experiment", "lowrank"},
    "segmentation": {"segmentation", "experiment", "lowrank"},
    "report": {"report", "experiment", "lowrank"},
    "benchmarks": {"benchmarks", "classification", "segmentation", "experiment", "lowrank"},
}
# The rooms of the core, from the bottom: a room imports from itself and from those below it.
ROOMS = (
    "errors",
    "kernels",
    "tensors",
    "methods",
    "exact",
    "layers",
    "conversion",
    "ranks",
    "meters",
    "optim",
    "__init__",
    "lightning",
    "transformers",
)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", [name for name in PACKAGES if (ROOT / name).exists()])
def test_packages_import_only_what_stands_below_them(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        own = {name.partition(".")[0] for name in imported_modules(path)} & set(PACKAGES)
        assert own <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {own - MAY_IMPORT[package]}"


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lowrank").parts[0].removesuffix(".py")


def test_a_room_of_the_core_imports_only_rooms_below_it() -> None:
    for path in (ROOT / "lowrank").rglob("*.py"):
        used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("lowrank.")} & set(ROOMS)
        above = set(ROOMS[ROOMS.index(room_of(path)) + 1 :])
        assert not used & above, f"{path.relative_to(ROOT)} imports {used & above}"
    assert not {"methods", "exact"} & {
        name.split(".")[1]
        for path in (ROOT / "lowrank").rglob("*.py")
        for name in imported_modules(path)
        if room_of(path) in {"methods", "exact"} and name.startswith("lowrank.") and name.split(".")[1] != room_of(path)
    }


ALLOWED = {"torch", "numpy", "lowrank", "__future__"}
# What is imported where a user asks for it; nothing else of the core imports these two files.
BRIDGES = {  # where something else is needed, and nowhere imported unless it is there
    "lightning.py": {"lightning", "pytorch_lightning"},
    "transformers.py": {"transformers"},
    **{f"kernels/{name}.py": {"triton"} for name in ("gpu", "gpu_int8", "gpu_subspace")},
}


def test_core_needs_nothing_but_torch_and_numpy() -> None:
    for path in (ROOT / "lowrank").rglob("*.py"):
        bridged = BRIDGES.get(str(path.relative_to(ROOT / "lowrank")), set())
        outside = {name.partition(".")[0] for name in imported_modules(path)} - ALLOWED - bridged
        standard = {name for name in outside if name in __import__("sys").stdlib_module_names}
        assert outside == standard, f"{path.name} imports {outside - standard}"


def test_every_requirement_is_pinned_with_a_reason() -> None:
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement, _, reason = line.partition("#")
            assert "==" in requirement, line
            assert reason.strip(), line


def test_no_tracked_file_is_large_or_vaguely_named() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in listing.stdout.splitlines():
        path = ROOT / name
        assert path.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}, name
        assert not path.exists() or path.stat().st_size < 2**20, name
