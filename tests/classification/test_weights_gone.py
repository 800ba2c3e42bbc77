"""Runs that are done stay done where what they were trained from is gone, as checkpoints that were deleted."""

import pytest
from commands import TINY, arguments, execute
from test_sweep import words

from classification import sweep
from classification.cli import main

SMALL = (*TINY, "--data.image_size", "64")


@pytest.fixture(scope="module")
def cleared(tmp_path_factory):
    """A folder after a sweep of setup B, without its checkpoints, and the sweep's arguments."""
    runs = tmp_path_factory.mktemp("cleared")
    arguments = words(runs, "--methods", "vanilla", "asi", "--budget", "0.05mib", *SMALL)
    assert sweep.main(arguments) == 0
    checkpoints = list(runs.rglob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        path.unlink()
    return runs, arguments


@pytest.mark.slow
def test_a_finished_sweep_is_finished_without_its_checkpoints(cleared, capsys):
    runs, arguments = cleared
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.name != ".done_by"}
    assert sweep.main(arguments) == 0
    printed = capsys.readouterr()
    assert "4 of 4 runs done" in printed.out
    assert "failed" not in printed.err
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file() and path.name != ".done_by"}
    assert after == before


@pytest.mark.slow
def test_other_settings_are_refused_and_new_runs_fail_in_one_line(cleared, capsys):
    _, arguments = cleared
    job = next(job for job in sweep.parse(arguments)[0].jobs() if job.run.method == "vanilla" and job.run.setup == "B")
    assert main([*job.arguments, "--model.learning_rate", "0.5"]) == 2
    assert "holds a run with other settings (model.learning_rate is" in capsys.readouterr().err
    assert main([*job.arguments, "--model.layers", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "best.ckpt" in line


def test_a_dry_run_says_of_published_weights_that_they_are_not_there(tmp_path, capsys):
    words = arguments("fit", tmp_path, "--model.layers", 2, "--dry_run", setup="a", model="resnet18")
    told, *_ = execute(words, capsys).splitlines()
    assert ".pth is not on this machine; the run would download it to " in told
    assert main(arguments("fit", tmp_path, "--model.layers", 2, "--dry_run", setup="a")) == 2
    assert "the ImageNet weights of mcunet are not on this machine; run: python -m" in capsys.readouterr().err
