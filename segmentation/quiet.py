"""What MMEngine and MMSegmentation say while they are set up, kept off the terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from mmengine.logging import MMLogger
from mmseg.utils import register_all_modules


@contextmanager
def quietly() -> Iterator[None]:
    """The log goes to its file, the terminal shows the run's own lines: a logger keeps the stream it is made with."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the logger lives
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def unlogged() -> Iterator[None]:
    """Likewise of a network that is built to be looked at alone: MMEngine tells where each of its weights comes from to
    a logger that may have been made before, with the terminal's stream."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with quietly():
            yield
    finally:
        logging.disable(before)


def register_modules() -> None:
    """Make all of MMSegmentation known by name."""
    with quietly():
        register_all_modules(init_default_scope=True)
        MMLogger.get_current_instance()  # made here, so that initial weights are told nowhere
