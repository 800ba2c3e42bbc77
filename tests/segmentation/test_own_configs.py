"""Configs of one's own: what works, and what is refused in one line before anything is written."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from own_configs import dataset, settings, write_config, write_data

from experiment import ExperimentError, Record
from lowrank import PerplexityTable
from segmentation.cli import main, parser, task_of
from segmentation.history import History

EPOCHS = {"type": "EpochBasedTrainLoop", "max_epochs": 2}


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
def test_what_fails_before_the_first_step_leaves_nothing_and_the_mended_command_works(
    name, own, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the traceback goes
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
    record = Record.load(result)
    assert (record.run.model, record.provenance["settings"]["budget.mib"]) == ("net", 0.1)
    assert record.provenance["settings"]["budget.energies"] == list(PerplexityTable.load(table).energies)
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


REFUSED = {
    "length of epochs": ([("train_cfg", EPOCHS)], ["--iterations", "2"], "train_cfg has no max_iters; give"),
    "two lengths": (
        [],
        ["--iterations", "4", "--cfg-options", "train_cfg.max_iters=6"],
        "--iterations and --cfg-options train_cfg.max_iters both set the length of the run; give one of them",
    ),
    "a part in words": ([], ["--cfg-options", "train_cfg={'max_iters':6}"], "train_cfg is "),
    "a method in words": (
        [],
        ["--cfg-options", "custom_hooks.0.method={'type':'ASI'}"],
        "the method of LowRankHook is ",
    ),
    "unnamed data": ([], ["--data-dir", "data"], "names its data set, a folder in there, as dataset = 'NAME'"),
    "data in two folders": (
        [("dataset", "own"), ("val_dataloader", "dataset", "data_root", "elsewhere")],
        ["--data-dir", "data"],
        "whose data are below one data_root; this one has ",
    ),
    "no training data": ([("train_dataloader", None)], [], "the config has no train_dataloader.batch_size, train_data"),
    "no optimizer": ([("optim_wrapper", None)], [], "the config has no optim_wrapper, and train needs"),
    "data nowhere": (
        [("train_dataloader", "dataset", {"type": "BaseSegDataset"})],
        [],
        "train_dataloader.dataset does not say where it is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_one_line(name, own, tmp_path, capsys):
    changes, options, message = REFUSED[name]
    refused("train", changes, message, own, tmp_path, capsys, options)


def test_a_picture_has_images(tmp_path, capsys):
    assert main(["picture", str(tmp_path), "--output", str(tmp_path / "p.png"), "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: --count is 0; allowed are whole numbers from 1\n"


def test_a_schedule_gets_shorter_with_the_run_whatever_is_left_to_mmengine(own):
    content, words = own
    schedulers = [
        {"type": "LinearLR", "start_factor": 0.1, "end": 100, "by_epoch": False},
        {"type": "CosineAnnealingLR", "begin": 100, "T_max": 300, "by_epoch": False},
        {"type": "MultiStepLR", "milestones": [200, 300], "by_epoch": False},
    ]
    for given in (None, schedulers[0], schedulers):
        set_at(content, "train_cfg", {"type": "IterBasedTrainLoop", "max_iters": 400})
        if given is not None:
            set_at(content, "param_scheduler", given)
        task = task_of(parser().parse_args(words("train", "--iterations", "40")))
        assert (task.config.train_cfg.max_iters, task.config.train_cfg.val_interval) == (40, 100)
    linear, cosine, steps = task.config.param_scheduler
    assert (linear.end, cosine.begin, cosine.T_max, steps.milestones) == (10, 10, 30, [20, 30])


def test_data_in_two_folders_and_by_full_paths_are_trained_on(own, tmp_path):
    content, words = own
    set_at(content, "val_dataloader", "dataset", dataset(write_data(tmp_path / "other"), "val", rooted=False))
    assert main(words("train", "--iterations", "2")) == 0
    record = Record.load(next(tmp_path.rglob("result.json")))
    assert len(record.provenance["data_fingerprint"]) == 16
