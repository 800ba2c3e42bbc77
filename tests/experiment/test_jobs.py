"""Jobs: none stops another, and one that is done elsewhere has not failed."""

import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiment import ExperimentError, Record, Run
from experiment import jobs as jobs_module
from experiment.errors import InUseError
from experiment.jobs import Job, Program, duration, list_jobs, needed, run_jobs
from experiment.record import RESULT


def job(layers, *arguments):
    return Job(f"layers {layers}", Run("classification", "A", "mcunet", "pets", "asi", layers, 1), arguments)


def leave(root, *jobs):
    """What jobs that are done leave; see `run_jobs`."""
    for one in jobs:
        one.run.folder(root).mkdir(parents=True, exist_ok=True)
        if one.result == RESULT:
            Record(one.run, {}, {}, {}, {}).save(one.run.folder(root))
        else:
            (one.run.folder(root) / one.result).write_text("{}")


def program(**raised):
    """A program whose command raises, by its first argument."""
    tried = []

    def command(arguments):
        tried.append(arguments[0])
        if arguments[0] in raised:
            raise raised[arguments[0]]

    return Program("python -m x", command), tried


@pytest.mark.parametrize("error", [ExperimentError("no data"), RuntimeError("out of memory")])
def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys, error):
    jobs = [job(1, "first"), job(2, "second")]
    folder = jobs[0].run.folder(tmp_path)
    folder.parent.parent.mkdir(parents=True)
    folder.parent.write_text("in the way")
    how, tried = program(first=error)
    assert run_jobs(jobs, how, tmp_path) == 1
    assert tried == ["first", "second"]
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "Traceback" not in said


def test_what_is_in_work_elsewhere_and_what_needs_it_is_come_back_to(tmp_path, capsys):
    first = job(1, "first")
    jobs = [first, job(2, "second", str(first.run.folder(tmp_path))), job(3, "third")]
    how, tried = program(first=InUseError("another process"))
    leave(tmp_path, jobs[2])
    assert run_jobs(jobs, how, tmp_path) == 1
    assert tried == ["first", "third", "first"]
    said = capsys.readouterr().err
    assert said == "in work elsewhere (2); come back later for them:\n  layers 1\n  layers 2\n"
    assert list(tmp_path.rglob("failure.log")) == []


def test_what_needs_a_run_that_has_failed_is_not_begun(tmp_path, capsys):
    """What that has left, such as weights of its first epochs, would be taken for what it is to leave."""
    first = job(1, "first")
    second = job(2, "second", str(first.run.folder(tmp_path) / "checkpoints" / "best.ckpt"))
    jobs = [first, second, job(3, "third", str(second.run.folder(tmp_path))), job(4, "fourth")]
    (first.run.folder(tmp_path) / "checkpoints").mkdir(parents=True)
    (first.run.folder(tmp_path) / "checkpoints" / "best.ckpt").touch()
    how, tried = program(first=ExperimentError("no data"))
    leave(tmp_path, jobs[3])
    assert run_jobs(jobs, how, tmp_path) == 1
    assert tried == ["first", "fourth"]
    said = capsys.readouterr().err
    assert f"  failed: not begun: it needs layers 1, which is not done, see {first.log(tmp_path)}\n" in said
    assert "failed (3), each with its log:" in said
    assert "needs layers 2" in jobs[2].log(tmp_path).read_text()

    leave(tmp_path, first, *jobs[1:3])
    assert run_jobs(jobs, program()[0], tmp_path) == 0
    assert list(tmp_path.rglob("failure.log")) == []


def test_what_was_done_stays_done_though_what_it_needs_fails(tmp_path):
    jobs = [job(1, "first"), job(2, "second", str(job(1).run.folder(tmp_path)))]
    leave(tmp_path, *jobs)
    assert run_jobs(jobs, program()[0], tmp_path) == 0
    first = replace(jobs[0], arguments=("first", "--other", "settings"))
    assert run_jobs([first, jobs[1]], program(first=ExperimentError("another run"))[0], tmp_path) == 1
    assert not jobs[1].log(tmp_path).exists()


