"""How commands end: exit codes, one line, a log, signals."""

import argparse
import contextlib
import fcntl
import gc
import importlib
import io
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from experiment import ExperimentError
from experiment.command import finish, importing, underscored
from experiment.files import write_whole
from experiment.signals import Stopped, check, held

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command_in_one_line(heard_signals, capsys, number, code):
    before = signal.getsignal(number)

    def command(work):
        work.title = "a run"
        signal.raise_signal(number)
        pytest.fail("it went on")

    assert finish(command) == code
    assert capsys.readouterr().err == "interrupted during a run; the same command goes on\n"
    assert signal.getsignal(number) is before


def test_a_letter_that_a_terminal_of_the_locale_c_does_not_know_is_no_error(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert finish(lambda work: print("Δ test \ud800", flush=True)) == 0
    assert terminal.buffer.getvalue() == b"\\u0394 test \\ud800\n"


@pytest.mark.parametrize("end", [sys.exit, exit])
def test_code_of_others_that_ends_the_process_ends_no_run_without_a_word(capsys, end):
    def command(work):
        work.title = "a run"
        end(0)

    assert finish(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a run: ")
    assert "test_command.py, line" in line


def test_a_parser_may_end_a_command():
    with pytest.raises(SystemExit, match="0"):
        finish(lambda work: argparse.ArgumentParser().parse_args(["--help"]))


@pytest.mark.parametrize("disguise", [RuntimeError("worker exited"), KeyboardInterrupt(), SystemExit(1)])
def test_what_a_signal_raised_may_be_disguised(capsys, disguise):
    def command(work):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:
            raise disguise from None

    assert finish(command) == 143
    assert capsys.readouterr().err.count("\n") == 1


def test_a_swallowed_signal_is_found_by_the_next_check():
    def command(work):
        with contextlib.suppress(Stopped):
            signal.raise_signal(signal.SIGINT)
        check()
        pytest.fail("it went on")

    assert finish(command) == 130


IN_A_TERMINAL = """
import sys, time
from pathlib import Path
from experiment.command import finish
from experiment.signals import held, pending

def command(work):
    with held():
        print("ready", flush=True)
        while not pending():
            time.sleep(0.01)
        print("is saved", flush=True)
        Path(sys.argv[1]).write_text("whole")

sys.exit(finish(command))
"""


def test_a_closed_terminal_ends_a_command_which_saves_first(heard_signals, tmp_path):
    own, others = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path / "file")],
        **{"stdin": others, "stdout": others, "stderr": others},
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(others, termios.TIOCSCTTY, 0),
    )
    os.close(others)
    assert b"ready" in os.read(own, 100)
    os.close(own)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (tmp_path / "file").read_text() == "whole"


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert finish(lambda work: signal.raise_signal(signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_being_saved_is_finished_first(tmp_path, monkeypatch):
    def command(work):
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: (signal.raise_signal(signal.SIGTERM), fsync(handle)))
        write_whole(tmp_path / "file", "whole")

    # The second of its two flushes gives a second signal, which would not wait: the file has its name by then.
    assert finish(command) == 143
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "whole")]


def test_a_held_signal_takes_effect_at_the_end_of_the_block():
    reached = []

    def command(work):
        with held():
            signal.raise_signal(signal.SIGTERM)
            reached.append("end")
        reached.append("after")

    assert (finish(command), reached) == (143, ["end"])


def raising(error, title="a run", folder=None):
    def command(work):
        work.title, work.folder = title, folder
        raise error

    return command


def test_an_error_of_no_known_kind_is_one_line_and_a_log(tmp_path, capsys):
    assert finish(raising(KeyError("val\nloss"), folder=tmp_path)) == 1
    said = capsys.readouterr().err
    log = tmp_path / "failure.log"
    assert said.startswith("error: a run: KeyError: ")
    assert said.endswith(f"(traceback in {log})\n")
    assert said.count("\n") == 1
    assert "Traceback" in log.read_text()


def test_of_an_error_in_a_process_that_loads_images_the_line_has_the_cause(capsys):
    def command(work):
        frames = 'File "worker.py", line 374, in _worker_loop\n' * 20
        raise RuntimeError(f"Caught RuntimeError in worker.\nTraceback:\n{frames}RuntimeError: /dev/shm: No space left")

    assert finish(command) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: /dev/shm: No space left (traceback in ")


def test_without_a_folder_the_log_is_among_the_temporary_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert finish(raising(ValueError("x"), folder=tmp_path / "nowhere")) == 1
    (log,) = tmp_path.iterdir()
    assert "ValueError: x" in log.read_text()
    assert f"traceback in {log}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ExperimentError("do\nthis"), OSError(28, "No space left on device")])
def test_what_a_user_can_mend_is_one_line(capsys, error):
    assert finish(raising(error)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("looked_for", [True, False])
def test_no_garbage_is_looked_for_while_modules_are_imported(looked_for):
    (gc.enable if looked_for else gc.disable)()
    try:
        with importing():
            assert not gc.isenabled()
        assert gc.isenabled() is looked_for
        with pytest.raises(ImportError), importing():
            importlib.import_module("nothing_of_this_name")
        assert gc.isenabled() is looked_for
    finally:
        gc.enable()


def test_options_may_be_spelled_with_a_dash():
    words = ["--dry-run", "--data.batch-size=3", "--wandb", "my-project", "--runs-dir=a-b", "-c", "x-y.yaml"]
    told = ["--dry_run", "--data.batch_size=3", "--wandb", "my-project", "--runs_dir=a-b", "-c", "x-y.yaml"]
    assert underscored(words) == told


def test_a_reader_that_ends_early_is_no_error(tmp_path):
    program = "from experiment.command import finish; import sys; sys.exit(finish(lambda work: print('x' * 10**6)))"
    shell = f'{sys.executable} -c "{program}" 2>{tmp_path}/said | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.returncode) == ("x", 141)
    assert (tmp_path / "said").read_text() == ""
