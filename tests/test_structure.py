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
    "experiment": {"experiment"},
    "classification": {"classification", "experiment", "lowrank"},
    "segmentation": {"segmentation", "experiment", "lowrank"},
    "report": {"report", "experiment", "lowrank"},
    "benchmarks": {"benchmarks", "classification", "segmentation", "experiment", "lowrank"},
}
# Inside the core, a module imports only modules that stand before it.
CORE_ORDER = (
    *("errors", "padding", "tucker", "geometry", "activated", "bits", "recompute", "lean"),
    *("decompose", "gradients", "costs", "methods", "asi", "gradient_filter"),
    *("nodes", "sharing", "layers", "iteration", "factored_weight", "factored", "optimizer", "mixing", "attention"),
    *(
        "trace",
        "blocks",
        "convert",
        "preserve",
        "perplexity_table",
        "perplexity",
        "budget",
        "accounting",
        "meter",
        "weight_memory",
        "explain",
        "__init__",
    ),
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


def test_core_modules_import_only_modules_before_them() -> None:
    assert {path.stem for path in (ROOT / "lowrank").glob("*.py")} == set(CORE_ORDER)
    for place, name in enumerate(CORE_ORDER):
        imports = imported_modules(ROOT / "lowrank" / f"{name}.py")
        used = {module.split(".")[1] for module in imports if module.startswith("lowrank.")}
        assert used & set(CORE_ORDER) <= set(CORE_ORDER[:place]), name


def test_core_needs_nothing_but_torch_and_numpy() -> None:
    allowed = {"torch", "numpy", "lowrank", "__future__"}
    for path in (ROOT / "lowrank").glob("*.py"):
        outside = {name.partition(".")[0] for name in imported_modules(path)} - allowed
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
