"""A command whose processes do what its arguments say: one word for each of them.

Who does not stay begins once all who do are there; "later " ahead of a word is after the end of all that are not later.
"""

import os
import signal
import sys
import time
from pathlib import Path

from experiment.command import finish
from experiment.errors import ExperimentError, InUseError

LATER, STAYING = "later ", ("wait=", "stubborn=")


def stay(path):
    """Say that this process is there, in a file that is there only with its number in it, and stay."""
    part = path.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.replace(path)
    while True:  # a signal between two instructions would not end a pause
        time.sleep(0.02)


def begin(words, own):
    """Come back when it is this word's turn; what is returned is held until the process ends."""
    if not own.startswith(STAYING):
        staying = [Path(word.partition("=")[2]) for word in words if word.startswith(STAYING)]
        while not all(path.exists() for path in staying):
            time.sleep(0.02)
    if own.startswith(LATER):
        return Path(os.environ["LINE"]).read_bytes()  # to its end: when nobody has it open to write any more
    return os.open(os.environ["LINE"], os.O_WRONLY) if any(word.startswith(LATER) for word in words) else None


def act(word):
    action, _, value = word.removeprefix(LATER).partition("=")
    if action == "mendable":
        raise ExperimentError(value)
    if action == "in_use":
        raise InUseError(value)
    if action == "other":
        raise RuntimeError(value)
    if action == "signal":
        signal.raise_signal(int(value))
    elif action == "silent":
        print(value, file=sys.stderr)
        os._exit(5)
    elif action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stay(Path(value))
    elif action == "wait":
        stay(Path(value))
    elif action == "print":
        print(value, flush=True)


if __name__ == "__main__":
    own = sys.argv[1 + int(os.environ["RANK"])]
    held = begin(sys.argv[1:], own)
    sys.exit(finish(lambda work: act(own)))