def test_the_command_of_the_report_is_one_to_copy(tmp_path, capsys):
    root = tmp_path / "my runs"
    run_jobs([job(1, "first")], program()[0], root)
    assert f"python -m report '{root}'\n" in capsys.readouterr().out


@pytest.mark.parametrize("root", [".", "runs", "/a/b"])
def test_what_a_job_needs_is_found_below_any_folder_of_runs(root):
    first = job(1, "--out", root)
    second = job(2, "--weights", str(first.run.folder(Path(root)) / "checkpoints" / "best.ckpt"))
    assert needed([first, second], Path(root)) == {first: [], second: [first]}


def test_a_listed_command_is_one_to_type(capsys):
    words = ("fit", "--runs_dir", "mit leer ü", "a=(1,2)", "it's", "")
    list_jobs([job(1, *words)], program()[0])
    line = capsys.readouterr().out.splitlines()[1]
    assert shlex.split(line) == ["python", "-m", "x", *words]


def test_what_was_in_work_elsewhere_may_be_done_at_the_end(tmp_path, capsys):
    errors = [InUseError("another process")]
    tried, jobs = [], [job(1, "first"), job(2, "second")]

    def command(arguments):
        tried.append(arguments[0])
        if arguments[0] == "first" and errors:
            raise errors.pop()
        leave(tmp_path, *(one for one in jobs if one.arguments == arguments))

    how = Program("python -m x", command)
    assert run_jobs(jobs, how, tmp_path) == 0
    assert tried == ["first", "second", "first"]
    assert capsys.readouterr().err == ""


def test_a_run_that_leaves_its_record_under_another_name_is_told(tmp_path, capsys):
    right, wrong = job(1, "right"), job(2, "wrong")

    def command(arguments):
        run = right.run if arguments[0] == "right" else replace(wrong.run, method="asi_2")
        run.folder(tmp_path).mkdir(parents=True)
        Record(run, {}, {}, {}, {}).save(run.folder(tmp_path))

    assert run_jobs([right, wrong], Program("python -m x", command), tmp_path) == 1
    missing = wrong.run.folder(tmp_path) / "result.json"
    printed = capsys.readouterr()
    assert "1 of 2 runs done" in printed.out
    said = printed.err
    assert said.endswith(f"called as its tag:\n  layers 2: no {missing}\n")
    assert "done under other names (1), " in said
    assert "rename the method's config" in said


def test_a_job_is_done_only_with_a_whole_record_of_its_run(tmp_path):
    one = job(1)
    folder = one.run.folder(tmp_path)
    folder.mkdir(parents=True)
    for content in ("", "{}", '{"schema": 1, "status": "done"}'):
        (folder / "result.json").write_text(content)
        assert not one.done(tmp_path)


def test_the_time_left_is_of_the_median_run_of_each_kind(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs_module.time, "perf_counter", lambda: now[0])
    took = {"table": 4.0, "slow": 1000.0, "usual": 60.0}

    def command(arguments):
        now[0] += took[arguments[0]]
        leave(tmp_path, next(one for one in order if one.arguments == arguments and not one.done(tmp_path)))

    run = Run("classification", "A", "mcunet", "pets", "perplexity", 2, 1)
    table = [Job("table", replace(run, layers=layers), ("table",), "perplexity.json") for layers in (1, 2)]
    runs = [job(layers, kind) for layers, kind in enumerate(["usual", "slow", "usual", "usual"], start=1)]
    order = [table[0], *runs, table[1]]
    assert run_jobs(order, Program("python -m x", command), tmp_path) == 0
    said = re.findall(r"about (.*) left", capsys.readouterr().out)
    # Of runs nothing is known at first, so the table's time stands for theirs; then their median does.
    expected = [5 * 4, 3 * 60 + 4, 2 * 530 + 4, 60 + 4, 4]
    assert said == [duration(seconds) for seconds in expected]


