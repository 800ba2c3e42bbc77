"""Jobs that take no network: they write a record, and do before what their arguments say."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiment import ExperimentError, Record, Run
from experiment.execute import at_work_on
from experiment.files import write_whole
from experiment.folder import RunFolder
from experiment.jobs import Job, Program
from experiment.signals import check


def run_of(seed: int) -> Run:
    return Run("classification", "A", "mcunet", "pets", "asi", 2, seed)


def job(root: Path, seed: int, what: str = "write", *needs: int) -> Job:
    """A job that does `what`, and needs others' records."""
    folders = [str(run_of(need).folder(root)) for need in needs]
    return Job(f"seed {seed}", run_of(seed), (str(root), str(seed), what, *folders))


def do(arguments: Sequence[str]) -> None:
    root, seed, what, *needs = arguments
    run = run_of(int(seed))
    for need in needs:
        if not (Path(need) / "result.json").is_file():
            raise ExperimentError(f"there is no record in {need}")
    if what == "fail":
        raise ExperimentError("there are no data")
    if what == "break":
        raise RuntimeError("out of memory")
    folder = RunFolder(run.folder(Path(root)), {}, "result.json", run=run)
    with at_work_on(run, folder, ""):
        with (folder.path / "times").open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {time.time()}\n")
        print(f"working on {seed}")
        print(f"a word of {seed}", file=sys.stderr)
        if what in ("epochs", "held", "late"):
            _epochs(folder, 6, held=what != "epochs")
        if what == "late":
            raise ExperimentError("there are no data")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "meet":  # until another one is at work as well
            _wait(lambda: len(list(Path(root).rglob("times"))) > 1)
        if what == "last":
            try:
                (folder.path / "waiting").touch()  # from here on a signal finds it where it saves
                _wait(lambda: False)
            finally:
                (folder.checkpoints / "last.ckpt").write_text("saved")
        Record(run, {"test": int(seed) / 1000}, {}, {}, {}, {"config_hash": folder.identity_hash}).save(folder.path)


def _epochs(folder: RunFolder, count: int, held: bool) -> None:
    """Epochs, each written down when it is saved; a killed run goes on where it was saved.

    In a job of Slurm, where it may be killed, each lasts for a moment. One that is held does not end in the first start
    of its job, as long as that may be.
    """
    within = "SLURM_JOB_ID" in os.environ
    held = held and os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and within
    last = folder.checkpoints / "last.ckpt"
    done = last.read_text() if last.exists() else ""
    for epoch in range(len(done.split()), count):
        if held and epoch == count - 1:
            _wait(lambda: False)
        end = time.monotonic() + 0.3 * within
        while time.monotonic() < end:
            check()
            time.sleep(0.02)
        done += f"{epoch}\n"
        write_whole(last, done)


def _wait(condition) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        check()
        time.sleep(0.02)


PROGRAM = Program("python -m working", do)
