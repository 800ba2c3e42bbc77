"""How every command of the suite ends: in an exit code and, where something was wrong, in one line that says it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import ExperimentError
from experiment.jobs import FAILURE
from experiment.signals import Stopped, stoppable, stopped_by

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}


@dataclass
class Work:
    """What a command is at.

    Attributes:
        title: what it is doing, once that is known.
        folder: where its log belongs, once that is known.
    """

    title: str = ""
    folder: Path | None = None


def finish(command: Callable[[Work], int | None], mendable: tuple[type[Exception], ...] = (ExperimentError,)) -> int:
    """Do a command, which is told where to note what it is at, and give its exit code.

    Args:
        command: may return its exit code; 0 if it returns none.
        mendable: errors whose message says all that a user needs.

    Returns:
        the command's own; 2 after one line about what a user can mend; 130 or 143 after SIGINT or SIGTERM; 1 after one
        line about any other error, whose traceback is in a log.
    """
    work = Work()
    with stoppable():
        try:
            return command(work) or 0
        except Exception as error:
            stop = stopped_by(error)
            return _said(error, work, mendable) if stop is None else _interrupted(stop, work)
        except (Stopped, KeyboardInterrupt, SystemExit) as error:
            stop = stopped_by(error)
            if stop is None:
                raise
            return _interrupted(stop, work)


def one_line(error: BaseException) -> str:
    """The message alone, also where a process that loads images has put its traceback around it."""
    return " ".join(str(error).rpartition(f"{type(error).__name__}: ")[2].split())


def underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of options spelled with underscores; a dash in their place is as good."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    return words


def _interrupted(stop: Stopped, work: Work) -> int:
    place = stop.during or work.title
    print(f"interrupted{f' during {place}' if place else ''}; the same command goes on", file=sys.stderr, flush=True)
    return int(str(stop.code))


def _said(error: Exception, work: Work, mendable: tuple[type[Exception], ...]) -> int:
    if isinstance(error, BrokenPipeError):  # what reads the output has ended, as `head` does
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - what is left to be written goes there
        return 128 + signal.SIGPIPE
    if isinstance(error, mendable):
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno in _DISK:
        print(
            f"error: {error.filename or work.folder or 'a file'} cannot be written or read ({error.strerror}); what "
            f"was saved before is whole, so the same command goes on once it can be",
            file=sys.stderr,
        )
        return 2
    where = f"{work.title}: " if work.title else ""
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"error: {where}{cause} (traceback in {_log(error, work)})", file=sys.stderr)
    return 1


def _log(error: Exception, work: Work) -> str:
    """Write a traceback into the run's folder, or where that cannot be, among the temporary files."""
    text = f"{work.title}\n{''.join(traceback.format_exception(error))}"
    if work.folder is not None and work.folder.is_dir():
        try:
            (work.folder / FAILURE).write_text(text, encoding="utf-8", errors="replace")
            return str(work.folder / FAILURE)
        except OSError:
            pass
    try:
        with tempfile.NamedTemporaryFile("w", prefix="lowrank-", suffix=".log", delete=False, errors="replace") as file:
            file.write(text)
        return file.name
    except OSError:
        print(text, file=sys.stderr)
        return "the lines above"
