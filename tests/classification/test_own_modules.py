"""Networks of one's own beside the suite's: what is wrong with one is said in one line before a run begins."""

from __future__ import annotations

import re
import sys
import types

import pytest
from commands import arguments
from torch import nn

from classification.backbones.registry import backbone
from classification.cli import main
from classification.registry import Registry
from experiment import ExperimentError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of modules of this name, with no files."""
    made = types.ModuleType("own_modules")
    made.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "own_modules", made)
    yield made
    for name in [name for name in sys.modules if name.startswith("own_modules.")]:
        del sys.modules[name]


def test_a_module_that_cannot_be_imported_is_named(package, tmp_path):
    (tmp_path / "mine.py").write_text("import nothing_there")
    with pytest.raises(
        ExperimentError, match=r"^own_modules\.mine, whose network .*No module named 'nothing_there'.*mend"
    ):
        Registry("network", package).names()


def test_a_name_that_is_taken_is_refused(package):
    registry = Registry("network", package)
    first, second = (types.FunctionType((lambda: None).__code__, {"__name__": name}) for name in ("suites", "own"))
    registry("mcunet")(first)
    registry("mcunet")(first)  # as where a module is loaded again
    with pytest.raises(ExperimentError, match="the network 'mcunet' is in suites and in own; rename one"):
        registry("mcunet")(second)
    assert registry.entries["mcunet"] is first


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("outputs", [7, 12])
def test_a_network_of_other_outputs_than_classes_is_refused_before_it_is_trained(
    tmp_path, monkeypatch, capsys, outputs, dry
):
    def build(num_classes, pretrained):
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), *pooled)

    monkeypatch.setitem(backbone.entries, "own", build)
    assert main([*arguments("fit", tmp_path, "--model.layers", 2, "--model.backbone", "own"), *dry]) == 2
    said = rf"error: own makes \(1, {outputs}\) of an image, and not \(1, 10\), .*num_classes outputs\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_callback_that_trains_other_layers_than_the_run_says_ends_it(tmp_path, capsys, epoch):
    callback = ("--trainer.callbacks", "commands.UnfreezeInEpoch", "--trainer.callbacks.epoch", epoch)
    assert main(arguments("fit", tmp_path, "--model.layers", 2, "--trainer.max_epochs", 2, *callback)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*a callback has changed whether backbone\..* is trained; .*--model\.layers", said), said
    assert not list(tmp_path.rglob("result.json"))
