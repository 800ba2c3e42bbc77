"""What a run writes down while it trains: a row per validation, in `metrics.csv`."""

from __future__ import annotations

import csv
import io
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast
from mmengine.hooks import Hook

from experiment.processes import gather, is_first, own_part, place, with_others
from lowrank import converted_layers
from segmentation.hook import unwrapped
from segmentation.saving import write_or_say

PENDING, ROWS = "lowrank_history", "lowrank_rows"  # keys of a checkpoint
Row = dict[str, float]


class History(Hook):
    """One row per validation; a resumed run goes on where the rows end.

    Of several processes the rows have the mean loss, the largest bytes, and the times of the first.

    Args:
        folder: where `metrics.csv` is written, whole after each validation.
        show: print a line per validation.
    """

    priority = "LOW"

    def __init__(self, folder: Path, show: bool = True) -> None:
        self.path, self.show = folder / "metrics.csv", show
        self.rows: list[Row] = []
        self._carried: list[Row] = []
        self._seconds: list[float] = []
        self._kept: list[int] = []
        self._losses: list[float] = []
        self._start = 0.0
        self._pending: dict[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        """After a resume, take the rows up to there; what they have counted is not counted again."""
        if runner.iter == 0:
            return
        last = self._carried[-1]["iteration"] if self._carried else 0
        self.rows = [*self._carried, *(row for row in _read(self.path) if last < row["iteration"] <= runner.iter)]
        if self.rows and self.rows[-1]["iteration"] == runner.iter:
            self._seconds, self._kept, self._losses = [], [], []

    def before_train_epoch(self, runner: Any) -> None:
        """Make up for a validation that an interruption prevented."""
        last = self.rows[-1]["iteration"] if self.rows else 0
        due = runner.iter % runner.train_loop.val_interval == 0 or runner.iter == runner.max_iters
        if runner.val_loop is not None and last < runner.iter and due:
            runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock of a step."""
        self._start = time.perf_counter()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note the step's time, loss and the bytes that its layers kept."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._start)
        self._kept.append(sum(layer._lowrank.formula_bytes for layer in converted_layers(unwrapped(runner.model))))
        loss = (outputs or {}).get("loss", math.nan)
        self._losses.append(loss.item() if isinstance(loss, torch.Tensor) else loss)

    def before_val_epoch(self, runner: Any) -> None:
        """Take the statistics of the first process, which are those that are saved."""
        if place().count > 1:
            for statistic in unwrapped(runner.model).buffers():
                broadcast(statistic)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the validation's row."""
        if not metrics or not self._seconds:
            return
        row = {
            "iteration": float(runner.iter),
            "train_loss": statistics.fmean(gather(statistics.fmean(self._losses))),
            "miou": round(float(metrics["mIoU"]) / 100, 6),
            "macc": round(float(metrics["mAcc"]) / 100, 6),
            "activation_bytes": max(gather(statistics.fmean(self._kept))),
            "step_seconds": statistics.median(self._seconds),
            "seconds": sum(self._seconds),
        }
        self.rows.append(row)
        self._seconds, self._kept, self._losses = [], [], []
        if not is_first():
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row))
        writer.writeheader()
        writer.writerows(self.rows)
        write_or_say(self.path, text.getvalue())
        if self.show:
            left = (runner.max_iters - runner.iter) * row["step_seconds"]
            print(
                f"  iteration {runner.iter}/{runner.max_iters}  mIoU {100 * row['miou']:.1f} %  {left:.0f} s left",
                flush=True,
            )

    def collect(self, runner: Any) -> None:
        """Take from all processes, before the first of them saves a checkpoint, what no row has yet."""
        self._pending = with_others(self._open())

    def _open(self) -> dict[str, Any]:
        return {"seconds": list(self._seconds), "kept": list(self._kept), "losses": list(self._losses)}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Carry the rows, and what no row has yet."""
        checkpoint[ROWS] = [dict(row) for row in self.rows]
        checkpoint[PENDING] = self._open() if self._pending is None else self._pending
        self._pending = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take up the rows, and what no row had."""
        self._carried = [dict(row) for row in checkpoint.pop(ROWS, [])]
        pending = checkpoint.pop(PENDING, None)
        if pending is not None:
            own = own_part(pending)
            self._seconds, self._kept, self._losses = (list(own[key]) for key in ("seconds", "kept", "losses"))

    @property
    def activation_bytes(self) -> int:
        """Largest of the rows' mean formula bytes: the papers' "peak" memory."""
        return round(max(row["activation_bytes"] for row in self.rows))


def _read(path: Path) -> list[Row]:
    """Rows of a file; none where it is missing or damaged: a checkpoint has those that it knew."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []
