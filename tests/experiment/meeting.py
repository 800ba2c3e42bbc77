"""What two processes that have met do together; each writes what it found, and the command ends as `finish` says."""

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from experiment.command import finish
from experiment.errors import ExperimentError
from experiment.processes import Place, first_does, first_holds, gather, join, leave, own_part, place, say, with_others


@contextmanager
def noted(path):
    path.write_text("entered")
    yield
    path.write_text("left")


def together(folder):
    rank = place().rank
    entered = folder / f"lock{rank}"
    with first_holds(noted(entered)):
        inside = (folder / "lock0").read_text()
        state = with_others({"shared": 7, "own": rank, **({"more": 1} if rank else {})}, lambda key: key != "shared")
        found = {
            "inside": inside,
            "decided": first_does(lambda: f"by {rank}"),
            "gathered": gather(10 * rank),
            "state": own_part(state, lambda key: key != "shared"),
            "kept": state,
        }
        say(f"said by {rank}")
    (folder / f"found{rank}.json").write_text(json.dumps(found))


def refused(folder):
    def refuse():
        raise ExperimentError("there is no more room")

    time.sleep(place().rank * float(os.environ.get("LATE", "0")))
    try:
        first_does(refuse)
    except BaseException as error:
        (folder / f"{place().rank}").write_text(f"{type(error).__name__} {getattr(error, 'code', '')}")
        raise


if __name__ == "__main__":
    _, action, where = sys.argv

    def command(work):
        join(Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])))
        globals()[action](Path(where))

    sys.exit(leave(finish(command)))
