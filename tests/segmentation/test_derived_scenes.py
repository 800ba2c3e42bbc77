"""A method with derive on a network of inverted bottlenecks: its table, its run, and that a killed one is resumed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from segmentors import files, narrow_config

from experiment import Record, Run
from experiment.sweep import SEED
from lowrank import PerplexityTable, measure_perplexity
from segmentation.batches import segmentation_loss, training_mode
from segmentation.cli import main
from segmentation.compose import load_config
from segmentation.identity import MEASURED, identity_of
from segmentation.network import prepared_model

ROOT = Path(__file__).parents[2]
NETWORK, METHOD, MIB = "deeplabv3_mbv2_small", "asi_int8_derived", 0.002
TINY = (
    *("--cfg-options", "model.backbone.widen_factor=0.1", "model.decode_head.in_channels=32"),
    *("model.decode_head.channels=8", "crop_size=(32,32)", "model.data_preprocessor.size=(32,32)"),
    *("train_dataloader.batch_size=2", "train_dataloader.dataset.dataset.pipeline.2.scale=(32,32)"),
    *("train_dataloader.dataset.dataset.pipeline.3.crop_size=(32,32)", "default_hooks.logger.interval=1"),
    *("train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2", "perplexity.energies=[0.5,0.8,0.9]"),
)
NARROW, WIDE = "backbone.layer7.0.conv.0.conv", [f"backbone.layer7.0.conv.{place}.conv" for place in (1, 2)]


def arguments(command: str, method: str, data: Path, runs: Path, *extra: str) -> list[str]:
    composed = map(str, files(NETWORK, "digit_scenes", "finetune", method))
    where = ["--layers", "10", "--data-dir", str(data), "--runs-dir", str(runs)]
    return [command, *composed, *where, *([] if command == "measure" else ["--iterations", "4"]), *extra, *TINY]


def folder(runs: Path, method: str) -> Path:
    return Run("segmentation", "finetune", NETWORK, "digit_scenes", method, 10, SEED).folder(runs)


def budget(table: Path) -> list[str]:
    return ["--budget-table", str(table), "--budget-mib", str(MIB)]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Runs with both tables, and one of the method."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(arguments("measure", "vanilla", data_dir, runs)) == 0
    assert main(arguments("measure", "vanilla", data_dir, runs, "--derive")) == 0
    table = folder(runs, "perplexity_derived") / "perplexity.json"
    assert main(arguments("train", METHOD, data_dir, runs, *budget(table))) == 0
    return runs


@pytest.mark.parametrize("derive", [0, 1, 256])
def test_a_number_that_no_table_is_measured_with_is_one_line_ahead_of_all_else(derive, data_dir, tmp_path, capsys):
    words = arguments("measure", "vanilla", data_dir, tmp_path, f"--derive={derive}", "--dry-run")
    assert main(words) == 2
    assert f"error: of the perplexity table derive is {derive}; allowed: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


@pytest.mark.slow
def test_its_table_says_what_follows_from_what_and_lies_beside_the_other(finished, data_dir, capsys):
    before, derived = (
        PerplexityTable.load(folder(finished, name) / "perplexity.json")
        for name in ("perplexity", "perplexity_derived")
    )
    assert (before.derives, derived.derives) == (False, True)
    assert [row.name for row in derived.layers if row.derived] == [NARROW]
    (narrow,) = (row for row in derived.layers if row.name == NARROW)
    assert narrow.derived.shapes.keys() >= {*WIDE}
    assert [row.mixed for row in before.layers] == [row.mixed for row in derived.layers]
    assert main([*arguments("measure", "vanilla", data_dir, finished), "perplexity.derive=True"]) == 0
    assert "done already" in capsys.readouterr().out, "the option and the setting are the same"


@pytest.mark.slow
def test_measuring_leaves_the_network_as_it_was(batch):
    config: Config = narrow_config("deeplabv3_mbv2")
    config.pop("load_from", None)
    model, names = prepared_model(config)
    training_mode(model.double())

    def described():
        loss = segmentation_loss(model, batch)
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}
        model.zero_grad()
        kinds = [(type(each), list(vars(each)), each.training) for each in model.modules()]
        return kinds, found | {f"state {name}": value.clone() for name, value in model.state_dict().items()}

    kinds, before = described()
    assert measure_perplexity(model, names, segmentation_loss, batch, derive=True).derives
    again, after = described()
    assert kinds == again
    assert list(before) == list(after)
    for name, value in before.items():
        assert value is after[name] is None or torch.equal(value, after[name]), name


def test_no_identity_of_before_knows_of_it():
    names = files(NETWORK, "digit_scenes", "finetune", "vanilla")
    usual, off, on = (
        identity_of(load_config(names, options), MEASURED)
        for options in ({}, {"perplexity.derive": False}, {"perplexity.derive": True})
    )
    assert usual == off
    assert on == {**off, "perplexity": {**off.get("perplexity", {}), "derive": True}}
    assert "derive" not in str(identity_of(load_config(names, {"perplexity.derive": True})))


@pytest.mark.slow
def test_its_run_keeps_nothing_of_what_follows_and_stays_within_the_budget(finished):
    run = folder(finished, f"{METHOD}_{MIB}mib")
    assert 0 < Record.load(run / "result.json").memory_bytes["activation_formula"] <= MIB * 2**20
    layers = {layer["name"]: layer for layer in json.loads((run / "ranks.json").read_text())["layers"]}
    assert [layers[name]["derived"] for name in WIDE] == [NARROW, NARROW]
    assert [layers[name]["activation_bytes"] for name in WIDE] == [0, 0]


@pytest.mark.slow
def test_what_it_cannot_do_without_is_one_line(finished, data_dir, tmp_path, capsys):
    table = folder(finished, "perplexity") / "perplexity.json"
    whole = folder(finished, "perplexity_derived") / "perplexity.json"
    for words, message in (
        (arguments("train", METHOD, data_dir, tmp_path, *budget(table)), "(segmentation: --derive)"),
        ([*arguments("train", METHOD, data_dir, tmp_path, *budget(whole)), "lowrank.fuse=False"], "fuse is off with"),
        ([*arguments("measure", "vanilla", data_dir, tmp_path), "perplexity.derive=yes"], "True, False and a number"),
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert list(tmp_path.rglob("result.json")) == []


# Killed when the checkpoint is written and the validation done, but its row is not.
KILL = """
import os, signal, sys
from segmentation.cli import main
from segmentation.history import History
History.after_val_epoch = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights(finished, data_dir, tmp_path, capsys):
    again = arguments(
        "train", METHOD, data_dir, tmp_path, *budget(folder(finished, "perplexity_derived") / "perplexity.json")
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILL, *again], env=environment, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    run = folder(tmp_path, f"{METHOD}_{MIB}mib")
    assert not (run / "result.json").exists()
    assert main(again) == 0
    assert "resuming" in capsys.readouterr().out
    states = [
        torch.load(path / "iter_4.pth", weights_only=False) for path in (folder(finished, f"{METHOD}_{MIB}mib"), run)
    ]
    for part in ("state_dict", "lowrank"):
        one, two = (state[part] for state in states)
        assert one
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), part


@pytest.mark.slow
def test_a_measurement_behind_a_run_in_one_process(finished, data_dir, tmp_path):
    """The run's log file is closed by then; a measurement behind it ended in an error of MMEngine's."""
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    assert main(arguments("measure", "vanilla", data_dir, tmp_path)) == 0
