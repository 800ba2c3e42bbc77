"""Several processes of this machine that do the jobs of a sweep, each one job at a time.

submitit starts them, each with its share of the processor and with an accelerator of its own where there are several.
This process hands out the jobs, prints what each has said once it is over, and ends the others when it ends itself,
however it does: they see their connection close, and stop as at SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

from experiment.command import Work, finish
from experiment.jobs import Job, Outcome, Program, Tally, do_job, write_log
from experiment.process_group import cores
from experiment.signals import Stopped
from experiment.warned import say_warnings

LOOK = 2.0  # seconds between two looks whether one has died before it said a word
GRACE = 120.0  # seconds that a worker has to save and end when it is asked to
_FOR_EVER = 60 * 24 * 365 * 10  # minutes


@dataclass(frozen=True)
class Told:
    """What a worker says of a job: how it ended, what it printed, and how many seconds it took."""

    outcome: Outcome
    output: str
    errors: str
    seconds: float


@dataclass
class _Worker:
    """One of the processes: as submitit knows it, and how it is talked to once it is there."""

    process: Any
    connection: Connection | None = None
    pid: int = 0
    job: Job | None = None
    folder: Path = field(default_factory=Path)

    @property
    def last_words(self) -> str:
        """What it wrote at its end."""
        try:
            lines = (self.process.stderr() or "").splitlines()
        except OSError:
            lines = []
        return "\n".join(lines[-20:])


class Workers:
    """The processes; a context, at whose end they have ended.

    Args:
        program: how a job is done.
        root: folder of all runs.
        count: how many there are.
    """

    def __init__(self, program: Program, root: Path, count: int) -> None:
        self._program, self._root, self._count = program, root, count
        self._workers: dict[int, _Worker] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Workers:
        place = tempfile.gettempdir()
        place = place if len(os.fsencode(place)) < 70 else "/tmp"  # the name of a socket has about 100 bytes at most
        made = tempfile.TemporaryDirectory(prefix="lowrank-", dir=place, ignore_cleanup_errors=True)
        self._folder = Path(self._stack.enter_context(made))
        self._server = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._server.bind(str(self._folder / "jobs"))
        self._server.listen(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._stack.close()

    def run(self, jobs: Sequence[Job]) -> dict[Job, Outcome]:
        """Do jobs, each once those that it needs have ended; what each prints stands together."""
        tally, waiting = Tally(jobs, self._root, self._count), list(jobs)
        try:
            while waiting or any(worker.job for worker in self._workers.values()):
                self._hand_out(waiting, tally)
                for number, told in self._hear():
                    self._note(number, told, tally)
        except Stopped as stop:
            stop.during = ", ".join(worker.job.title for worker in self._workers.values() if worker.job is not None)
            raise
        return tally.outcomes

    def _note(self, number: int, told: Told | None, tally: Tally) -> None:
        job, self._workers[number].job = self._workers[number].job, None
        if told is None:
            self._bury(number, job, tally)
        elif job is not None:
            print(tally.heading(job), told.output, sep="\n", end="", flush=True)
            print(told.errors, end="", file=sys.stderr, flush=True)
            tally.add(job, told.outcome, told.seconds)

    def _hand_out(self, waiting: list[Job], tally: Tally) -> None:
        for job in list(waiting):
            if tally.waits_for(job):
                continue
            if tally.leave_out(job, self._program):
                waiting.remove(job)
                continue
            number = self._idle()
            if number is None:
                return
            worker = self._workers[number]
            assert worker.connection is not None
            with contextlib.suppress(OSError):  # it has just died, which is seen when it is listened to
                worker.connection.send(job)
            worker.job = job
            waiting.remove(job)

    def _idle(self) -> int | None:
        """One that is there and has no job; starts those that are not there yet."""
        for number in range(self._count):
            if number not in self._workers:
                self._workers[number] = self._start(number)
        every = self._workers.items()
        return next((number for number, worker in every if worker.connection is not None and worker.job is None), None)

    def _start(self, number: int) -> _Worker:
        import submitit

        executor = submitit.LocalExecutor(self._folder)
        executor.update_parameters(timeout_min=_FOR_EVER)
        told = (number, str(self._folder / "jobs"), self._program, self._root)
        with _environment(share(os.environ, self._count)), _deaf(signal.SIGINT):
            return _Worker(executor.submit(work, *told))

    def _hear(self) -> Iterator[tuple[int, Told | None]]:
        """What workers say, each with its number; None of one that has died."""
        talking = {worker.connection: number for number, worker in self._workers.items() if worker.connection}
        for source in wait([self._server, *talking], LOOK):
            if not isinstance(source, Connection):
                self._greet()
                continue
            try:
                yield talking[source], source.recv()
            except (EOFError, OSError):
                yield talking[source], None
        silent = [number for number, worker in self._workers.items() if worker.connection is None]
        for number in silent:
            if self._workers[number].process.done():
                yield number, None

    def _greet(self) -> None:
        accepted, _ = self._server.accept()
        connection = Connection(accepted.detach())
        with contextlib.suppress(EOFError, OSError):
            number, pid = connection.recv()
            self._workers[number].connection, self._workers[number].pid = connection, pid

    def _bury(self, number: int, job: Job | None, tally: Tally) -> None:
        """A worker has died: its job has failed, and another one takes its place.

        Raises:
            RuntimeError: it died before it was given anything to do.
        """
        worker = self._workers.pop(number)
        if job is None:
            raise RuntimeError(f"a worker ended before it had anything to do:\n{worker.last_words}")
        why = "its process was killed, by the system if memory ran out; the same command goes on"
        print(tally.heading(job), flush=True)
        print(f"  failed: {why}", file=sys.stderr, flush=True)
        write_log(job, self._root, f"{job.title}\n{self._program.line(job)}\n{why}\n{worker.last_words}\n")
        tally.add(job, Outcome.FAILED)

    def _end(self) -> None:
        """Ask all to end, which they do as at SIGTERM, and kill those that do not."""
        self._server.close()  # for those that are not there yet
        for worker in self._workers.values():
            if worker.connection is not None:
                with contextlib.suppress(OSError):  # it has ended by itself
                    worker.connection.send(None)
                worker.connection.close()
        end = time.monotonic() + GRACE
        for worker in self._workers.values():
            while not worker.process.done() and time.monotonic() < end:
                time.sleep(0.1)
            if worker.pid and not worker.process.done():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.pid, signal.SIGKILL)


def accelerators() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for each accelerator alone; none where there is none.

    PyTorch counts them by asking the driver, so that the variable may still be set afterwards.
    """
    import torch

    count = torch.cuda.device_count()
    told = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return told[:count] if told else [str(number) for number in range(count)]


