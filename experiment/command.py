"""How every command of the suite ends: in an exit code and, where something was wrong, in one line that says it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import tempfile
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiment.errors import DISK, OTHER_CODE, ExperimentError, exit_code, is_mendable
from experiment.jobs import FAILURE
from experiment.process_group import follow, report
from experiment.processes import FirstFailed, place
from experiment.signals import Stopped, stoppable, stopped_by

_STOPPING = ("strict", "surrogateescape")  # how Python writes to a terminal: the second where the locale is C
_ENDING = ("argparse", "jsonargparse", "experiment")  # may end a command, as at --help


@dataclass
class Work:
    """What a command is at.

    Attributes:
        title: what it is doing, once that is known.
        folder: where its log belongs, once that is known.
    """

    title: str = ""
    folder: Path | None = None


def finish(command: Callable[[Work], int | None]) -> int:
    """Do a command, which is told where to note what it is at, and give its exit code.

    Args:
        command: may return its exit code; 0 if it returns none.

    Returns:
        the command's own; 2 after one line about what a user can mend; 130, 143 or 129 after SIGINT, SIGTERM or SIGHUP;
        1 after one line about any other error, whose traceback is in a log.
    """
    work = Work()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process is there
        elif getattr(stream, "errors", "") in _STOPPING:  # a letter that the terminal does not know is no error
            stream.reconfigure(errors="backslashreplace")
    with stoppable():
        follow()
        try:
            return command(work) or 0
        except Exception as error:
            stop = stopped_by(error)
            return _said(error, work) if stop is None else _interrupted(stop, work)
        except FirstFailed as error:  # goes no further, as a process of several has to `leave`
            return exit_code(error)
        except (Stopped, KeyboardInterrupt, SystemExit) as error:
            stop = stopped_by(error)
            if stop is not None:
                return _interrupted(stop, work)
            if not isinstance(error, SystemExit) or (by := _ended_by(error)) is None:
                raise
            why = (
                f"{by} ended the process, as sys.exit does; leave that out, or put it behind if __name__ == '__main__'"
            )
            return _said(ExperimentError(f"{work.title}: {why}" if work.title else why), work)


def _ended_by(error: SystemExit) -> str | None:
    """The place in code of others that has asked for the end, as a script does that is named as a class path."""
    frames = traceback.walk_tb(error.__traceback__)
    named = [(str(frame.f_globals.get("__name__")).partition(".")[0], frame, line) for frame, line in frames]
    owner, frame, line = [one for one in named if one[0] != "_sitebuiltins"][-1]  # of exit()
    return None if owner in _ENDING else f"{frame.f_code.co_filename}, line {line},"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While modules are imported in this block, and of them later, no garbage is looked for: they stay.

    Looking for it takes a tenth of the time.
    """
    looked_for, there = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if looked_for:
            gc.enable()
        if len(sys.modules) > there:
            gc.freeze()


def one_line(error: BaseException) -> str:
    """The message alone, also where a process that loads images has put its traceback around it."""
    return " ".join(str(error).rpartition(f"{type(error).__name__}: ")[2].split())


def folder_word(text: str) -> Path:
    """A folder, as a command line takes it; one without a name, as of a variable that is not set, would be this one."""
    if not text:
        raise ArgumentTypeError("it is empty; give a folder")
    return Path(text)


def dashed(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of options spelled with dashes; underscores in their place are as good."""
    return _spelled(arguments, "_", "-")


def underscored(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of options spelled with underscores, as a config file has them."""
    return _spelled(arguments, "-", "_")


def _spelled(arguments: Sequence[str], other: str, wanted: str) -> list[str]:
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"--{name[2:].replace(other, wanted)}{equals}{value}" if word.startswith("--") else word)
    return words


def _interrupted(stop: Stopped, work: Work) -> int:
    code = int(str(stop.code))
    if not report(stop, code, "", mendable=True):
        where = stop.during or work.title
        _say(f"interrupted{f' during {where}' if where else ''}; the same command goes on")
    return code


def _said(error: Exception, work: Work) -> int:
    if isinstance(error, BrokenPipeError):  # what reads the output has ended, as `head` does
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - what is left to be written goes there
        return 128 + signal.SIGPIPE
    code = exit_code(error)
    if is_mendable(error):
        text = one_line(error)
    elif isinstance(error, OSError) and error.errno in DISK:
        text = (
            f"{error.filename or work.folder or 'a file'} cannot be written or read ({error.strerror}); what was saved "
            f"before is whole, so the same command goes on once it can be"
        )
    else:
        text = f"{type(error).__name__}: {one_line(error)[:300]}"
    if report(error, code, text, mendable=code != OTHER_CODE):
        return code
    if code == OTHER_CODE:
        text = f"{f'{work.title}: ' if work.title else ''}{text} (traceback in {_log(error, work)})"
    _say(f"error: {text}")
    return code


def _say(line: str) -> None:
    """Write a line; of several processes that no other of the suite watches, all but the first name themselves."""
    name = "" if place().rank == 0 else f"{place()}: "
    print(f"{name}{line}", file=sys.stderr, flush=True)


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
