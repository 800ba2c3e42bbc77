"""SIGTERM, SIGINT and a closed terminal end a command wherever it is, and its exit code says so; what is being saved is
finished first.

What trains waits for the end of its step, and saves that; everything else ends at once, and nothing is lost by that, as
every file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal asked the command to end; its code is what shells give: 128 and the signal's number.

    Attributes:
        during: what was being done, where the command does several things.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.during = ""


class _State:
    """Of this process: the signal that came, how many blocks hold it back, and what a signal calls."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.holds = 0
        self.handler: Any = None
        self.ends_loaders = 0  # of which process
        self.terminals: list[int] = []  # what it prints to, where that is one


_state = _State()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In this block a signal raises `Stopped`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    if _state.ends_loaders != owner:
        multiprocessing.util.Finalize(None, _end_loaders, exitpriority=0)
        _state.ends_loaders = owner

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that loads images: the first one ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if number == signal.SIGHUP:
            _leave_terminals()
        again = _state.number is not None
        _state.number = number
        if again or not _state.holds:
            raise Stopped(number)

    outer, _state.handler = _state.handler, stop
    _state.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
    before: dict[int, Any] = {number: signal.signal(number, stop) for number in _heard()}
    try:
        yield
    finally:
        _state.number, _state.handler = None, outer
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held(later: bool = False) -> Iterator[None]:
    """A signal that comes in this block takes effect at its end; a second one at once.

    Args:
        later: only what comes after `hold`.
    """
    before = _state.holds
    _state.holds += not later
    try:
        yield
    finally:
        _state.holds = before
    if not _state.holds:
        check()


def hold() -> None:
    """From now on to the end of the block of `held(later=True)`, a signal waits for what asks `pending`.

    It comes here alone, whatever a trainer has put ahead of it.
    """
    _state.holds = max(_state.holds, 1)
    if _state.handler is not None:
        for number in _heard():
            signal.signal(number, _state.handler)


def _heard() -> list[int]:
    """Those that end this process; `nohup` leaves a closed terminal out."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]


def _leave_terminals() -> None:
    """Print to nowhere in place of a terminal that is closed, where each word would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in _state.terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)


def pending() -> int:
    """The signal that has come and was held back, or swallowed by code that it met; 0 if none has."""
    return _state.number or 0


def check() -> None:
    """Raise `Stopped` if a signal has come."""
    if _state.number is not None:
        raise Stopped(_state.number)


def in_worker(*_: Any) -> None:
    """Called in a process that loads data: the first SIGTERM is taken to be for all processes at once, and left to what
    has started this one, which still needs its data; the second ends it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def _end_loaders() -> None:
    """When Python ends, it sends what loads data one SIGTERM, which `in_worker` lets pass, and would wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes it for a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stopped_by(error: BaseException) -> Stopped | None:
    """The `Stopped` that an error is, or stands for: what a signal raises in the middle of things may be disguised."""
    if isinstance(error, Stopped):
        return error
    return None if _state.number is None else Stopped(_state.number)
