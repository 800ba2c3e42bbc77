"""Whole runs on small digit scenes: the record, what is skipped, refused and resumed, and the picture."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from PIL import Image
from segmentors import TINY, files

from experiment import Record, Run
from lowrank import PerplexityTable
from segmentation.cli import main
from segmentation.pictures import titles
from segmentation.training import FINAL

ROOT = Path(__file__).parents[2]
ASI = "asi_hosvd_0.8"  # with that run's memory


def arguments(command: str, method: str, data: Path, runs: Path, *extra: str) -> list[str]:
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", method))
    where = ["--layers", "10", "--data-dir", str(data), "--runs-dir", str(runs)]
    length = [] if command == "measure" else ["--iterations", "4"]
    return [
        command,
        *composed,
        *where,
        *length,
        *extra,
        *TINY,
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
    ]


def folder(runs: Path, method: str) -> Path:
    return runs / f"segmentation/finetune/pspnet_small/digit_scenes/{method}/layers10/seed233"


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Runs of HOSVD, and of ASI with its budget and a measured table."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(arguments("train", "hosvd_0.8", data_dir, runs)) == 0
    assert main([*arguments("measure", "vanilla", data_dir, runs), "perplexity.energies=[0.5,0.7,0.8,0.9]"]) == 0
    table = str(folder(runs, "perplexity") / "perplexity.json")
    budget = ("--budget-table", table, "--budget-run", str(folder(runs, "hosvd_0.8")))
    assert main(arguments("train", "asi", data_dir, runs, *budget)) == 0
    return runs


@pytest.mark.slow
def test_the_record_has_accuracies_memory_flops_and_where_they_come_from(finished):
    records = {method: Record.load(folder(finished, method) / "result.json") for method in ("hosvd_0.8", ASI)}
    for method, record in records.items():
        assert (record.run.task, record.run.method, record.run.layers) == ("segmentation", method, 10)
        assert set(record.accuracy) == {"miou_best", "miou_last", "macc_best", "macc_last"}
        assert all(0 <= value <= 1 for value in record.accuracy.values())
        assert 0 < record.memory_bytes["activation_formula"] < record.memory_bytes["saved_measured"]
        assert record.memory_bytes["saved_measured"] < record.memory_bytes["peak_measured"]
        assert min(record.flops.values()) > 0
        assert record.memory_bytes["weight_measured"] == record.memory_bytes["weight_gradient_measured"] > 0
        assert record.memory_bytes["weight_optimizer_measured"] == record.memory_bytes["weight_measured"], "momentum"
        with (folder(finished, method) / "metrics.csv").open() as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        assert record.time_s["total"] == pytest.approx(sum(seconds))
        assert 0 < record.time_s["step_median"] < record.time_s["total"] / 4
        assert len(record.provenance["data_fingerprint"]) == 16
        assert record.provenance["packages"]["onedl-mmsegmentation"] == "1.4.2"
    assert records[ASI].memory_bytes["activation_formula"] <= records["hosvd_0.8"].memory_bytes["activation_formula"]
    with (folder(finished, ASI) / "metrics.csv").open() as file:
        assert [float(row["iteration"]) for row in csv.DictReader(file)] == [2, 4]


@pytest.mark.slow
def test_the_table_is_of_the_trained_layers(finished):
    table = PerplexityTable.load(folder(finished, "perplexity") / "perplexity.json")
    assert (table.model, table.batch_shape, len(table.layers)) == ("pspnet_small", (2, 3, 32, 32), 5)
    assert table.energies == (0.5, 0.7, 0.8, 0.9)


def test_a_finished_run_is_skipped_and_starts_again_from_its_own_config(finished, data_dir, capsys):
    assert main(arguments("train", "hosvd_0.8", data_dir, finished)) == 0
    assert "done already: pspnet_small on digit_scenes" in capsys.readouterr().out
    config = folder(finished, "hosvd_0.8") / "config.yaml"
    assert main(["train", str(config), "--runs-dir", str(finished)]) == 0
    assert "done already: pspnet_small on digit_scenes" in capsys.readouterr().out
    assert main(["train", str(config), "--runs-dir", str(finished), "--seed", "7", "--dry-run"]) == 0
    assert "would run: pspnet_small on digit_scenes, setup finetune, hosvd_0.8, layers 10, seed 7" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_rows_that_were_lost_are_those_of_the_checkpoint(finished, data_dir, tmp_path):
    before, after = (folder(runs, "hosvd_0.8") for runs in (finished, tmp_path))
    shutil.copytree(before, after)
    for name in ("result.json", "metrics.csv"):
        (after / name).unlink()
    assert main(arguments("train", "hosvd_0.8", data_dir, tmp_path)) == 0
    assert (after / "metrics.csv").read_text() == (before / "metrics.csv").read_text()


def test_stock_mmsegmentation_loads_every_checkpoint(finished):
    run = folder(finished, ASI)
    model = MODELS.build(Config.fromfile(str(run / "config.yaml")).model)
    checkpoints = sorted(run.glob("*.pth"))
    assert {FINAL, "iter_4.pth"} <= {path.name for path in checkpoints}
    for path in checkpoints:
        load_checkpoint(model, str(path), strict=True, logger="silent")
    states = torch.load(run / "iter_4.pth", weights_only=False)["lowrank"]
    assert {name.partition(".bases.")[0] for name in states} >= {"decode_head.bottleneck.conv"}


@pytest.mark.slow
def test_the_picture_has_a_column_for_each_run(finished, tmp_path, capsys):
    output = tmp_path / "picture.png"
    runs = [str(folder(finished, method)) for method in ("hosvd_0.8", ASI)]
    assert main(["picture", *runs, "--output", str(output), "--count", "2"]) == 0
    width, height = Image.open(output).size
    assert width / height == pytest.approx(4 * 1.6 / (2 * 1.6 + 0.5), rel=0.02)
    assert main(["picture", str(tmp_path), "--output", str(output)]) == 2
    assert "result.json cannot be read" in capsys.readouterr().err


def test_columns_of_the_picture_are_told_apart():
    def record(seed, layers=5, miou=0.5):
        run = Run("segmentation", "finetune", "net", "scenes", "asi", layers, seed)
        return Record(run, {"miou_last": miou}, {}, {}, {})

    assert titles([record(1)]) == ["asi\nlast mIoU 50.0 %"]
    assert titles([record(1), record(2)]) == [f"asi\nseed {seed}\nlast mIoU 50.0 %" for seed in (1, 2)]
    assert titles([record(1), record(1, 10, 0.25)]) == [
        "asi\nlayers 5\nlast mIoU 50.0 %",
        "asi\nlayers 10\nlast mIoU 25.0 %",
    ]


# Killed when the checkpoint is written and the validation done, but its row is not.
@pytest.mark.slow
def test_a_run_that_was_moved_finds_the_run_of_its_budget(finished, tmp_path, capsys):
    moved = tmp_path / "moved"
    finished.rename(moved)
    try:
        config = folder(moved, ASI) / "config.yaml"
        assert main(["train", str(config), "--runs-dir", str(moved)]) == 0
    finally:
        moved.rename(finished)
    printed = capsys.readouterr().out
    assert printed.count("is not there; taken from") == 2
    assert f"done already: pspnet_small on digit_scenes, setup finetune, {ASI}" in printed


KILL = """
import os, signal, sys
from segmentation.cli import main
from segmentation.history import History
History.after_val_epoch = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights(finished, data_dir, tmp_path, capsys):
    table = str(folder(finished, "perplexity") / "perplexity.json")
    budget = ("--budget-table", table, "--budget-run", str(folder(finished, "hosvd_0.8")))
    again = arguments("train", "asi", data_dir, tmp_path, *budget)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILL, *again], env=environment, cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    run = folder(tmp_path, ASI)
    assert not (run / "result.json").exists()
    assert main(again) == 0
    assert "resuming" in capsys.readouterr().out
    one, two = (torch.load(path / "iter_4.pth", weights_only=False) for path in (folder(finished, ASI), run))
    for part in ("state_dict", "lowrank"):
        assert one[part]
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part]), part
    momentum = [list(checkpoint["optimizer"]["state"].values()) for checkpoint in (one, two)]
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(*momentum, strict=True))
    rows = []
    for path in (folder(finished, ASI), run):
        with (path / "metrics.csv").open() as file:
            rows.append(
                [[row[key] for key in ("iteration", "train_loss", "miou", "macc")] for row in csv.DictReader(file)]
            )
    assert rows[0] == rows[1]


