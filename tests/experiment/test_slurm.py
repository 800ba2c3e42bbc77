"""A sweep on a real Slurm: every run done once, whatever happens to its jobs."""

import json
import os
import re
from pathlib import Path

import pytest
from working import PROGRAM, job, run_of

from benchmarks.cluster import Cluster, missing
from benchmarks.disturbances import WAYS, disturb
from experiment import ExperimentError
from experiment.jobs import needed, run_jobs
from experiment.slurm import LOG, stages, submit

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)


def jobs_below(root):
    """Three runs of which the second and third need the first, one that needs both, and one without data.

    All but the one that needs both last until they are disturbed.
    """
    told = [(1, "held"), (2, "held", 1), (3, "held", 1), (4, "epochs", 2, 3), (5, "late")]
    return [job(root, *what) for what in told]


def records(root):
    return {path.parent.name: json.loads(path.read_text()) for path in root.rglob("result.json")}


def test_each_stage_holds_what_needs_nothing_of_a_later_one(tmp_path):
    jobs = jobs_below(tmp_path)
    found = stages(jobs, needed(jobs, tmp_path))
    assert [[one.run.seed for one in stage] for stage in found] == [[1, 5], [2, 3], [4]]
    left = [one for one in jobs if one.run.seed != 1]  # what is done is not waited for
    assert [[one.run.seed for one in stage] for stage in stages(left, needed(jobs, tmp_path))] == [[2, 3, 5], [4]]


@pytest.mark.slow
@needs_slurm
def test_a_sweep_whose_jobs_are_killed_leaves_what_an_undisturbed_one_leaves(tmp_path, capsys):
    serial, runs = tmp_path / "serial", tmp_path / "runs"
    jobs = jobs_below(runs)
    with Cluster(2) as cluster:
        with pytest.raises(ExperimentError, match="colour"):
            submit(jobs, PROGRAM, runs, {"colour": "red"})
        assert cluster.is_empty
        assert submit(jobs, PROGRAM, runs, {"time": "10"}, workers=2) == 0
        said = capsys.readouterr().out
        done = disturb(cluster, 4, seed=1, latest=1.5, share=1.0, limit=300)
        assert len(done) == 4
        assert {what.split()[0] for what in done} == set(WAYS)
        assert submit(jobs[:4], PROGRAM, runs, {}, wait=True) == 0  # nothing is left to be submitted
        assert cluster.is_empty
    assert re.findall(r"^stage (\d): (\d) runs", said, re.MULTILINE) == [("1", "2"), ("2", "2"), ("3", "1")]
    assert run_jobs(jobs_below(serial), PROGRAM, serial) == 1
    assert records(runs) == records(serial)
    assert set(records(runs)) == {"seed1", "seed2", "seed3", "seed4"}
    for seed in (1, 2, 3, 4):
        folder = run_of(seed).folder(runs)
        assert (folder / "checkpoints" / "last.ckpt").read_text() == "0\n1\n2\n3\n4\n5\n"
        assert "--- job " in (folder / LOG).read_text()
    starts = sum(path.read_text().count("--- job ") for path in runs.rglob(LOG))
    assert len(jobs) <= starts <= len(jobs) + len(done)  # one may be disturbed before it has said a word
    assert "there are no data" in (run_of(5).folder(runs) / "failure.log").read_text()
    assert (runs / "report").is_dir()
