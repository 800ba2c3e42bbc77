"""A sweep on Slurm: one array of jobs for all runs that need equally many others before them, and the report at last.

submitit writes the batch files and what each job gets. A job is one run, by the run's ordinary command. Before its time
is over, or when it has to make room, Slurm sends it a signal: the run saves, ends, and the batch file asks Slurm to
start it again, which it does as well where the run was killed. A run that is in work elsewhere is waited for.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment.command import Work, finish
from experiment.errors import ExperimentError
from experiment.jobs import (
    PAUSE,
    Job,
    Outcome,
    Program,
    conclude,
    do_job,
    forget_failure,
    needed,
    note_plan,
    refuse_job,
    write_log,
    write_report,
)
from experiment.lock import holder
from experiment.warned import say_warnings

LOG = "slurm.log"  # in a run's folder
SUBMITTED = ".slurm"  # folder of batch files and what submitit writes beside them, below that of all runs
NOTICE = 90  # seconds before the end of a job's time at which Slurm says so
RESTARTS = 10  # times that a job is started again though it has saved nothing new
NOTICES = (signal.SIGUSR2, signal.SIGUSR1)  # the first is asked for; `--slurm.signal` may ask for the other
_SAVED = 128 + signal.SIGUSR2  # exit code of a job that was told to end, and is further than at its start
LARGEST = 1000  # jobs of an array: Slurm's own limit, MaxArraySize, is 1001 where nobody has set it

SETUP = [
    "export SUBMITIT_PREEMPT_SIGNAL=URG",  # which never comes: submitit would not save at what Slurm sends
    "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}}",
    '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',  # since 22.05 srun asks
]
TEARDOWN = [
    "code=$?",
    "again=${SLURM_RESTART_COUNT:-0}",
    # By its number alone the last job of an array is the whole array, whose other jobs would be started again as well.
    'job="${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"',
    f'if [ "$code" -eq {_SAVED} ] || {{ [ "$code" -ge 128 ] && [ "$again" -lt {RESTARTS} ]; }}; then',
    # A controller that is busy, or is being started anew, does not answer at once.
    '  for pause in 2 10 30 0; do scontrol requeue "${job:-$SLURM_JOB_ID}" && break; sleep "$pause"; done',
    "fi",
    'exit "$code"',
]


def submit(
    jobs: Sequence[Job],
    program: Program,
    root: Path,
    options: Mapping[str, str | bool],
    workers: int | None = None,
    wait: bool = False,
) -> int:
    """Give Slurm all jobs but those that this same command has done, and the report after them.

    Args:
        jobs: of a sweep, in an order in which each comes after what it needs.
        program: how each is done.
        root: folder of all runs, which every machine of the cluster has.
        options: of sbatch, for each job: names without dashes ahead, and values; True for an option that has none.
        workers: how many jobs of an array run at a time; None for as many as Slurm likes.
        wait: whether to come back only when Slurm has no job of these any more.

    Returns:
        0 once they are submitted, or done if they are waited for; 1 after a list of what is not.

    Raises:
        ExperimentError: the folder cannot be written, or Slurm is not there, or does not take them; then it has none.
    """
    start = time.perf_counter()
    note_plan(jobs, root)
    left = [job for job in jobs if not job.known(root)]  # what is done by another command may be refused by this one
    for job in jobs:
        if job not in left:
            forget_failure(job, root)
    if not left:
        return conclude(jobs, dict.fromkeys(jobs, Outcome.DONE), root, 0.0)
    queue = _Queue(root / SUBMITTED / time.strftime("%Y%m%d-%H%M%S"), options, workers)
    needs = needed(jobs, root)
    last: list[str] = []
    for number, stage in enumerate(stages(left, needs), start=1):
        last = queue.add(f"stage {number}", [(do, job, needs[job], program, root) for job in stage], last)
        print(f"stage {number}: {len(stage)} runs as {', '.join(last)}, such as {stage[0].title}", flush=True)
    queue.add("report", [(report, root)], last)
    ids = " ".join(queue.ids)
    print(f"{len(left)} of {len(jobs)} runs submitted, {len(jobs) - len(left)} done before; the report comes last")
    watch = shlex.join(["python", "-m", "report", "--watch", str(root)])
    print(f"how far they are: {watch}\nto cancel them: scancel {ids}", flush=True)
    if not wait:
        return 0
    queue.wait()
    return conclude(jobs, {job: _found(job, root) for job in jobs}, root, time.perf_counter() - start)


def stages(jobs: Sequence[Job], needs: Mapping[Job, Sequence[Job]]) -> list[list[Job]]:
    """Jobs by how many others have to be done one after the other before them, of those that are among them."""
    depth: dict[Job, int] = {}
    for job in jobs:
        depth[job] = 1 + max((depth[other] for other in needs[job] if other in depth), default=-1)
    found: dict[int, list[Job]] = defaultdict(list)
    for job, number in depth.items():
        found[number].append(job)
    return [found[number] for number in sorted(found)]


class _Queue:
    """What Slurm was given."""

    def __init__(self, folder: Path, options: Mapping[str, str | bool], workers: int | None) -> None:
        self._folder, self._workers = folder, workers
        self._options = {"requeue": True, "signal": f"{NOTICES[0].name.removeprefix('SIG')}@{NOTICE}", **options}
        self.ids: list[str] = []

    def add(self, name: str, calls: Sequence[tuple[Any, ...]], after: Sequence[str]) -> list[str]:
        """Submit functions, each with its arguments, that begin when others have ended; the numbers of their jobs."""
        added = []
        for start in range(0, len(calls), LARGEST):
            try:
                added.append(self._submit(name, calls[start : start + LARGEST], after))
            except Exception as error:  # submitit and what it calls have many kinds
                self.cancel()
                words = " ".join(str(error).split())[:300]
                raise ExperimentError(f"Slurm has not taken the jobs ({words}); see the options --slurm.*") from None
            self.ids.append(added[-1])
        return added

    def _submit(self, name: str, calls: Sequence[tuple[Any, ...]], after: Sequence[str]) -> str:
        import submitit

        executor = submitit.SlurmExecutor(self._folder)
        told: dict[str, Any] = {"job_name": re.sub(r"\W+", "-", f"lowrank {name}")}
        told |= {"setup": SETUP, "teardown": TEARDOWN, "array_parallelism": self._workers or len(calls)}
        if after:
            told["dependency"] = "afterany:" + ":".join(after)
        executor.update_parameters(**told, additional_parameters=self._options)
        with executor.batch():
            jobs = [executor.submit(*call) for call in calls]
        return str(jobs[0].job_id).partition("_")[0]

    def cancel(self) -> None:
        """Take back what was submitted."""
        if self.ids:
            subprocess.run(["scancel", *self.ids], check=False, capture_output=True)

    def wait(self) -> None:
        """Return when Slurm has no job of these any more; a signal leaves them with it."""
        command = ["squeue", "--noheader", "--jobs", ",".join(self.ids), "--format", "%i"]
        while True:
            found = subprocess.run(command, check=False, capture_output=True, text=True)
            if found.returncode == 0 and not found.stdout.strip():
                return
            if found.returncode and "Invalid job id" in found.stderr:  # it has forgotten them
                return
            time.sleep(PAUSE)


def _found(job: Job, root: Path) -> Outcome:
    if job.log(root).exists():  # beside a result too, of other settings
        return Outcome.FAILED
    return Outcome.DONE if job.done(root) else Outcome.ELSEWHERE


def do(job: Job, needs: Sequence[Job], program: Program, root: Path) -> None:
    """Do a job within one of Slurm's; ends the process with its exit code.

    Args:
        job: to do.
        needs: those that it needs; what is in work elsewhere is waited for.
        program: how it is done.
        root: folder of all runs.
    """
    told: list[int] = []
    folder = job.run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    say_warnings()
    with _logged(folder / LOG):
        before = _state(folder)

        def attempt(work: Work) -> int:
            _hear(told)  # not sooner, as submitit does nothing at SIGTERM; till then it ends the process
            work.title = job.title
            while any(_is_elsewhere(other, root) for other in needs):
                time.sleep(PAUSE)
            undone = [other for other in needs if _found(other, root) is not Outcome.DONE]
            if undone and not job.known(root):
                refuse_job(job, undone[0], program, root)
                return 1
            while (outcome := do_job(job, program, root)) is Outcome.ELSEWHERE:
                time.sleep(PAUSE)
            return 0 if outcome is Outcome.DONE else 1

        code = finish(attempt)
        if code >= 128 and told and _state(folder) != before:
            code = _SAVED
        elif code >= 128 and int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= RESTARTS:
            why = f"started {RESTARTS + 1} times, it has saved nothing new in its time; give it more: --slurm.time"
            print(f"  failed: {why}", file=sys.stderr)
            write_log(job, root, f"{job.title}\n{program.line(job)}\n{why}\n")
            code = 1
    raise SystemExit(code)


def _is_elsewhere(job: Job, root: Path) -> bool:
    return holder(job.run.folder(root), asks=True) is not None and not job.done(root)


def _hear(told: list[int]) -> None:
    """From now on what Slurm sends does what SIGTERM does, and is put into `told`."""
    owner = os.getpid()

    def hear(number: int, *_: Any) -> None:
        if not told and os.getpid() == owner:  # it may come several times, and a second SIGTERM ends at once
            told.append(number)
            os.kill(owner, signal.SIGTERM)

    def listen() -> None:
        while True:
            hear(signal.sigwait(NOTICES))

    # Slurm sends it to all processes of a job. What this one starts has it blocked like this one, and goes on.
    for number in NOTICES:
        signal.signal(number, hear)
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
    threading.Thread(target=listen, daemon=True, name="slurm").start()


def _state(folder: Path) -> dict[str, int]:
    """What was saved of a run, by when each file was written."""
    found = {}
    for path in (folder / "checkpoints").glob("[!.]*"):
        with contextlib.suppress(OSError):
            found[path.name] = path.stat().st_mtime_ns
    return found


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """All that this process and those it starts print goes to the end of a file."""
    with path.open("ab") as file:
        job, attempt = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        file.write(f"--- job {job}, start {int(attempt) + 1}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        file.flush()
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
    yield


def report(root: Path) -> None:
    """Write the report of all runs, within a job of Slurm."""
    raise SystemExit(write_report(root))