def test_a_checkpoint_of_an_earlier_version_is_refused_before_anything_is_trained(finished, data_dir, tmp_path, capsys):
    run, own = folder(finished, "hosvd_0.8"), folder(tmp_path, "hosvd_0.8")
    shutil.copytree(run, own)
    (own / "result.json").unlink()
    checkpoint = torch.load(own / "iter_4.pth", weights_only=False)
    checkpoint["lowrank_state"] = {"decode_head.bottleneck.conv.lowrank_state_0": torch.ones(2, 2)}
    torch.save(checkpoint, own / "iter_4.pth")
    (own / "last_checkpoint").write_text(str(own / "iter_4.pth"))
    again = arguments("train", "hosvd_0.8", data_dir, tmp_path)
    measured = arguments("measure", "vanilla", data_dir, tmp_path / "other")
    for words in (again, [*measured, "--load-from", str(own / "iter_4.pth")]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"error: checkpoint {own}/iter_4.pth is of an earlier version")
        assert line.endswith("start afresh, or give other weights")
    assert not (own / "result.json").exists()
    assert (own / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--iterations", "0"], "--iterations is 0"),
        (["--amp"], "which needs an accelerator, and there is none; leave --amp out"),
        (["--launcher", "slurm"], "--launcher slurm is for srun"),
        (["--launcher", "pytorch"], "--launcher pytorch is for python -m torch.distributed.run"),
        (["--launcher", "pytorch", "--processes", "2"], "give one of them"),
        (["--processes", "0"], "--processes is 0"),
        (["--budget-mib", "1"], "a budget is --budget-table with either"),
        (
            ["--budget-table", "t", "--budget-mib", "1", "--budget-divisor", "2"],
            "--budget-divisor goes with the latter",
        ),
        (["--budget-table", "t", "--budget-run", "r", "--budget-divisor", "0"], "budget.divisor is 0"),
        (["--load-from", "no.pth"], "weights no.pth cannot be read"),
    ],
)
def test_bad_input_gets_one_line(extra, message, data_dir, tmp_path, capsys):
    if "accelerator" in message and torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    assert main(arguments("train", "vanilla", data_dir, tmp_path, *extra)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_missing_config_and_missing_data_get_one_line(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.py")]) == 2
    assert "none.py cannot be read" in capsys.readouterr().err
    composed = map(str, files("pspnet", "voc12aug", "finetune", "vanilla"))
    where = ["--data-dir", str(tmp_path / "d"), "--runs-dir", str(tmp_path / "r")]
    assert main(["train", *composed, "--layers", "5", *where]) == 2
    assert "python -m segmentation prepare voc12aug" in capsys.readouterr().err


def test_another_batch_size_than_the_tables_is_refused(finished, data_dir, tmp_path, capsys):
    table = str(folder(finished, "perplexity") / "perplexity.json")
    budget = ("--budget-table", table, "--budget-mib", "0.1")
    assert main([*arguments("train", "asi", data_dir, tmp_path, *budget), "train_dataloader.batch_size=4"]) == 2
    assert "on batches (2, 3, 32, 32), this run of pspnet_small on batches (4, 3, 32, 32)" in capsys.readouterr().err
