"""SIGTERM and SIGINT end a command at once, wherever it is, and its exit code says so; a file being saved is finished.

Nothing is lost by that, as every file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal asked the command to end; its code is what shells give: 128 and the signal's number.

    Attributes:
        during: what was being done, where the command does several things.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.during = ""


class _State:
    """Of this process: the signal that came, and how many blocks hold it back."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.holds = 0


_state = _State()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """In this block a signal raises `Stopped`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that loads images: the first one ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        again = _state.number is not None
        _state.number = number
        if again or not _state.holds:
            raise Stopped(number)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        _state.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes in this block takes effect at its end; a second one at once."""
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1
    if not _state.holds:
        check()


def check() -> None:
    """Raise `Stopped` if a signal has come; for loops, as code in between may have swallowed what the signal raised."""
    if _state.number is not None:
        raise Stopped(_state.number)


def stopped_by(error: BaseException) -> Stopped | None:
    """The `Stopped` that an error is, or stands for: what a signal raises in the middle of things may be disguised."""
    if isinstance(error, Stopped):
        return error
    return None if _state.number is None else Stopped(_state.number)
