"""What `pip install .` brings: the library alone; and what the suite's own environment has beside it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.kernels import build

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index"]


def test_the_distribution_lists_every_package_of_the_library_and_nothing_else() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not {"entry-points", "scripts", "gui-scripts"} & settings["project"].keys()
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lowrank").rglob("__init__.py")}
    listed = settings["tool"]["setuptools"]
    assert sorted(listed["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    assert listed.keys() == {"packages", "package-data", "dynamic"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, the source distribution, and in `again` the wheel that is built from that."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT / "lowrank", source / "lowrank", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as build; build.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    for place, what in ((folder, source), (folder / "again", archive)):
        subprocess.run([*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", place, what], check=True)
    return folder


@pytest.mark.slow
def test_a_wheel_of_the_library_declares_no_entry_point_and_is_that_of_the_source_distribution(built: Path) -> None:
    (wheel,), (again,) = built.glob("*.whl"), (built / "again").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    version = lowrank.__version__
    assert {name.partition("/")[0] for name in names} == {"lowrank", f"lowrank-{version}.dist-info"}
    compiled = {f"lowrank/kernels/{name}" for name in (*build.SOURCES, *build.HEADERS)}
    assert {"lowrank/py.typed", *compiled} <= set(names)
    assert not [name for name in names if name.endswith("entry_points.txt")]
    assert sorted(names) == sorted(zipfile.ZipFile(again).namelist())
    with tarfile.open(built / f"lowrank-{version}.tar.gz") as archive:
        assert f"lowrank-{version}/lowrank/lightning.py" in archive.getnames()


@pytest.mark.slow
def test_in_a_fresh_environment_the_wheel_is_the_library(built: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    python = fresh / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    subprocess.run([*PIP, "--python", python, "install", *OFFLINE, wheel], check=True)
    (packages,) = fresh.glob("lib/*/site-packages")
    # torch and numpy from here, behind everything of the environment's own; nothing that was installed to be edited.
    (packages / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    code = """
import lowrank, torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
lowrank.convert(model, lowrank.trailing_layers(model, 2), lowrank.ASI(2))
model(torch.randn(2, 3, 8, 8)).sum().backward()
print(lowrank.__file__, lowrank.__version__, model[0].weight.grad is not None)
"""
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(packages / "lowrank" / "__init__.py"), lowrank.__version__, "True"]


def test_the_extras_are_what_is_pinned() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings["dynamic"] == ["version"]
    extras = settings["optional-dependencies"]
    assert extras.keys() == {"suite", "segmentation", "dev"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    library = [name.partition(">=")[0] for name in settings["dependencies"]]
    assert sorted(pinned) == sorted([*library, *(name for names in extras.values() for name in names)])


def test_the_installed_library_declares_no_entry_point() -> None:
    assert not importlib.metadata.distribution("lowrank").entry_points


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torch", "torchvision"])
def test_torchvision_is_importable_whatever_is_imported_first(first: str) -> None:
    names = in_a_process(f"import {first}, torch, torchvision; print(torchvision.models.__name__)").split()
    assert names == ["torchvision.models"]


@pytest.mark.slow
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