def test_a_sweep_that_waits_comes_back_until_nothing_is_in_work_elsewhere(tmp_path, monkeypatch):
    errors = [InUseError("another process") for _ in range(4)]
    tried, slept, jobs = [], [], [job(1, "first"), job(2, "second")]

    def command(arguments):
        tried.append(arguments[0])
        if arguments[0] == "first" and errors:
            raise errors.pop()
        leave(tmp_path, *(one for one in jobs if one.arguments == arguments))

    monkeypatch.setattr(time, "sleep", slept.append)
    how = Program("python -m x", command)
    assert run_jobs(jobs, how, tmp_path, wait=True) == 0
    assert tried == ["first", "second", *["first"] * 4]
    assert len(slept) == 3


# A finished sweep that is run again.


def recording(tmp_path):
    """A program that writes the record that its one argument names, and a list of what it was asked for."""
    asked = []

    def command(arguments):
        run = Run("classification", "A", "mcunet", "pets", "asi", int(arguments[0]), 1)
        asked.append(run.layers)
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        Record(run, {"test": 0.5}, {}, {}, {}).save(run.folder(tmp_path))

    return Program("python -m x", command), asked


def test_what_was_done_by_the_same_command_is_not_loaded_again(tmp_path, capsys):
    how, asked = recording(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("epochs: 1")
    jobs = [job(number, str(number), f"--config={config}") for number in (1, 2, 3)]
    assert run_jobs(jobs, how, tmp_path) == 0
    assert run_jobs(jobs, how, tmp_path) == 0
    assert asked == [1, 2, 3]
    assert capsys.readouterr().out.count("done already, by this same command") == 3

    result = jobs[1].run.folder(tmp_path) / "result.json"
    result.write_text(result.read_text().replace("0.5", "0.6"))
    assert run_jobs(jobs, how, tmp_path) == 0
    assert asked[3:] == [2]  # not the result that the command left
    config.write_text("epochs: 2")
    assert run_jobs(jobs, how, tmp_path) == 0
    assert asked[4:] == [1, 2, 3]
    assert run_jobs([job(1, "1", "--other")], how, tmp_path) == 0
    assert asked[7:] == [1]


def test_what_a_config_is_based_on_counts(tmp_path):
    how, asked = recording(tmp_path)
    (tmp_path / "bases").mkdir()
    texts = {
        "own.py": '_base_ = "bases/one.py"',
        "bases/one.py": '_base_ = ["two.py", "mmseg::a.py"]',
        "bases/two.py": "a = 1",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(f"{text}\n")
    jobs = [job(1, "1", str(tmp_path / "own.py"))]
    for name in ["own.py", *texts]:
        assert run_jobs(jobs, how, tmp_path) == 0
        assert run_jobs(jobs, how, tmp_path) == 0
        with (tmp_path / name).open("a") as file:
            file.write("b = 2\n")
    assert len(asked) == 4
    (tmp_path / "bases" / "two.py").write_text('_base_ = "../own.py"\n')  # in a ring
    assert run_jobs(jobs, how, tmp_path) == 0
    (tmp_path / "own.py").write_text("no config (\n")
    assert run_jobs(jobs, how, tmp_path) == 0
    assert len(asked) == 6


def test_what_a_command_takes_from_another_run_counts(tmp_path):
    how, asked = recording(tmp_path)
    first = job(1, "1")
    jobs = [first, job(2, "2", "--budget.run", str(first.run.folder(tmp_path)))]
    assert run_jobs(jobs, how, tmp_path) == 0
    result = first.run.folder(tmp_path) / "result.json"
    result.write_text(result.read_text().replace("0.5", "0.6"))
    assert run_jobs(jobs[1:], how, tmp_path) == 0
    assert asked == [1, 2, 2]


@pytest.mark.slow
def test_a_finished_sweep_of_500_runs_asks_for_none(tmp_path):
    how, asked = recording(tmp_path)
    jobs = [job(number, str(number)) for number in range(1, 501)]
    assert run_jobs(jobs, how, tmp_path) == 0
    start = time.process_time()
    assert run_jobs(jobs, how, tmp_path) == 0
    assert len(asked) == 500
    print(f"{time.process_time() - start:.2f} s")
