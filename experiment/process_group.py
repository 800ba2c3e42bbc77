"""A run of several processes of this machine: started, watched and ended together, by the process of the command.

The command's own process trains nothing. It starts the others with the command's own arguments, hands signals on, and
when one of them ends badly, it ends the others and says, in one line, why the first of them did. Should it be killed
itself, the others end too: each watches its standard input, which closes then.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment.errors import ExperimentError, InUseError
from experiment.files import write_whole
from experiment.signals import Stopped

GROUP = "LOWRANK_GROUP"  # environment variable: the folder by which the processes of a run meet and say how they ended
STORE = "store"  # file in it
GRACE = 10.0  # seconds that a process has to end when it is asked to, and the others when the first is done
SETTLE = 1.0  # seconds in which those that were waiting for a process that is gone notice it
PER_CORE, LEAST_ROOM = 4, 16  # processes that may be started on a machine: for each of its cores; at least
KINDS = {"in_use": InUseError, "mendable": ExperimentError}


def require_room(option: str, count: int) -> None:
    """Refuse to start more processes than this machine could bear.

    Args:
        option: that asks for them, and its value.
        count: of the processes.

    Raises:
        ExperimentError: they are too many.
    """
    most = max(LEAST_ROOM, PER_CORE * (os.cpu_count() or 1))
    if count > most:
        raise ExperimentError(f"{option} asks for {count} processes; allowed are up to {most} on this machine")


def cores() -> int:
    """Of the processor, those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class KilledError(ExperimentError):
    """A process of a run was killed from outside."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class ProcessError(Exception):
    """An error in a process of a run that no user can mend; its notes have the traceback from there."""


def is_started() -> bool:
    """Whether this process is one of those that `run_all` has started."""
    return GROUP in os.environ


def rank() -> int:
    """Which of them it is."""
    return int(os.environ["RANK"])


@functools.cache
def follow() -> None:
    """In a process that `run_all` has started: end when the one that has started it is gone."""
    if is_started():
        threading.Thread(target=_end_with_parent, daemon=True, name="follow").start()


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    shutil.rmtree(os.environ[GROUP], ignore_errors=True)  # who would do so was killed
    os.kill(os.getpid(), signal.SIGKILL)


def report(error: BaseException, code: int, text: str, mendable: bool) -> bool:
    """Leave it to the process that has started this one to say how this one ended. False if none has started it.

    Args:
        error: that ended it.
        code: its exit code.
        text: what there is to say.
        mendable: whether that is all that a user needs.
    """
    if not is_started():
        return False
    kind = "in_use" if isinstance(error, InUseError) else "mendable" if mendable else "other"
    content = {
        "at": time.monotonic_ns(),  # of the machine, so that those of its processes compare
        "code": code,
        "kind": "stopped" if isinstance(error, Stopped) else kind,
        "text": text,
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_whole(_report_of(Path(os.environ[GROUP]), rank()), json.dumps(content))
    return True


def _report_of(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def run_all(module: str, arguments: Sequence[str], count: int) -> None:
    """Do a command in several processes of this machine; returns when all of them are done.

    Args:
        module: of the command, as in `python -m module`.
        arguments: of the command; each process gets the same.
        count: of the processes.

    Raises:
        ExperimentError: what one of them says that a user can mend, that one was killed, or that they are too many.
        Stopped: a signal came, here or to one of them.
        ProcessError: any other error in one of them.
    """
    require_room("the run", count)
    with tempfile.TemporaryDirectory(prefix="lowrank-") as folder:
        group = _Group(Path(folder), count)
        number = signal.SIGTERM
        try:
            group.start([sys.executable, "-m", module, *arguments])
            failed = group.wait()
            ending = group.ending(failed) if failed else None
        except Stopped as stop:
            number = signal.Signals(int(str(stop.code)) - 128)
            raise
        finally:
            group.end(number)
        if ending is not None:
            raise ending


class _Group:
    """The processes of one run."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.processes: list[subprocess.Popen[bytes]] = []
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def start(self, command: Sequence[str]) -> None:
        for number in range(self.count):
            environment = os.environ | {
                **{GROUP: str(self.folder), "RANK": str(number), "LOCAL_RANK": str(number), "NODE_RANK": "0"},
                **{"WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(self.count)},
            }
            if sys.platform == "linux":
                environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, whatever its name is
            environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            with self._words(number).open("wb") as words:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=None if number == 0 else subprocess.DEVNULL,
                    stderr=None if number == 0 else words,
                    start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is handed on
                )
            self.processes.append(process)
            threading.Thread(target=self._watch, args=(number, process), daemon=True).start()

    def _watch(self, number: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(number)

    def _words(self, number: int) -> Path:
        return self.folder / f"{number}.err"

    def wait(self) -> list[int]:
        """Wait until all are done, or one has ended badly; the numbers of those that have."""
        running, first_done = set(range(self.count)), False
        while running:
            try:
                number = self._ended.get(timeout=GRACE if first_done else None)
            except queue.Empty:  # the run is done, and has its record
                return []
            running.discard(number)
            if self.processes[number].returncode:
                return self._settled(number, len(running))
            first_done = first_done or number == 0
        return []

    def _settled(self, number: int, running: int) -> list[int]:
        failed = [number]
        end = time.monotonic() + SETTLE
        with contextlib.suppress(queue.Empty):
            for _ in range(running):
                failed.append(self._ended.get(timeout=max(0.0, end - time.monotonic())))
        return [number for number in failed if self.processes[number].returncode]

    def ending(self, failed: Sequence[int]) -> BaseException:
        """What the first of those that ended badly died of: of others' deaths a process may die as well."""
        reports = {number: _read(_report_of(self.folder, number)) for number in failed}
        silent = all(found is None for found in reports.values())
        for number, found in reports.items():
            code = self.processes[number].returncode
            # A library aborts a process also for the loss of the others, so that what one of them says comes first.
            if found is None and code < 0 and (silent or code != -signal.SIGABRT):
                name = signal.Signals(-code).name
                return KilledError(
                    f"process {number} of {self.count} was killed ({name}), by the system if memory ran out; the same "
                    f"command goes on",
                    128 - code,
                )
        told = {number: found for number, found in reports.items() if found is not None}
        if not told:
            number = failed[0]
            lines = self._words(number).read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
            return ProcessError(f"{self._name(number)}it ended with {self.processes[number].returncode}: {last}")
        first = min(told, key=lambda number: told[number]["at"])
        same = [number for number, found in told.items() if found["text"] == told[first]["text"]]
        return self._error(min(same), told[first])

    def _error(self, number: int, found: dict[str, Any]) -> BaseException:
        if found["kind"] == "stopped":
            return Stopped(found["code"] - 128)
        error = KINDS.get(found["kind"], ProcessError)(self._name(number) + found["text"])
        if isinstance(error, ProcessError):
            error.add_note(f"\nIn process {number} of {self.count}:\n{found['traceback']}")
        return error

    def _name(self, number: int) -> str:
        return "" if number == 0 else f"process {number} of {self.count}: "

    def end(self, number: int) -> None:
        """End those that are still at work: asked to at first, then killed, with what they have started."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        end = time.monotonic() + GRACE
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            finally:
                _kill(process.pid)
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of it
        os.killpg(group, signal.SIGKILL)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except (OSError, ValueError):
        return None
