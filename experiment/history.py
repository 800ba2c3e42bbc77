"""What a run writes down while it trains: a row per validation in `metrics.csv`, and the time of every step."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from experiment.files import write_whole
from experiment.processes import gather, is_first
from lowrank import converted_layers

METRICS = "metrics.csv"
Row = dict[str, float]


class History:
    """The rows of a run; a resumed run goes on where they end, with what was counted since the last.

    A task forwards its trainer's events to it, and puts `state_dict()` into every checkpoint.

    Args:
        folder: where `metrics.csv` is written, whole after each row.
        write: how a file of the run is written, whole or not at all.
    """

    def __init__(self, folder: Path, write: Callable[[Path, str | bytes], None] = write_whole) -> None:
        self.path, self.write = folder / METRICS, write
        self.rows: list[Row] = []
        self.step_seconds: list[float] = []
        self._forget()
        self.start()
        self._step_start = 0.0

    def _forget(self) -> None:
        """Count anew, for the next row."""
        self._kept: list[int] = []
        self._losses: list[float] = []
        self._before = len(self.step_seconds)
        self._carried_seconds = 0.0

    def start(self) -> None:
        """Start the clock of the next row."""
        self._start = time.perf_counter()

    def step_start(self) -> None:
        """Start the clock of a step."""
        self._step_start = time.perf_counter()

    def step_end(self, network: nn.Module, loss: float = math.nan) -> None:
        """Note a step's time, its loss and the bytes by formula that the layers of the network kept."""
        self.step_seconds.append(time.perf_counter() - self._step_start)
        self._kept.append(sum(layer._lowrank.formula_bytes for layer in converted_layers(network)))
        self._losses.append(loss)

    @property
    def has_steps(self) -> bool:
        """Whether there were steps since the last row."""
        return bool(self._kept)

    @property
    def mean_loss(self) -> float:
        """Of the steps since the last row, in all processes; all have to ask for it."""
        return statistics.fmean(gather(statistics.fmean(self._losses)))

    @property
    def seconds(self) -> float:
        """Since the last row, validation included, over all tries."""
        return self._carried_seconds + time.perf_counter() - self._start

    def add(self, metrics: Row) -> Row:
        """Make a row of these metrics, the task's own columns, and of what was counted since the last one; returns it.

        All processes have to: the row has the largest bytes of theirs and the times of the first, which writes it.
        """
        row = {
            **metrics,
            "activation_bytes": max(gather(statistics.fmean(self._kept))),
            "step_seconds": statistics.median(self.step_seconds[self._before :]),
            "seconds": self.seconds,
        }
        self.rows.append(row)
        self._forget()
        self.start()
        if is_first():
            text = io.StringIO()
            writer = csv.DictWriter(text, list(row))
            writer.writeheader()
            writer.writerows(self.rows)
            self.write(self.path, text.getvalue())
        return row

    def drop_pending(self) -> None:
        """Forget what was counted since the last row: that row has it."""
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "rows": [dict(row) for row in self.rows],
            "step_seconds": list(self.step_seconds),
            "pending": [list(self._kept), list(self._losses), self.seconds if self._kept else 0.0],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a checkpoint; one of fewer rows than there are, such as the best epoch's, changes nothing."""
        if len(state["rows"]) < len(self.rows):
            return
        self.rows, self.step_seconds = [dict(row) for row in state["rows"]], list(state["step_seconds"])
        self._forget()
        kept, losses, self._carried_seconds = state.get("pending", ([], [], 0.0))
        self._kept, self._losses = list(kept), list(losses)
        self._before = len(self.step_seconds) - len(self._kept)

    def seconds_left(self, rows: float) -> float:
        """How long so many rows more will take, validations included, by the median of those there are."""
        return max(0.0, rows) * statistics.median(row["seconds"] for row in self.rows) if self.rows else math.nan

    @property
    def activation_bytes(self) -> int:
        """Largest of the rows' mean formula bytes: the papers' "peak" memory."""
        return round(max(row["activation_bytes"] for row in self.rows))

    @property
    def times(self) -> dict[str, float]:
        """Median of all steps and sum of all rows, seconds, as a record says them."""
        steps = self.step_seconds or [row["step_seconds"] for row in self.rows]
        return {"step_median": statistics.median(steps), "total": sum(row["seconds"] for row in self.rows)}


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; none where it is missing or damaged: a checkpoint has those that it knew."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []
