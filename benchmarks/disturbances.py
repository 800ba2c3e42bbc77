"""A sweep on Slurm some of whose jobs are killed, told to end or started again at random moments."""

from __future__ import annotations

import random
import time
from itertools import cycle

from benchmarks.cluster import Cluster

WAYS = ("signal", "kill", "requeue")
LOOK = 0.5  # seconds between two looks at what is at work
LATEST = 4.0  # seconds that a job has been at work for at most when it is disturbed


def disturb(
    cluster: Cluster, jobs: int, seed: int, latest: float = LATEST, share: float = 0.5, limit: float = 3600
) -> list[str]:
    """Disturb so many jobs, each once, in turn in every way, until the cluster has no job any more.

    Args:
        cluster: which was given the jobs.
        jobs: how many of them are disturbed.
        seed: of which ones and when.
        latest: a job is disturbed so many seconds after it was seen at work, or less.
        share: of the jobs that come, as long as it is not known how many more will.
        limit: seconds after which it is an error that there are jobs.

    Returns:
        What was done, such as "kill 12_3".

    Raises:
        TimeoutError: there still are jobs.
    """
    draw, ways = random.Random(seed), cycle(WAYS)
    done: list[str] = []
    due: dict[str, float | None] = {}  # when each job is to be disturbed
    end = time.monotonic() + limit
    while not cluster.is_empty:
        if time.monotonic() > end:
            raise TimeoutError(f"the cluster still has jobs after {limit:g} s")
        cluster.hurry()
        now = time.monotonic()
        running = cluster.running()
        for name in running:
            if name not in due:
                coming = sum(due.get(other) is not None for other in running)
                chosen = len(done) + coming < jobs and draw.random() < share
                due[name] = now + draw.uniform(0.0, latest) if chosen else None
            when = due[name]
            if when is not None and when <= now:
                due[name] = None
                way = next(ways)
                cluster.disturb(name, way)
                done.append(f"{way} {name}")
        time.sleep(LOOK)
    return done
