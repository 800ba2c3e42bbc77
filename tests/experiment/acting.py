"""A command whose processes do what its arguments say: one word for each of them."""

import os
import signal
import sys
import time
from pathlib import Path

from experiment.command import finish
from experiment.errors import ExperimentError, InUseError


def act(word, rank):
    action, _, value = word.partition("=")
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
    elif action == "wait":
        Path(value).write_text(str(os.getpid()))
        signal.pause()
    elif action == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(value).write_text(str(os.getpid()))
        while True:
            signal.pause()
    elif action == "later":
        time.sleep(0.3)
        raise RuntimeError(value)
    elif action == "print":
        print(value, flush=True)


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    sys.exit(finish(lambda work: act(sys.argv[1 + rank], rank)))
