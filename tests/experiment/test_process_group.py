"""A command in several processes: all of them end when one does, and what is said of it is what it died of."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiment import process_group
from experiment.command import finish
from experiment.errors import ExperimentError, InUseError
from experiment.process_group import KilledError, ProcessError, run_all
from experiment.signals import Stopped

PATHS = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])


@pytest.fixture(autouse=True)
def _found(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    line = tmp_path_factory.mktemp("line") / "line"
    os.mkfifo(line)
    monkeypatch.setenv("LINE", str(line))


def act(*words):
    run_all("acting", list(map(str, words)), len(words))


def is_gone(path):
    """Whether the process whose number is in a file is gone; waited for."""
    number = int(path.read_text())
    for _ in range(1200):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_all_are_done_and_the_first_alone_speaks(capfd):
    act("print=first", "print=second")
    assert capfd.readouterr() == ("first\n", "")


@pytest.mark.slow
def test_one_that_fails_ends_the_others_and_its_words_are_said(tmp_path):
    paths = [tmp_path / name for name in ("first", "third")]
    with pytest.raises(ExperimentError, match=r"^process 1 of 3: no such weights$"):
        act(f"wait={paths[0]}", "mendable=no such weights", f"wait={paths[1]}")
    assert all(map(is_gone, paths))


def test_what_all_of_them_say_is_said_as_of_one_process(monkeypatch, capfd):
    monkeypatch.setattr(process_group, "SETTLE", 100.0)
    assert finish(lambda work: act("mendable=no such weights", "mendable=no such weights")) == 2
    assert capfd.readouterr().err == "error: no such weights\n"


def test_a_folder_in_use_is_told_from_a_failure():
    with pytest.raises(InUseError, match=r"^elsewhere$"):
        act("in_use=elsewhere", "print=")


AFTER = "later other=connection closed"


@pytest.mark.parametrize("order", [("signal=9", AFTER), (AFTER, "signal=9")])
def test_one_that_is_killed_is_named_and_not_what_the_others_said_of_it(order, capfd):
    with pytest.raises(KilledError, match=rf"process {order.index('signal=9')} of 2 was killed \(SIGKILL\)") as caught:
        act(*order)
    assert finish(lambda work: (_ for _ in ()).throw(caught.value)) == 137
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("the same command goes on")


def test_one_that_is_aborted_as_another_is_gone_does_not_hide_what_that_one_said():
    with pytest.raises(ExperimentError, match=r"^process 1 of 2: no such weights$"):
        act(f"later signal={signal.SIGABRT:d}", "mendable=no such weights")
    with pytest.raises(KilledError, match=r"^process 0 of 2 was killed \(SIGABRT\)"):
        act(f"signal={signal.SIGABRT:d}", "print=done")


def test_the_first_cause_is_said_and_not_what_came_of_it():
    with pytest.raises(ExperimentError, match="process 1 of 2: the loss is nan"):
        act(AFTER, "mendable=the loss is nan")


def test_an_error_of_the_code_has_its_traceback_in_the_log(tmp_path, capfd):
    def command(work):
        work.title, work.folder = "a run", tmp_path
        act("print=", "other=a bug")

    assert finish(command) == 1
    log = tmp_path / "failure.log"
    said = "error: a run: ProcessError: process 1 of 2: RuntimeError: a bug"
    assert capfd.readouterr().err == f"{said} (traceback in {log})\n"
    assert "acting.py" in log.read_text()
    assert "raise RuntimeError(value)" in log.read_text()


def test_one_that_ends_without_a_report_is_named_with_its_last_words():
    with pytest.raises(ProcessError, match=r"^process 1 of 2: it ended with 5: cannot import$"):
        act("print=", "silent=cannot import")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_them_stops_the_command(number, capfd):
    def command(work):
        work.title = "a run"
        act("signal=" + str(int(number)), "print=")

    assert finish(command) == 128 + number
    assert capfd.readouterr().err == "interrupted during a run; the same command goes on\n"


def signal_when_there(path, number):
    while not path.exists():
        time.sleep(0.02)
    os.kill(os.getpid(), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_ends_all_even_those_that_do_not_listen(tmp_path, monkeypatch, number, capfd):
    monkeypatch.setattr(process_group, "GRACE", 0.5)
    paths = [tmp_path / name for name in ("first", "second")]
    threading.Thread(target=lambda: (signal_when_there(paths[0], 0), signal_when_there(paths[1], number))).start()
    assert finish(lambda work: act(f"stubborn={paths[0]}", f"wait={paths[1]}")) == 128 + number
    assert capfd.readouterr().err == "interrupted; the same command goes on\n"
    assert all(map(is_gone, paths))


def test_they_end_when_the_command_is_killed(tmp_path):
    paths = [tmp_path / name for name in ("first", "second")]
    words = [f"wait={path}" for path in paths]
    code = f"from experiment.process_group import run_all; run_all('acting', {words!r}, 2)"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(temporary)}) as process:
        while not all(path.exists() for path in paths):
            assert process.poll() is None
            time.sleep(0.02)
        assert list(temporary.glob("lowrank-*"))
        process.kill()
    assert all(map(is_gone, paths))
    assert not list(temporary.glob("lowrank-*"))


@pytest.mark.slow
def test_a_second_process_that_lingers_does_not_hold_up_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(process_group, "GRACE", 0.5)
    act("print=done", f"stubborn={tmp_path / 'second'}")
    assert is_gone(tmp_path / "second")


def test_the_command_that_is_stopped_says_with_which_signal(tmp_path):
    with pytest.raises(Stopped) as caught:
        act("signal=15", "print=")
    assert caught.value.code == 143
