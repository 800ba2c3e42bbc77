"""A sweep on a real Slurm: every run done once, whatever happens to its jobs."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from working import PROGRAM, job, run_of

from benchmarks.cluster import Cluster, missing
from benchmarks.disturbances import WAYS, disturb
from experiment import ExperimentError, Record
from experiment.jobs import needed, run_jobs, write_log
from experiment.receipt import write_receipt
from experiment.slurm import LOG, TEARDOWN, stages, submit

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


def told(root):
    """Everything that Slurm and its jobs have said."""
    return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(root.rglob("*log*")) if path.is_file())


def test_each_stage_holds_what_needs_nothing_of_a_later_one(tmp_path):
    jobs = jobs_below(tmp_path)
    found = stages(jobs, needed(jobs, tmp_path))
    assert [[one.run.seed for one in stage] for stage in found] == [[1, 5], [2, 3], [4]]
    left = [one for one in jobs if one.run.seed != 1]  # what is done is not waited for
    assert [[one.run.seed for one in stage] for stage in stages(left, needed(jobs, tmp_path))] == [[2, 3, 5], [4]]


COMMANDS = {
    "sbatch": 'n=$(ls "$FAKE" | grep -c batch); cp "${@: -1}" "$FAKE/batch$n"; echo Submitted batch job "$((n + 6))"',
    "srun": 'until [ -x "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'echo "$*" >> "$FAKE/asked"; [ "$(wc -l < "$FAKE/asked")" -gt "${FAILS:-0}" ]',
    "sleep": ":",
    "squeue": ":",
}
AT_ITS_LOG = """
import os, signal, sys

def hear(event, arguments):
    if event == "open" and str(arguments[0]).endswith("slurm.log"):
        os.kill(os.getpid(), signal.SIGUSR2)

if "submitit.core._submit" in sys.orig_argv:
    sys.addaudithook(hear)
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Slurm's commands as scripts: what they are asked is written down, and a batch file kept. Gives their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def started(folder, **environment):
    """The exit code of a batch file that Slurm starts as an array's first job, and what it asked Slurm for."""
    told = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "here"}
    (folder / "asked").unlink(missing_ok=True)
    found = subprocess.run(["bash", folder / "batch1"], env=os.environ | told | environment, timeout=100)
    return found.returncode, (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


@pytest.mark.slow
def test_a_run_that_is_done_with_other_settings_is_no_run_of_this_sweep(scripted, tmp_path, capsys):
    own, root = job(tmp_path, 1), tmp_path
    own.run.folder(root).mkdir(parents=True)
    Record(own.run, {}, {}, {}, {}).save(own.run.folder(root))
    assert submit([own], PROGRAM, root, {}) == 0
    assert "1 of 1 runs submitted, 0 done before" in capsys.readouterr().out
    write_log(own, root, "it holds a run with other settings\n")  # as the job does
    assert submit([own], PROGRAM, root, {}, wait=True) == 1
    write_receipt(own.run.folder(root) / own.result, own.arguments)
    assert submit([own], PROGRAM, root, {}) == 0
    assert "1 of 1 runs done" in capsys.readouterr().out
    assert not own.log(root).exists()


@pytest.mark.slow
def test_what_slurm_sends_before_a_job_listens_has_it_queued_again_once(scripted, tmp_path):
    assert submit([job(tmp_path / "runs", seed) for seed in (1, 2)], PROGRAM, tmp_path / "runs", {}) == 0
    (scripted / "sitecustomize.py").write_text(AT_ITS_LOG)
    assert started(scripted, PYTHONPATH=os.pathsep.join([str(scripted), PATHS])) == (140, ["requeue 7_0"])
    assert not records(tmp_path / "runs")
    assert started(scripted) == (0, [])
    assert records(tmp_path / "runs")


@pytest.mark.slow
def test_a_job_that_begins_though_what_it_needs_is_not_done_does_nothing(scripted, tmp_path):
    jobs = [job(tmp_path / "runs", 1), *(job(tmp_path / "runs", seed, "write", 1) for seed in (2, 3))]
    assert submit(jobs, PROGRAM, tmp_path / "runs", {}) == 0
    (scripted / "batch2").replace(scripted / "batch1")  # as where the first job was cancelled
    assert started(scripted, SLURM_ARRAY_JOB_ID="8") == (1, [])
    assert "not begun: it needs seed 1, which is not done" in jobs[1].log(tmp_path / "runs").read_text()


@pytest.mark.slow
def test_a_job_is_queued_again_by_a_controller_that_does_not_answer_at_once(scripted):
    again = "requeue 7_0"
    told_and_asked = [(137, 0, 2, 3), (137, 10, 0, 0), (140, 99, 1, 2), (1, 0, 0, 0), (143, 9, 9, 4)]
    for code, restarts, fails, asked in told_and_asked:
        (scripted / "batch1").write_text("\n".join([f"(exit {code})", *TEARDOWN]))
        told = {"SLURM_RESTART_COUNT": str(restarts), "FAILS": str(fails)}
        assert started(scripted, **told) == (code, [again] * asked)


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
        assert submit(jobs[:4], PROGRAM, runs, {}, wait=True) == 0
        assert "submitted" not in capsys.readouterr().out, told(runs)  # nothing was left to be
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
    assert len(jobs) <= starts <= len(jobs) + len(done), told(runs)  # one may be disturbed before it has said a word
    assert "there are no data" in (run_of(5).folder(runs) / "failure.log").read_text()
    assert (runs / "report").is_dir()
