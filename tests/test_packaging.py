"""What `pip install .` brings: the library alone; and what the suite's own environment has beside it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_the_distribution_lists_every_package_of_the_library_and_nothing_else() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not {"entry-points", "scripts", "gui-scripts"} & settings["project"].keys()
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lowrank").rglob("__init__.py")}
    listed = settings["tool"]["setuptools"]
    assert sorted(listed["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    assert listed.keys() == {"packages", "package-data"}


def test_a_wheel_of_the_library_declares_no_entry_point(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "lowrank", source / "lowrank", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"lowrank", "lowrank-0.1.0.dist-info"}
    assert {"lowrank/py.typed", "lowrank/kernels/kernels.c"} <= set(names)
    assert not [name for name in names if name.endswith("entry_points.txt")]


def test_the_installed_library_declares_no_entry_point() -> None:
    assert not importlib.metadata.distribution("lowrank").entry_points


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["torch", "torchvision"])
def test_torchvision_is_importable_whatever_is_imported_first(first: str) -> None:
    names = in_a_process(f"import {first}, torch, torchvision; print(torchvision.models.__name__)").split()
    assert names == ["torchvision.models"]


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="this torch loads torchvision's operators")
def test_without_cuda_operators_are_declared_once_and_still_raise() -> None:
    names = [point.name for point in importlib.metadata.entry_points(group="torch.backends")]
    assert names.count("torchvision_on_cpu") == 1
    code = """
import torch, torchvision, torchvision_on_cpu
torchvision_on_cpu.declare_missing_operators()
assert "iou_threshold" in str(torch.ops.torchvision.nms.default._schema)
try:
    torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
except (NotImplementedError, RuntimeError) as error:
    print("raised")
"""
    assert in_a_process(code) == "raised\n"
