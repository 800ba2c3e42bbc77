"""Configs of one's own: what works, and what is refused in one line before anything is written."""

from __future__ import annotations

import copy

import pytest
from own_configs import dataset, settings, write_config, write_data

from experiment import Record
from lowrank import PerplexityTable
from segmentation.cli import main


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
