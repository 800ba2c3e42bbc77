"""Configs of one's own: what works, and what is refused in one line before anything is written."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from own_configs import dataset, settings, write_config, write_data

from experiment import ExperimentError, Record
from lowrank import PerplexityTable
from segmentation.cli import main
from segmentation.history import History


@pytest.fixture
def own(tmp_path):
    """A config for a data set of one's own; and a function that writes it, and gives a command for it."""
    root = write_data(tmp_path / "own")
    content = settings(dataset(root, "train"), dataset(root, "val"))

    def words(command="train", *more):
        return [command, write_config(tmp_path / "net.py", content), "--runs-dir", str(tmp_path / "runs"), *more]

    return content, words


def set_at(content, *path):
    """Set or, where it ends in None, delete what is at a place in a config."""
    *keys, last, value = path
    for key in keys:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


FAILING = {  # what is changed, the exit code and what is said
    "optimizer": ("train", ("optim_wrapper", "optimizer", "lrr", 0.1), 1, "lrr"),
    "layers": ("train", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), 2, "decode_head.nothing"),
    "ranks": ("train", ("custom_hooks", 0, "method", {"type": "ASI"}), 2, "ranks"),
    "layers to measure": ("measure", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), 2, "decode_head.nothing"),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_before_the_first_step_leaves_nothing_and_the_mended_command_works(name, own, tmp_path, capsys):
    command, change, code, message = FAILING[name]
    content, words = own
    before = copy.deepcopy(content)
    set_at(content, *change)
    assert main(words(command)) == code
    (line,) = errors(capsys)
    assert message in line
    assert not (tmp_path / "runs").exists()
    content.clear()
    content.update(before)
    assert main(words(command)) == 0
    if command == "train":
        assert Record.load(next(tmp_path.rglob("result.json"))).run.model == "net"


def test_a_table_that_was_measured_for_a_config_gives_its_method_ranks(own, tmp_path, capsys):
    content, words = own
    set_at(content, "custom_hooks", 0, "method", {"type": "ASI"})
    assert main(words("measure")) == 0
    table = next(tmp_path.rglob("perplexity.json"))
    budget = ["--budget-table", str(table), "--budget-mib", "0.1"]
    assert PerplexityTable.load(table).model == "net"
    assert main(words("train", *budget)) == 0
    result = next(tmp_path.rglob("result.json"))
    assert Record.load(result).run.model == "net"
    capsys.readouterr()
    assert main(["train", str(result.parent / "config.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "done already" in capsys.readouterr().out
    set_at(content, "crop_size", None)
    assert main(words("train", *budget)) == 2
    (line,) = errors(capsys)
    assert "set crop_size to the height and width" in line


NO_VALIDATION = {
    "no validation": ("train", [("val_dataloader", None), ("val_evaluator", None), ("val_cfg", None)], "val_evaluator"),
    "no loop": ("train", [("val_cfg", None)], "the config has no val_cfg, and train needs"),
    "no evaluator": ("train", [("val_evaluator", [])], "the config has no val_evaluator"),
    "another measure": ("train", [("val_evaluator", "iou_metrics", ["mDice"])], "no val_evaluator gives the mIoU"),
    "two others": (
        "train",
        [("val_evaluator", [{"type": "IoUMetric", "iou_metrics": ["mDice"]}, {"type": "IoUMetric", "prefix": "x"}])],
        "no val_evaluator gives the mIoU",
    ),
    "none before the end": ("train", [("train_cfg", "val_begin", 5)], "val_begin is 5, and the run ends at 4"),
}


@pytest.mark.parametrize("name", NO_VALIDATION)
def test_a_run_that_no_validation_would_judge_is_refused_before_it_trains(name, own, tmp_path, capsys):
    refused(*NO_VALIDATION[name], own, tmp_path, capsys)


def refused(command, changes, message, own, tmp_path, capsys, options=()):
    content, words = own
    for change in changes:
        set_at(content, *change)
    assert main(words(command, *options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "OneDL" not in line]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert not (tmp_path / "runs").exists()


def test_several_measures_are_more_than_is_needed_and_measuring_needs_none(own):
    content, words = own
    set_at(
        content,
        "val_evaluator",
        [{"type": "IoUMetric", "iou_metrics": ["mDice"], "prefix": "x"}, {"type": "IoUMetric"}],
    )
    assert main(words("train", "--dry-run")) == 0
    for part in ("val_dataloader", "val_evaluator", "val_cfg", "train_cfg", "optim_wrapper"):
        set_at(content, part, None)
    assert main(words("measure", "--dry-run")) == 0


def test_a_measure_of_ones_own_that_tells_no_miou_is_one_line(tmp_path):
    history, runner = History(tmp_path), SimpleNamespace(model=torch.nn.Linear(1, 1), iter=1)
    history.history.step_end(runner.model, 0.5)
    with pytest.raises(ExperimentError, match="gives no mIoU, by which a run is judged, but Dice, aAcc;"):
        history.after_val_epoch(runner, {"Dice": 1.0, "aAcc": 1.0})