def share(environment: Mapping[str, str], count: int) -> dict[str, str]:
    """The variables by which each of so many processes takes its share of the processor's threads."""
    return {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, cores() // count))}


def work(number: int, address: str, program: Program, root: Path) -> None:
    """Do jobs, in a process of its own, as long as there is somebody who hands them out.

    Args:
        number: of this worker.
        address: of the socket of the one who hands them out.
        program: how a job is done.
        root: folder of all runs.
    """
    say_warnings()
    with contextlib.suppress(PermissionError):
        os.setsid()  # a terminal's Ctrl-C goes to the one who hands out jobs
    if devices := accelerators():  # counted here, where PyTorch is loaded in any case
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    connection = Client(address, "AF_UNIX")
    connection.send((number, os.getpid()))
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    alone = threading.Event()
    threading.Thread(target=_receive, args=(connection, jobs, alone), daemon=True, name="jobs").start()

    def loop(_: Work) -> int:
        while True:
            job = jobs.get()
            start = time.perf_counter()
            with captured() as texts:
                outcome = do_job(job, program, root)
            output, errors = texts
            connection.send(Told(outcome, output, errors, time.perf_counter() - start))

    code = finish(loop)
    if alone.is_set():
        shutil.rmtree(Path(address).parent, ignore_errors=True)  # who would do so may be killed
    raise SystemExit(code)


def _receive(connection: Connection, jobs: queue.SimpleQueue[Job], alone: threading.Event) -> None:
    """Take jobs as long as there is somebody who hands them out, and then end this process: at a word of theirs, or
    alone, where they are gone without one."""
    try:
        while (job := connection.recv()) is not None:
            jobs.put(job)
    except (EOFError, OSError):
        alone.set()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Two texts, there at the end of the block: what this process and those it starts print in it, and its errors."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        files = {sys.stdout: output, sys.stderr: errors}
        before = {stream: os.dup(number) for number, stream in ((1, sys.stdout), (2, sys.stderr))}
        for number, file in ((1, output), (2, errors)):
            os.dup2(file.fileno(), number)
        try:
            yield texts
        finally:
            for number, (stream, file) in enumerate(files.items(), start=1):
                stream.flush()
                os.dup2(before[stream], number)
                os.close(before[stream])
                file.seek(0)
                texts.append(_settled(file.read().decode(errors="replace")))


def _settled(text: str) -> str:
    """A text as a terminal shows it at last: of a line that was written over, what it ended as."""
    lines = text.split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


@contextlib.contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _deaf(number: signal.Signals) -> Iterator[None]:
    """What is started in this block ignores a signal, unless it says otherwise."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
