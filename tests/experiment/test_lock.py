"""One holder of a folder at a time, whoever asks and however the last one ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiment import lock
from experiment.errors import InUseError
from experiment.lock import LEASE, LOCK, Holder, hold, holder

ROOT = Path(__file__).parents[2]
RACER = """
import os, sys, time
from pathlib import Path
from experiment.errors import InUseError
from experiment.lock import hold
folder = Path(sys.argv[1])
while len(done := list(folder.glob("done*"))) < 20:
    try:
        with hold(folder):
            number = len(list(folder.glob("done*")))
            inside = folder / "inside"
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            if number < 20:
                (folder / f"done{number}").write_text(sys.argv[2])
            inside.unlink()
    except InUseError:
        time.sleep(0.001)
"""
KEEPER = """
import sys
from pathlib import Path
from experiment.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, **options)


def leave(folder, age, **changes):
    """The file of a holder that last touched it so many seconds ago."""
    path = folder / f"{LOCK}elsewhere"
    path.write_text(json.dumps(asdict(replace(Holder.own(), **changes))))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_of_processes_that_race_one_at_a_time_holds_the_folder(tmp_path):
    racers = [python(RACER, tmp_path, number) for number in range(3)]
    assert [racer.wait(100) for racer in racers] == [0, 0, 0]  # none has found another one inside
    assert len(list(tmp_path.glob("done*"))) == 20
    assert list(tmp_path.glob(f"{LOCK}*")) == []


def test_the_holder_is_named_and_goes_when_it_is_killed(tmp_path):
    with python(KEEPER, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout.readline() == b"held\n"
        named = f"process {keeper.pid} on {os.uname().nodename}"
        assert holder(tmp_path) == named
        with pytest.raises(InUseError, match=named), hold(tmp_path):
            pass
        keeper.kill()
        os.waitid(os.P_PID, keeper.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has waited for it yet
        assert holder(tmp_path) is None
        with hold(tmp_path):
            assert len(list(tmp_path.glob(f"{LOCK}*"))) == 1  # what was left of it is gone


@pytest.mark.parametrize(
    ("age", "changes", "held"),
    [
        (0, {"space": "another machine"}, True),
        (LEASE - 60, {"space": "another machine"}, True),
        (LEASE + 60, {"space": "another machine"}, False),
        (LEASE + 60, {}, True),  # this very process: alive, however long it has not touched its file
        (0, {"began": "long ago"}, False),  # its number is this process's now
    ],
)
def test_a_holder_elsewhere_is_given_up_by_age_and_one_here_once_it_is_gone(tmp_path, age, changes, held):
    path = leave(tmp_path, age, **changes)
    assert (holder(tmp_path) is not None) == held
    if held:
        with pytest.raises(InUseError), hold(tmp_path):
            pass
    else:
        with hold(tmp_path):
            assert not path.exists()


@pytest.mark.parametrize(("age", "held"), [(0, True), (LEASE + 60, False)])
def test_a_process_that_the_system_hides_is_there_as_long_as_it_touches_its_file(tmp_path, monkeypatch, age, held):
    """As `hidepid` makes it with those of other users: no file in /proc, and a number that is taken."""
    leave(tmp_path, age)
    read = Path.read_text

    def hidden(path, *arguments, **options):
        if str(path) == f"/proc/{os.getpid()}/stat":
            raise FileNotFoundError(2, "No such file or directory")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert (holder(tmp_path) is not None) == held


def test_a_job_that_slurm_starts_again_takes_over_from_its_earlier_try_on_another_machine(tmp_path, monkeypatch):
    leave(tmp_path, 0, space="another machine", job="17", attempt=0)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(InUseError, match="job 17 of Slurm"), hold(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with hold(tmp_path):
        pass


def test_who_only_looks_gives_up_a_time_ahead_that_nobody_has_changed_while_it_looked(tmp_path, monkeypatch):
    path, clock = leave(tmp_path, -(10**9), space="a machine whose clock is fast"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    before = path.stat().st_mtime
    for seconds, there in ((0, True), (LEASE - 1, True), (2, False)):
        clock += seconds
        assert (holder(tmp_path) is not None) == there
        assert path.stat().st_mtime == before
    os.utime(path, (before + 20, before + 20))  # its holder is there after all
    assert holder(tmp_path) is not None


@pytest.mark.parametrize("ask", [hold, lambda folder: contextlib.nullcontext(holder(folder, asks=True))])
def test_a_time_ahead_ages_from_the_moment_in_which_someone_asks(tmp_path, monkeypatch, ask):
    path = leave(tmp_path, -(10**9), space="a machine whose clock is fast")
    before = path.stat().st_mtime
    assert holder(tmp_path) is not None
    assert path.stat().st_mtime == before  # who only looks touches nothing
    with contextlib.suppress(InUseError), ask(tmp_path):
        pass
    assert path.stat().st_mtime <= time.time()
    assert holder(tmp_path) is not None  # it may be at work, and then touches its file
    monkeypatch.setattr(lock, "LEASE", -1.0)  # as if that time were over
    with hold(tmp_path):
        assert not path.exists()


def test_a_file_that_is_still_being_written_is_of_a_holder(tmp_path):
    (tmp_path / f"{LOCK}new").touch()
    with pytest.raises(InUseError, match="has not said its name"), hold(tmp_path):
        pass


@pytest.mark.parametrize(("age", "held"), [(0, True), (LEASE + 60, False)])
def test_a_file_that_this_user_may_not_read_is_of_a_holder_as_long_as_it_is_touched(tmp_path, monkeypatch, age, held):
    left, read = leave(tmp_path, age), Path.read_text

    def refused(path, *arguments, **options):
        if path == left:
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)  # as no file is refused to root
    with pytest.raises(InUseError, match=left.name) if held else contextlib.nullcontext(), hold(tmp_path):
        assert not left.exists()


def test_a_full_disk_leaves_no_file_that_holds_the_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"), hold(tmp_path):
            pass
    with hold(tmp_path):
        pass


def test_the_holder_touches_its_file_and_ends_when_that_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    came = Counter()
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.update([number]))
    try:
        with hold(tmp_path):
            (own,) = tmp_path.glob(f"{LOCK}*")
            os.utime(own, (0, 0))
            end = time.monotonic() + 60
            while own.stat().st_mtime == 0 and time.monotonic() < end:
                time.sleep(0.01)
            assert time.time() - own.stat().st_mtime < 60
            assert not came
            own.unlink()
            while not came and time.monotonic() < end:
                time.sleep(0.01)
        assert came == {signal.SIGTERM: 1}
    finally:
        signal.signal(signal.SIGTERM, before)
