"""A sweep whose weights are not there begins nothing, in both tasks."""

from __future__ import annotations

import pytest

import classification.sweep
import segmentation.cli

CLASSIFICATION = ["--setup", "b", "--model", "mcunet", "--dataset", "digits", "--layers", "2", "--methods", "vanilla"]
SEGMENTATION = ["--model", "pspnet_small", "--dataset", "digit_scenes", "--layers", "5", "--methods", "vanilla"]
SWEEPS = {
    "classification": lambda words: classification.sweep.main([*CLASSIFICATION, *words]),
    "segmentation": lambda words: segmentation.cli.main(["sweep", *SEGMENTATION, *words]),
}


@pytest.mark.parametrize("task", SWEEPS)
def test_weights_that_are_not_there_are_one_line(task, tmp_path, capsys):
    words = ["--weights", str(tmp_path / "lost.pth"), "--runs-dir", str(tmp_path / "runs")]
    assert SWEEPS[task](words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lost.pth: there is no such file" in line
    assert not (tmp_path / "runs").exists()
    assert SWEEPS[task]([*words, "--dry-run"]) == 0
