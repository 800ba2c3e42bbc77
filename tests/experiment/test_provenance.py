import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from experiment import fingerprint, provenance
from experiment.provenance import CODE, code_version, plain, untold

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path):
    """A copy of two of the packages, outside of any repository."""
    for package in ("experiment", "classification"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(tree):
    path = tree / "classification" / "data" / "digits.py"
    path.write_text(path.read_text() + "# changed\n")


def add(tree):
    (tree / "experiment" / "new.py").touch()


def rename(tree):
    path = tree / "experiment" / "record.py"
    path.rename(path.with_name("records.py"))


def remove(tree):
    (tree / "experiment" / "record.py").unlink()


@pytest.mark.parametrize("change", [edit, add, rename, remove])
def test_the_code_version_changes_with_the_sources(tree, change):
    before = code_version(tree)
    change(tree)
    assert code_version(tree) != before


def test_the_code_version_is_that_of_the_sources_alone(tree, tmp_path):
    before = code_version(tree)
    (tree / "experiment" / "__pycache__").mkdir()
    (tree / "experiment" / "__pycache__" / "record.pyc").touch()
    (tree / "notes.md").touch()
    assert code_version(tree) == before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for package in ("experiment", "classification"):
        shutil.copytree(tree / package, elsewhere / package)
    assert code_version(elsewhere) == before


def test_all_packages_that_make_numbers_are_in_the_code_version():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"report", "benchmarks", "tests"} <= set(CODE)


def test_the_fingerprint_depends_on_content_order_and_cuts():
    parts = [[b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"], [b"ab", b"c", b""], [], [b""]]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    assert fingerprint(iter([b"ab", b"c"])) == fingerprint([b"ab", b"c"])


def test_the_fingerprint_changes_with_one_pixel():
    images = np.zeros((10, 8, 8), dtype=np.uint8)
    before = fingerprint([images])
    images[9, 7, 7] = 1
    assert fingerprint([images]) != before


def test_the_provenance_names_config_code_data_packages_hardware_and_allocator():
    found = provenance("config", "data", "default")
    assert found["config_hash"] == "config"
    assert found["data_fingerprint"] == "data"
    assert found["allocator"] == "default"
    assert found["code_version"] == code_version(ROOT)
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["numpy"] == version("numpy")
    assert found["hardware"].endswith("threads") or torch.cuda.is_available()


def test_all_settings_are_told_here_or_there():
    identity = {
        "a": {"b": [1, 2], "c": None, "d": {}},
        "hooks": [{"layers": ["x"]}, {"layers": []}],
        "long": ["x"] * 99,
    }
    found = untold(identity, {})
    assert found.pop("long") == plain(["x"] * 99)
    assert found == {"a.b": [1, 2], "a.d": {}, "hooks.0.layers": ["x"], "hooks.1.layers": []}
    assert untold(identity, {"a.b": plain([1, 2]), "hooks": plain(identity["hooks"])}).keys() == {"a.d", "long"}
    assert untold(identity, {"a.b": plain([1, 3])})["a.b"] == [1, 2]
