"""One segmentation run in two processes: what it equals, its record, and how it is killed and goes on."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from segmentors import TINY, files

from benchmarks.cluster import Cluster, missing
from benchmarks.kills import differences
from experiment import Record
from experiment.processes import OTHERS
from segmentation.cli import main
from segmentation.data.scenes import SETS, Scenes, write_scenes

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
VAL = 5  # not a multiple of two, so that what samplers pad would be noticed
TWO = ("--processes", "2")
METHOD = """
custom_imports = dict(imports=["killing"], allow_failed_imports=False)
custom_hooks = [dict(type="KillSecond")]
lowrank = dict(method=dict(type="ASI", ranks=2))
"""


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """What the processes of a run, which are started anew, find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONWARNINGS", "ignore")
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for name, kind in SETS.items():
        write_scenes(root / name, Scenes(kind.digits, train=12, val=VAL, size=32))
    return root


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    path = tmp_path_factory.mktemp("method") / "small_ranks.py"
    path.write_text(METHOD)
    return path


def words(scenes, runs, *options, method="vanilla", batch=2):
    """A short training; its loss is a plain mean, as one with class weights has a norm of its own in each process."""
    composed = list(map(str, files("pspnet_small", "digit_scenes", "finetune", "vanilla")))
    if method != "vanilla":
        composed[-1] = str(method)
    where = ["--layers", "10", "--data-dir", str(scenes), "--runs-dir", str(runs), "--iterations", "4"]
    settings = [
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
        f"train_dataloader.batch_size={batch}",
        "model.decode_head.loss_decode.class_weight=None",
    ]
    return ["train", *composed, *where, *options, *TINY, *settings]


def folder(runs):
    (path,) = runs.rglob("result.json")
    return path.parent


def checkpoint(runs, name="iter_4.pth"):
    return torch.load(folder(runs) / name, weights_only=False)


def rows(runs):
    with (folder(runs) / "metrics.csv").open() as file:
        return [
            {key: float(value) for key, value in row.items() if "seconds" not in key} for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def vanilla(scenes, tmp_path_factory):
    """The folders of all runs of one process with the joined batch, and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    assert main(words(scenes, one, batch=4)) == 0
    assert main(words(scenes, two, *TWO)) == 0
    return one, two


def test_two_processes_train_as_one_on_the_joined_batch(vanilla):
    expected, found = (checkpoint(runs)["state_dict"] for runs in vanilla)
    start = checkpoint(vanilla[0], "iter_2.pth")["state_dict"]
    moved = [key for key in expected if not torch.equal(expected[key], start[key])]
    assert any("decode_head" in key for key in moved)
    assert max(float((expected[key] - start[key]).abs().max()) for key in moved) > 1e-4
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=2e-7)
    for one, two in zip(*map(rows, vanilla), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert (two["miou"], two["macc"]) == pytest.approx((one["miou"], one["macc"]), abs=2e-3)


def test_the_record_says_how_many_trained(vanilla, capsys, scenes):
    one, two = (Record.load(folder(runs) / "result.json") for runs in vanilla)
    sizes = ("processes", "batch_size", "joined_batch_size")
    assert [two.recipe[key] for key in sizes] == [2, 2, 4]
    assert [one.recipe[key] for key in sizes] == [1, 4, 4]
    assert "each has of its own images" in two.provenance["processes"]
    assert "processes" not in one.provenance
    assert not (Path.cwd() / ".dist_test").exists()
    assert main(words(scenes, vanilla[1], *TWO)) == 0
    assert "done already: " in capsys.readouterr().out
    config = folder(vanilla[1]) / "config.yaml"
    assert main(["train", str(config), "--runs-dir", str(vanilla[1])]) == 0
    assert "done already: " in capsys.readouterr().out
    assert main(words(scenes, vanilla[1], "--processes", "1")) == 2
    assert "holds a run with other settings (processes is 2 there and None here)" in capsys.readouterr().err


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_tasks_of_slurm_are_the_processes_of_a_run(vanilla, scenes, tmp_path):
    command = ["srun", "--ntasks=2", sys.executable, "-m", "segmentation"]
    command += words(scenes, tmp_path, "--launcher", "slurm")
    with Cluster(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training: ") == 1
    assert differences(folder(vanilla[1]), folder(tmp_path)) == []


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_a_killed_run_goes_on_bit_for_bit_with_the_bases_of_each(scenes, method, tmp_path, monkeypatch, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(words(scenes, whole, *TWO, method=method)) == 0
    monkeypatch.setenv("KILL_SECOND", "2")
    capfd.readouterr()
    assert main(words(scenes, killed, *TWO, method=method)) == 128 + signal.SIGKILL
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    (line,) = lines
    assert line.startswith("error: process 1 of 2 was killed (SIGKILL)")
    monkeypatch.delenv("KILL_SECOND")
    assert main(words(scenes, killed, *TWO, "--resume", method=method)) == 0
    assert capfd.readouterr().out.count("resuming: ") == 1
    one, two = checkpoint(whole), checkpoint(killed)
    for part in ("state_dict", "lowrank", "optimizer", "param_schedulers"):
        assert equal(one[part], two[part]), part
    (others,) = one["lowrank"][OTHERS]
    assert others
    assert not any(torch.equal(one["lowrank"][key], basis) for key, basis in others.items())
    assert rows(whole) == rows(killed)
    records = [Record.load(folder(runs) / "result.json") for runs in (whole, killed)]
    assert records[0].accuracy == records[1].accuracy
