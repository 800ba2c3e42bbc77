"""The lock of a folder: on a shared file system too it has one holder, says which, and goes with it.

The kernel's locks are of no use for this: some cluster file systems keep them within one machine without a word. Here
each process that wants the folder writes a file of its own into it, and then looks at those of the others: of two, the
later one sees the earlier one, whatever their machines. The holder touches its file now and then. A file is of nobody
any more once its process is gone, which another process of the same machine sees at once, and one of another machine by
the file's age, as the file system's own clock has it. A time that lies ahead, as a clock that is fast leaves it, would
keep a file young for as long: who asks for the folder sets it to now, from which it ages unless its holder touches it
again. A job that Slurm starts again takes over from its earlier try.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from experiment.errors import InUseError

LOCK = ".lock-"  # how the names of the files start
BEAT = 20.0  # seconds between two touches
LEASE = 300.0  # seconds without one after which a holder on another machine is given up
_TRIES = 4  # where two that ask at the same time see each other
_ahead: dict[Path, tuple[float, float]] = {}  # files whose times lie ahead: that time, and since when it was seen


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    Attributes:
        host: its machine.
        pid: its number there.
        space: in which that number is of one process: until the machine starts anew, and not of another container.
        began: when it was started, as the system counts; tells it from a later process of the same number.
        job: of Slurm, "" elsewhere.
        attempt: how often Slurm has started that job before.
        since: when it took the folder, seconds since 1970 by its own clock.
    """

    host: str
    pid: int
    space: str
    began: str
    job: str
    attempt: int
    since: float

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        job, attempt = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
        found = (_space(), _began(os.getpid()) or "", job, int(attempt) if attempt.isdecimal() else 0)
        return cls(socket.gethostname(), os.getpid(), *found, time.time())

    @property
    def is_gone(self) -> bool | None:
        """Whether it has ended; None where that cannot be seen from here."""
        if self.space == _space():
            began = _began(self.pid)
            return None if began == "" else began != self.began
        here = Holder.own()
        return True if self.job and self.job == here.job and self.attempt < here.attempt else None

    def __str__(self) -> str:
        job = f" (job {self.job} of Slurm)" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """Hold a folder, which is there, in this block, by a file in it.

    If the file of this process is lost in the block, because another one has given this one up, the block is ended as
    by SIGTERM.

    Raises:
        InUseError: another process holds it; says which.
        OSError: the folder cannot be written.
    """
    own = _take(folder)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(own, ended), daemon=True, name="lock")
    beating.start()
    try:
        yield own
    finally:
        ended.set()
        beating.join()
        own.unlink(missing_ok=True)


def holder(folder: Path, asks: bool = False) -> str | None:
    """Who holds a folder, in words; None if nobody does, as far as can be seen from here.

    Nothing in the folder is touched, but for times that lie ahead where who wants to know `asks` for the folder.
    """
    return next(iter(_others(folder, None, asks).values()), None)


def _take(folder: Path) -> Path:
    note = json.dumps(asdict(Holder.own())).encode()
    for attempt in range(_TRIES):
        own = folder / f"{LOCK}{secrets.token_hex(6)}"
        _write(own, note)
        others = _others(folder, own, asks=True)
        if not others:
            return own
        own.unlink(missing_ok=True)
        if attempt < _TRIES - 1:
            time.sleep(random.uniform(0.0, 0.05 * 2**attempt))
    raise InUseError(f"another process is at work in {folder}: {next(iter(others.values()))}; wait for it or stop it")


def _write(own: Path, note: bytes) -> None:
    """Write a file that is not there, whole or not at all: without a name in it, it would hold the folder a while."""
    handle = os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(handle, note)
    except BaseException:
        own.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _others(folder: Path, own: Path | None, asks: bool) -> dict[Path, str]:
    """The files of living holders but this one's own, and who they are; those of others are removed by who asks."""
    now = time.time() if own is None else own.stat().st_mtime  # by the clock of the file system, where that is known
    living = {}
    for path in sorted(folder.glob(f"{LOCK}*")):
        if path == own:
            continue
        try:
            touched = path.stat().st_mtime
            found = _read(path)
        except FileNotFoundError:  # it has gone
            continue
        age = now - touched
        if asks and age < -BEAT:
            with contextlib.suppress(OSError):  # of another user, or it has gone
                os.utime(path)
        elif age < -BEAT:
            age = _unchanged(path, touched)
        gone = None if found is None else found.is_gone
        if gone is False or (gone is None and age < LEASE):
            named = "a process that has not said its name" if found is None else str(found)
            living[path] = (
                named if gone is False else f"{named}, by {path.name} there, which is to be deleted if it is gone"
            )
        elif own is not None:
            path.unlink(missing_ok=True)
    return living


def _unchanged(path: Path, touched: float) -> float:
    """For how long, as far as this process has looked, a file has had the time that it has, by which it has no age."""
    seen, since = _ahead.get(path, (math.nan, 0.0))
    if seen != touched:
        _ahead[path] = touched, since = touched, time.monotonic()
    return time.monotonic() - since


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError):  # not for this user to read, being written, or its writer was killed
        return None


def _beat(own: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            os.utime(own)
        except FileNotFoundError:
            if not ended.is_set():
                how = "was taken over by another process" if own.parent.is_dir() else "is gone, moved or deleted"
                print(f"error: {own.parent} {how}; this process ends", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        except OSError:  # the file system may come back
            continue


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """When a process of this machine was started; None if it has ended, "" where only its being there is known."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # no /proc, or one that hides what other users run
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # of another user
        pass
    return ""
