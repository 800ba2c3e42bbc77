"""Long training on digit scenes: the commands that it does, and the table of what they leave."""

import sys

import pandas as pd
import pytest

from benchmarks import digit_scenes
from experiment import Record, Run
from experiment.history import METRICS
from segmentation.cli import parser

ACCURACY = {"vanilla": 0.84, "asi": 0.77, "asi_int8": 0.81, "asi_int8_derived_20000": 0.835}


def leave(runs, method, seed, kept, accuracy):
    """What a finished run leaves: its record and its losses."""
    tag = method if method == "vanilla" else f"{method}_1of20"
    run = Run("segmentation", "finetune", "pspnet_small", "digit_scenes_96", tag, 10, seed)
    folder = run.folder(runs)
    folder.mkdir(parents=True)
    Record(
        run=run,
        accuracy={"miou_best": accuracy + seed / 1000, "miou_last": accuracy},
        memory_bytes={"activation_formula": kept, "saved_measured": 2 * kept},
        flops={},
        time_s={},
        provenance={},
        recipe={},
    ).save(folder)
    (folder / METRICS).write_text("iteration,train_loss\n700,0.5\n800,0.25\n")


@pytest.fixture
def done(tmp_path, monkeypatch):
    """A folder of finished runs, whose commands are noted in place of being run."""
    for seed in (1, 2):
        for method, accuracy in ACCURACY.items():
            leave(tmp_path, method, seed, 2**20 if method == "vanilla" else 2**15, accuracy)
        leave(tmp_path / "parts_4", "asi_int8", seed, 2**14, 0.83)
    calls = []
    monkeypatch.setattr(digit_scenes, "command", lambda call: calls.append(call) or 0)
    out = tmp_path / "table.csv"
    words = ["digit_scenes", "--seeds", "1", "2", "--runs-dir", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    digit_scenes.main()
    return calls, out


def test_each_command_is_one_that_the_command_line_takes(done):
    sweep, *parts = done[0]
    assert sweep[0] == "sweep"
    methods = sweep[sweep.index("--methods") + 1 : sweep.index("--seeds")]
    assert methods == list(ACCURACY)
    told = [parser().parse_args(call) for call in parts]
    assert [options.command for options in told] == ["measure", "train"] * 2
    assert {options.iterations for options in told if options.command == "train"} == {4 * 800}


def test_the_table_has_the_gap_to_ordinary_training_of_the_same_seed(done):
    rows = pd.read_csv(done[1])
    assert len(rows) == 2 * (len(ACCURACY) + 1)
    lines = done[1].with_suffix(".md").read_text().splitlines()
    cells = {
        (line.split(" | ")[1], line.split(" | ")[2]): line.split(" | ") for line in lines if line.startswith("| 10 ")
    }
    assert cells["asi_int8_derived_20000", "1"][5].startswith("-0.50")
    assert cells["asi_int8", "4"][5].startswith("-1.00")
    assert cells["vanilla", "1"][5] == "-"
    assert cells["asi", "1"][7:9] == ["0.250", "1/32.0"]


def test_a_command_that_fails_ends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(digit_scenes, "command", lambda call: 1)
    monkeypatch.setattr(sys, "argv", ["digit_scenes", "--runs-dir", str(tmp_path), "--out", str(tmp_path / "t.csv")])
    with pytest.raises(SystemExit):
        digit_scenes.main()
    assert not (tmp_path / "t.csv").exists()
