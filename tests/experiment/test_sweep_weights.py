"""A sweep without its weights, or a place for its runs, begins nothing, in both tasks, nor does its dry run list it."""

from __future__ import annotations

import resource
import shutil

import pytest

import classification.sweep
import segmentation.cli
import segmentation.sweep

CLASSIFICATION = ["--setup", "b", "--model", "mcunet", "--dataset", "digits", "--layers", "2", "--methods", "vanilla"]
SEGMENTATION = ["--model", "pspnet_small", "--dataset", "digit_scenes", "--layers", "5", "--methods", "vanilla"]
SWEEPS = {
    "classification": lambda words: classification.sweep.main([*CLASSIFICATION, *words]),
    "segmentation": lambda words: segmentation.cli.main(["sweep", *SEGMENTATION, *words]),
}


def parse_job(task, runs):
    """The last job of the sweep."""
    words = ["--runs-dir", str(runs)]
    if task == "classification":
        sweep, _ = classification.sweep.parse([*CLASSIFICATION, *words])
    else:
        sweep, _ = segmentation.sweep.parse([*SEGMENTATION, *words])
    return sweep.jobs()[-1]


@pytest.mark.parametrize("task", SWEEPS)
def test_weights_that_are_not_there_are_one_line(task, tmp_path, capsys):
    words = ["--weights", str(tmp_path / "lost.pth"), "--runs-dir", str(tmp_path / "runs")]
    assert SWEEPS[task](words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lost.pth: there is no such file" in line
    assert not (tmp_path / "runs").exists()
    assert SWEEPS[task]([*words, "--dry-run"]) == 2


@pytest.mark.parametrize("task", SWEEPS)
def test_a_dry_run_refuses_a_folder_that_cannot_be_written_and_makes_none(task, tmp_path, capsys):
    (tmp_path / "file").touch()
    run = parse_job(task, tmp_path / "of one").run.folder(tmp_path / "of one")
    run.parent.mkdir(parents=True)
    run.touch()  # in the place of one run's own folder
    assert SWEEPS[task](["--runs-dir", str(tmp_path / "of one"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {run} cannot be written (Not a directory); give another --runs-dir"
    shutil.rmtree(tmp_path / "of one")
    assert SWEEPS[task](["--runs-dir", str(tmp_path / "file" / "runs"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("file/runs cannot be written (Not a directory); give another --runs-dir")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, most[1]))  # as on a full disk
    try:
        assert SWEEPS[task](["--runs-dir", str(tmp_path / "new" / "runs"), "--dry-run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert "new/runs cannot be written (File too large)" in capsys.readouterr().err
    assert SWEEPS[task](["--runs-dir", str(tmp_path / "new" / "runs"), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
