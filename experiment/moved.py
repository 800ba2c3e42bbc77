"""Where a run's folder, or a file in it, is that has been moved with the folder of all runs.

Settings name other runs: a budget its table and the run whose memory it is, a start its weights. A run's config has
these as they were given, so that it would look for them at the old place.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiment.processes import say_ahead

_OF_RUN = re.compile(r"layers(\d+|all)/seed\d+")
_ABOVE = 5  # names of a run's folder ahead of these: task, setup, model, data set, method


def if_moved(path: str | Path) -> str:
    """What else to do, as the end of an error, where what a setting names is not there; nothing if it is of no run."""
    parts = Path(path).parts
    pairs = ("/".join(pair) for pair in zip(parts[_ABOVE:], parts[_ABOVE + 1 :], strict=False))
    of_run = any(map(_OF_RUN.fullmatch, pairs))
    return "; if all runs were moved, give the folder that they are in now as --runs-dir" if of_run else ""


def place_now(path: str, runs_dir: Path) -> str:
    """The place of what a setting names: as given where it is there, else below the folder of all runs, which is said.

    Args:
        path: of a run's folder or a file in it, or of anything else, which stays as it is.
        runs_dir: folder of all runs.
    """
    parts = Path(path).parts
    if Path(path).exists() or "://" in path:
        return path
    for start in range(len(parts) - _ABOVE - 1):
        now = runs_dir.joinpath(*parts[start:])
        if _OF_RUN.fullmatch("/".join(parts[start + _ABOVE :][:2])) and now.exists():
            say_ahead(f"note: {path} is not there; taken from {now}, where all runs are now")
            return str(now)
    return path
