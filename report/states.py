"""How far each planned run is that has no record yet, as its folder says it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experiment.folder import LOCK
from experiment.history import METRICS
from experiment.jobs import FAILURE

DONE, RUNNING, FAILED, INTERRUPTED, PLANNED = "done", "running", "failed", "interrupted", "planned"
STATES = (DONE, RUNNING, FAILED, INTERRUPTED, PLANNED)
LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Locks:
    """The locks that processes of this machine hold; asking the system takes none of them, not even for a moment.

    Args:
        listing: the kernel's list of them; where there is none, nothing seems to be held.
    """

    listing: Path = LOCKS

    @cached_property
    def _held(self) -> set[int]:
        try:
            text = self.listing.read_text()
        except OSError:
            return set()
        return {int(inode) for inode in re.findall(r"^\d+: FLOCK +\w+ +WRITE +-?\d+ +\w+:\w+:(\d+) ", text, re.M)}

    def state(self, folder: Path) -> str:
        """One of `STATES` but "done" for a run's folder, which need not exist.

        "running" is seen of this machine's processes alone: a run in work elsewhere counts as interrupted.
        """
        try:
            held = (folder / LOCK).stat().st_ino in self._held
        except OSError:
            held = False
        if held:
            return RUNNING
        if (folder / FAILURE).exists():
            return FAILED
        return INTERRUPTED if (folder / METRICS).exists() else PLANNED
