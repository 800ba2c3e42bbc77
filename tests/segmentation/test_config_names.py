"""A name in a config that nothing reads and that is nearly one that is read is a typo; others are variables."""

import inspect
import re

import pytest
from mmengine.runner import Runner

from experiment import ExperimentError
from segmentation.cli import main
from segmentation.compose import CONFIGS, load_config
from segmentation.config_names import RUNNER

BASE = "norm_cfg = dict(type='BN')\nmodel = dict(type='A', norm=norm_cfg)\ntrain_cfg = dict(max_iters=1)\n"
TYPOS = {
    "optim_wraper": "optim_wrapper",
    "trian_cfg": "train_cfg",
    "custom_hook": "custom_hooks",
    "modle": "model",
    "train_dataloder": "train_dataloader",
    "randomnes": "randomness",
    "perplexitiy": "perplexity",
    "norm_cgf": "norm_cfg",  # of the config below it
}
VARIABLES = ("ROOT = 1", "data_root = 'x'", "num_classes = 2", "train_pipeline = []", "meta = {}", "backbone_norm = 1")


@pytest.fixture
def below(tmp_path):
    (tmp_path / "below.py").write_text(BASE)
    return tmp_path


@pytest.mark.parametrize("name", TYPOS)
@pytest.mark.parametrize("kind", ["py", "yaml", "merged"])
def test_a_typo_is_refused_with_the_name_that_is_near(name, kind, below, capsys):
    path = below / f"own.{'yaml' if kind == 'yaml' else 'py'}"
    text = {"py": f"_base_ = 'below.py'\n{name} = dict()\n", "yaml": f"_base_: below.py\n{name}: {{}}\n"}
    path.write_text(text.get(kind, f"{name} = dict()\n"))
    files = [str(below / "below.py"), str(path)] if kind == "merged" else [str(path)]
    assert main(["train", *files, "--runs-dir", str(below / "runs")]) == 2
    said = f"error: config {path} sets {name!r}, which nothing reads; mend it if it is to be {TYPOS[name]!r}, or "
    assert re.fullmatch(re.escape(said) + "[^\n]*\n", capsys.readouterr().err)
    assert not (below / "runs").exists()


@pytest.mark.parametrize("line", [*VARIABLES, "norm_cgf = dict(type='SyncBN')\nmodel = dict(norm=norm_cgf)"])
def test_variables_are_not(line, below):
    (below / "own.py").write_text(f"_base_ = 'below.py'\n{line}\n")
    assert line.partition(" ")[0] in load_config([below / "own.py"])


def test_a_variable_is_set_only_ahead_of_what_is_made_of_it(below):
    files = [below / name for name in ("below.py", "own.py")]
    files[1].write_text("norm_cfg = dict(type='SyncBN')\n")
    with pytest.raises(ExperimentError, match=r"own\.py sets 'norm_cfg', a variable .* would have no effect"):
        load_config(files)
    files[1].write_text("norm_cfg = dict(type='BN')\n")  # as it was
    assert load_config(files).model.norm == {"type": "BN"}
    files[1].write_text("norm_cfg = dict(type='SyncBN')\nmodel = dict(norm=norm_cfg)\n")
    assert load_config(files).model.norm == {"type": "SyncBN"}


def test_the_names_are_those_of_mmengine_and_no_shipped_config_has_another():
    assert {*inspect.signature(Runner.__init__).parameters} - {"self"} == RUNNER
    for path in CONFIGS.rglob("*.py"):
        load_config([path])


def test_what_a_run_wrote_down_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.yaml").write_text("modle: {}\nconfig_files: [own.py]\n")
    assert "modle" in load_config([tmp_path / "config.yaml"])
    (tmp_path / "config.yaml").write_text("modle: {}\n")
    with pytest.raises(ExperimentError, match="'modle', which nothing reads"):
        load_config([tmp_path / "config.yaml"])
