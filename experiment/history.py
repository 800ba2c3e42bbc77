"""What a run writes down while it trains: a row per validation in `metrics.csv`, and the time of every step."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.files import write_whole
from experiment.processes import gather, is_first, own_part, with_others

if TYPE_CHECKING:
    from torch import nn

METRICS = "metrics.csv"
Row = dict[str, float]


class History:
    """The rows of a run; a resumed run goes on where they end, with what was counted since the last.

    A task forwards its trainer's events to it, and puts `state_dict()` into every checkpoint.

    Args:
        folder: where `metrics.csv` is written, whole after each row.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.rows: list[Row] = []
        self.step_seconds: list[float] = []
        self._forget()
        self.start()
        self._step_start = 0.0

    def _forget(self) -> None:
        """Count anew, for the next row."""
        self._kept: list[int] = []
        self._losses: list[float] = []
        self._samples: list[int] = []
        self._before = len(self.step_seconds)
        self._carried_seconds = 0.0

    def start(self) -> None:
        """Start the clock of the next row."""
        self._start = time.perf_counter()

    def step_start(self) -> None:
        """Start the clock of a step."""
        self._step_start = time.perf_counter()

    def step_end(self, network: nn.Module, loss: float = math.nan, samples: int = 1) -> None:
        """Note a step's time, its mean loss over so many samples, and the bytes that the network's layers kept."""
        from lowrank import converted_layers  # not above: `report` reads rows without what takes seconds to import

        self.step_seconds.append(time.perf_counter() - self._step_start)
        self._kept.append(sum(layer._lowrank.formula_bytes for layer in converted_layers(network)))
        self._losses.append(loss)
        self._samples.append(samples)

    @property
    def has_steps(self) -> bool:
        """Whether there were steps since the last row."""
        return bool(self._kept)

    @property
    def mean_loss(self) -> float:
        """Of the samples since the last row, in all processes; all have to ask for it."""
        return statistics.fmean(gather(statistics.fmean(self._losses, self._samples)))

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
            self.save()
        return row

    def save(self) -> None:
        """Write the rows, of which there is one at least."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[-1]))
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.path, text.getvalue())

    @staticmethod
    def require_finite(network: nn.Module) -> None:
        """Refuse to go on with weights that a step has made NaN or infinite, which no loss has shown yet.

        Raises:
            NonFiniteError: they are.
        """
        import torch

        from lowrank import NonFiniteError

        trained = (parameter.detach() for parameter in network.parameters() if parameter.requires_grad)
        if not all(bool(torch.isfinite(weight).all()) for weight in trained):
            raise NonFiniteError("training has diverged: weights are no longer finite; lower the learning rate")

    def drop_pending(self) -> None:
        """Forget what was counted since the last row: that row has it."""
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        seconds = self.seconds if self._kept else 0.0
        return {
            "rows": [dict(row) for row in self.rows],
            "step_seconds": list(self.step_seconds),
            "pending": [list(self._kept), list(self._losses), seconds, list(self._samples)],
        }

    def shared_state(self) -> dict[str, Any]:
        """The same with what each of several processes has counted; all of them have to ask for it."""
        return with_others(self.state_dict(), _is_of_each)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a checkpoint; one of fewer rows than there are, such as the best epoch's, changes nothing."""
        if len(state["rows"]) < len(self.rows):
            return
        state = own_part(state, _is_of_each)
        self.rows, self.step_seconds = [dict(row) for row in state["rows"]], list(state["step_seconds"])
        self._forget()
        kept, losses, self._carried_seconds, *samples = state.get("pending", ([], [], 0.0))
        self._kept, self._losses = list(kept), list(losses)
        self._samples = list(samples[0]) if samples else [1] * len(losses)  # an earlier version did not note them
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


def _is_of_each(key: str) -> bool:
    return key == "pending"


def read_rows(path: Path) -> list[Row]:
    """Rows of a file; none where it is missing or damaged: a checkpoint has those that it knew."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []
