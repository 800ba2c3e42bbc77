"""Who does the jobs of a sweep, as the command line says it."""

import argparse

import pytest

from experiment import ExperimentError, launcher
from experiment.jobs import WAIT
from experiment.launcher import Launcher, add_options, launcher_of, take_slurm


def told(*words):
    """The launcher of a command line, and the words that are not its own."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument(WAIT, action="store_true")
    add_options(parser)
    rest, slurm = take_slurm(words)
    options, extra = parser.parse_known_args(rest, argparse.Namespace(slurm=slurm))
    return launcher_of(options), extra


def test_without_options_one_run_after_the_other_is_done_here():
    assert told() == (Launcher("local", None, (), False), [])


@pytest.mark.parametrize(("failed", "reported", "code"), [(0, 0, 0), (0, 2, 2), (1, 0, 1), (1, 2, 1)])
def test_the_report_is_written_in_the_end_whatever_failed(tmp_path, monkeypatch, failed, reported, code):
    done = []
    monkeypatch.setattr(launcher, "run_jobs", lambda *told: done.append("jobs") or failed)
    monkeypatch.setattr(launcher, "write_report", lambda root: done.append(root) or reported)
    assert told("--report")[0].run([], None, tmp_path) == code
    assert done == ["jobs", tmp_path]
    assert told()[0].run([], None, tmp_path) == failed
    assert done == ["jobs", tmp_path, "jobs"]


def test_every_option_of_sbatch_is_passed_through_and_no_other_is_taken():
    words = ["--slurm.partition", "gpu", "--data.batch-size", "8", "--slurm.exclusive", "--slurm.mem=4G", "--wait"]
    found, extra = told("--launcher", "slurm", *words, "--workers", "3", "--slurm.requeues-not")
    passed = (("partition", "gpu"), ("exclusive", True), ("mem", "4G"), ("requeues-not", True))
    assert found == Launcher("slurm", 3, passed, True)
    assert extra == ["--data.batch-size", "8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], r"--workers is 0; allowed are whole numbers from 1"),
        (["--workers", "100000"], r"--workers 100000 asks for 100000 processes; allowed are up to \d+ on this machine"),
        (["--slurm.mem", "4G"], r"--slurm\.mem is for --launcher slurm"),
        (["--launcher", "slurm", "--slurm.array", "1-3"], r"--slurm\.array cannot be given: a sweep sets it"),
        (["--launcher", "slurm", "--slurm.nodes", "2"], r"--slurm\.nodes cannot be given: .*docs/machines\.md"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(ExperimentError, match=message):
        told(*words)
