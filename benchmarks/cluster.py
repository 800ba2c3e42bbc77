"""A Slurm of one machine, in a folder of its own, by Debian's packages `slurm-wlm` and `munge`."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATIENCE = 60  # seconds that it has to start
ANSWER = 100  # seconds that it has to answer a command
SOON = 2  # seconds that what was queued again waits at least
PROMPT = 3  # and one that is not waited for longer
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_CONFIG = """
ClusterName=lowrank
SlurmctldHost={host}(127.0.0.1)
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
KillWait=10
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:{share}
"""


class ClusterError(Exception):
    """Slurm is not there, or has not started; says why."""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_PATH) is None]
    return f"Debian's slurm-wlm and munge are not installed: no {', '.join(absent)}" if absent else None


class Cluster:
    """Slurm as long as the block lasts; its commands find it by the environment's SLURM_CONF.

    Args:
        jobs: how many can run at a time.

    Raises:
        ClusterError: it has not started.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._waiting: dict[str, float] = {}  # jobs that were queued again, and since when that is known
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        if (why := missing()) is not None:
            raise ClusterError(why)
        with contextlib.ExitStack() as stack:
            # munge wants a path that everybody may enter, which a test's own folder is not.
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-slurm-", dir="/tmp")))
            self._configure()
            stack.enter_context(_variable("SLURM_CONF", str(self.folder / "slurm.conf")))
            munge = [
                f"--{name}={self.folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file")
            ]
            munge += [f"--log-file={self.folder}/munge/log", f"--seed-file={self.folder}/munge/seed"]
            for command in (["munged", "--foreground", *munge], ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
                stack.enter_context(_daemon(command, self.folder))
            self._wait()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user", getpass.getuser()], check=False, capture_output=True)
        end = time.monotonic() + PATIENCE
        while not self.is_empty and time.monotonic() < end:  # or what is at work would be left behind
            time.sleep(0.1)
        self._stack.close()

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        for name, mode in (("munge", 0o711), ("state", 0o755), ("spool", 0o755)):
            (self.folder / name).mkdir()
            (self.folder / name).chmod(mode)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        told = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "folder": self.folder}
        cpus = os.cpu_count() or 1
        told |= {"ports": free_ports(2), "cpus": cpus, "share": -(-self._jobs // cpus)}
        told["first"] = 1 + secrets.randbelow(4_000)  # the processes of a job meet at a port that follows from it
        (self.folder / "slurm.conf").write_text(_CONFIG.format(**told))

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if "idle" in _output(["sinfo", "--noheader", "--format", "%T"]):
                return
            time.sleep(0.3)
        logs = (path.read_text(errors="replace")[-300:] for path in sorted(self.folder.glob("*.log")))
        raise ClusterError(f"Slurm has not started within {PATIENCE} s: {' | '.join(logs)}")

    def running(self) -> list[str]:
        """Names of the runs' jobs that are at work, such as "12_3"."""
        found = _output(["squeue", "--noheader", "--states", "R", "--format", "%i %j"]).splitlines()
        return [line.split()[0] for line in found if "stage" in line]

    @property
    def is_empty(self) -> bool:
        """Whether it has no job any more."""
        found = _run(["squeue", "--noheader"])
        return found.returncode == 0 and not found.stdout.strip()

    def hurry(self) -> None:
        """Let what was queued again begin soon, where Slurm would wait for two minutes.

        Not at once: within the second in which a job was ended, Slurm holds its new start for the old one, and ends it.
        """
        now = time.monotonic()
        listed = _output(["squeue", "--noheader", "--states", "PD", "--array", "--format", "%i %r"]).splitlines()
        waiting = [line.split()[0] for line in listed if line.split()[1:] == ["BeginTime"]]
        self._waiting = {name: self._waiting.get(name, now) for name in waiting}
        for name, since in self._waiting.items():
            if now - since >= SOON:
                _output(["scontrol", "update", f"JobId={name}", "StartTime=now"])

    def disturb(self, name: str, how: str) -> None:
        """Do to a job what happens on clusters, once.

        Args:
            name: of the job.
            how: "signal" for Slurm's own before the end of a job's time, "kill" for SIGKILL to all that it has started,
                "requeue" for what an administrator may do.
        """
        commands = {
            "signal": ["scancel", "--signal=USR2", name],
            "kill": ["scancel", "--signal=KILL", f"{name}.0"],
            "requeue": ["scontrol", "requeue", name],
        }
        # Told that a job "can not be altered now", which has heard the signal all the same, scancel sends it again for
        # minutes, and the job's next start would hear it too.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _run(commands[how], PROMPT)


@contextlib.contextmanager
def _daemon(command: Sequence[str], folder: Path) -> Iterator[None]:
    process = subprocess.Popen(
        command,
        env=os.environ | {"PATH": _PATH},
        stdout=(folder / f"{command[0]}.out").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _run(command: Sequence[str], limit: float = ANSWER) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit)


def _output(command: Sequence[str]) -> str:
    return _run(command).stdout


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens, of those that the system gives to nobody who does not ask for them."""
    found: set[int] = set()
    while len(found) < count:
        port = 20_000 + secrets.randbelow(9_000)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.add(port)
    return sorted(found)
