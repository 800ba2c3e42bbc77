"""What a setting names of another run is found where all runs have been moved to."""

import pytest

from experiment import ExperimentError
from experiment.budget import budget_bytes
from experiment.moved import place_now
from experiment.process_group import GROUP
from experiment.ranks import Budget
from experiment.weights import read_weights

RUN = "classification/B/mcunet/digits/hosvd_0.8/layers2/seed233"


def test_a_file_of_a_run_is_found_below_the_folder_of_all_runs_and_said(tmp_path, capsys):
    now = tmp_path / "now" / RUN / "checkpoints" / "best.ckpt"
    now.parent.mkdir(parents=True)
    now.touch()
    for old in ("/old/runs", "old", "."):
        assert place_now(f"{old}/{RUN}/checkpoints/best.ckpt", tmp_path / "now") == str(now)
        assert f"{RUN}/checkpoints/best.ckpt is not there; taken from {now}" in capsys.readouterr().out
    assert place_now(f"/old/{RUN}", tmp_path / "now") == str(tmp_path / "now" / RUN)


def test_of_the_processes_of_a_run_the_one_that_starts_the_others_says_so(tmp_path, capsys, monkeypatch):
    now = tmp_path / RUN
    now.mkdir(parents=True)
    monkeypatch.setenv(GROUP, str(tmp_path))
    assert place_now(f"/old/{RUN}", tmp_path) == str(now)
    assert capsys.readouterr().out == ""


def test_what_is_not_there_of_a_run_may_have_moved_which_its_error_says(tmp_path):
    folder = tmp_path / "old" / RUN
    for found, what in (
        (lambda: budget_bytes(None, str(folder)), "do it first"),
        (lambda: Budget(str(folder / "perplexity.json"), mib=1.0).plan([]), "measure it first, by .* of this run"),
        (lambda: read_weights(str(folder / "checkpoints" / "best.ckpt")), r"best\.ckpt"),
    ):
        with pytest.raises(ExperimentError, match=f"{what}; if all runs were moved, give the folder .* --runs-dir$"):
            found()
    with pytest.raises(ExperimentError, match=r"lost\.json/result\.json; do it first$"):
        budget_bytes(None, "lost.json")


def test_whatever_else_stays_as_it_is(tmp_path, capsys):
    here = tmp_path / "here" / RUN
    (tmp_path / "now" / RUN).mkdir(parents=True)
    (tmp_path / "now" / "best.ckpt").touch()
    here.mkdir(parents=True)
    kept = (str(here), "old/best.ckpt", f"old/{RUN}/lost.ckpt", f"https://host/{RUN}", f"old/{RUN[:-3]}", "")
    for path in kept:
        assert place_now(path, tmp_path / "now") == path
    assert capsys.readouterr().out == ""
