"""Jobs in several processes at once: what is said, done and left is what one process after the other leaves."""

import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from working import PROGRAM, job, run_of

from experiment import Record
from experiment.execute import at_work_on
from experiment.folder import RunFolder
from experiment.jobs import run_jobs
from experiment.lock import holder
from experiment.workers import Workers, _receive, accelerators, share

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
SWEEP = """
import sys
from pathlib import Path
from experiment.command import finish
from experiment.jobs import run_jobs
from experiment.workers import Workers
from working import PROGRAM, job
root = Path(sys.argv[1])
def sweep(work):
    with Workers(PROGRAM, root, 2) as workers:
        return run_jobs([job(root, seed, "last") for seed in (1, 2, 3)], PROGRAM, root, doing=workers.run)
sys.exit(finish(sweep))
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)


def swept(root, jobs, count, capfd):
    """What a sweep returned, and what it said but for times and logs' places."""
    capfd.readouterr()
    if count == 1:
        code = run_jobs(jobs, PROGRAM, root)
    else:
        with Workers(PROGRAM, root, count) as workers:
            code = run_jobs(jobs, PROGRAM, root, doing=workers.run)
    said = capfd.readouterr()
    lines = [line.partition("  (about")[0].replace(str(root), "") for line in said.out.splitlines()]
    return code, [line for line in lines if " runs done, " not in line], said.err.replace(str(root), "")


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def records(root):
    return {path.parent.name: Record.load(path) for path in root.rglob("result.json")}


def logs(root):
    return {path.parent.name: path.read_text().replace(str(root), "") for path in root.rglob("failure.log")}


@pytest.mark.slow
def test_two_workers_leave_and_say_what_one_does(tmp_path, capfd):
    def jobs(root):
        told = [(1, "write"), (2, "fail"), (3, "write", 1), (4, "break"), (5, "write", 2), (6, "write", 3)]
        return [job(root, *what) for what in told]

    code, out, err = swept(tmp_path / "serial", jobs(tmp_path / "serial"), 1, capfd)
    assert code == 1
    found = swept(tmp_path / "two", jobs(tmp_path / "two"), 2, capfd)
    assert (found[0], sorted(found[1]), sorted(found[2].splitlines())) == (code, sorted(out), sorted(err.splitlines()))
    for line, below in itertools.pairwise(out):  # what a job prints stands below its title
        if line.startswith("[") and not below.startswith("["):
            assert found[1][found[1].index(line) + 1] == below
    assert records(tmp_path / "two") == records(tmp_path / "serial")
    assert set(records(tmp_path / "two")) == {"seed1", "seed3", "seed6"}
    assert {seed: text.splitlines()[-1] for seed, text in logs(tmp_path / "two").items()} == {
        seed: text.splitlines()[-1] for seed, text in logs(tmp_path / "serial").items()
    }


@pytest.mark.slow
def test_two_are_at_work_at_once_and_one_that_is_killed_stops_no_other(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs = [job(tmp_path, seed, what) for seed, what in enumerate(["meet", "meet", "die", "write", "write"], start=1)]
    code, _, err = swept(tmp_path, jobs, 2, capfd)
    assert code == 1
    assert set(records(tmp_path)) == {"seed1", "seed2", "seed4", "seed5"}
    assert "seed 3: /classification" in err
    assert "was killed" in (run_of(3).folder(tmp_path) / "failure.log").read_text()
    times = {path.parent.name: path.read_text().split() for path in tmp_path.rglob("times")}
    assert times["seed1"][0] != times["seed2"][0]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {told[1] for told in times.values()} == {str(threads)}


@pytest.mark.parametrize("word", [True, False])
def test_a_worker_that_is_told_to_end_is_not_left_alone(word, monkeypatch):
    """One that is alone removes the folder, of which those who tell it to end still learn whether others have ended."""
    ended, alone, jobs = [], threading.Event(), queue.SimpleQueue()
    monkeypatch.setattr(os, "kill", lambda *which: ended.append(which))
    ours, theirs = multiprocessing.Pipe()
    ours.send("a job")
    if word:
        ours.send(None)
    ours.close()
    _receive(theirs, jobs, alone)
    assert (jobs.get_nowait(), ended) == ("a job", [(os.getpid(), signal.SIGTERM)])
    assert alone.is_set() != word


@pytest.fixture
def temporary():
    """A folder for what a sweep leaves that is killed, whose name is short enough for a socket's."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield os.environ | {"TMPDIR": folder}


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_one_signal_ends_all_with_what_they_have_saved(temporary, tmp_path, sent, code):
    command = [sys.executable, "-c", SWEEP, str(tmp_path)]
    with subprocess.Popen(command, env=temporary, stderr=subprocess.PIPE, text=True) as sweep:
        folders = [run_of(seed).folder(tmp_path) for seed in (1, 2)]
        wait_for(lambda: all((folder / "waiting").exists() for folder in folders))
        sweep.send_signal(sent)
        said = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == code
    wait_for(lambda: not any(holder(folder) for folder in folders))  # they see that it is gone
    assert [(folder / "checkpoints" / "last.ckpt").read_text() for folder in folders] == ["saved", "saved"]
    assert records(tmp_path) == {}
    wait_for(lambda: not list(Path(temporary["TMPDIR"]).glob("lowrank-*")))
    if sent == signal.SIGINT:
        one, other = "interrupted during seed 1, seed 2; ", "interrupted during seed 2, seed 1; "
        assert said in (f"{one}the same command goes on\n", f"{other}the same command goes on\n")


def test_threads_that_the_user_has_set_stay():
    assert share({"OMP_NUM_THREADS": "3"}, 2) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("told", "count", "expected"),
    [(None, 0, []), (None, 2, ["0", "1"]), ("4,GPU-5", 2, ["4", "GPU-5"]), ("", 0, [])],
)
def test_each_accelerator_goes_by_the_name_that_the_user_may_have_given(monkeypatch, told, count, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert accelerators() == expected


def test_a_run_that_another_process_has_done_meanwhile_is_not_done_again(tmp_path, capsys):
    run = run_of(1)
    folder = RunFolder(run.folder(tmp_path), {}, "result.json", run=run)

    def command(arguments):  # it was not done when this one looked at it
        Record(run, {}, {}, {}, {}, {"config_hash": folder.identity_hash}).save(folder.path)
        with at_work_on(run, folder, ""):
            raise AssertionError

    from experiment.jobs import Program

    folder.path.mkdir(parents=True)
    assert run_jobs([job(tmp_path, 1)], Program("x", command), tmp_path) == 0
    assert capsys.readouterr().err == ""


def test_temporary_files_may_lie_in_a_folder_of_any_name(tmp_path, monkeypatch):
    deep = tmp_path.joinpath(*["a" * 60] * 2)
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with Workers(PROGRAM, tmp_path, 1) as workers:
        assert workers.run([]) == {}
