"""What a run writes down while it trains: a row per validation, in `metrics.csv`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import broadcast
from mmengine.hooks import Hook

from experiment import ExperimentError
from experiment.history import History as RunHistory
from experiment.history import read_rows
from experiment.jobs import duration
from experiment.processes import is_first, place
from segmentation.hook import unwrapped

KEY = "lowrank_run_history"  # of a checkpoint


class Begun(Hook):
    """Whether a step was made; and that one can be."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._begun = False

    def before_train(self, runner: Any) -> None:
        """Refuse a loader that gives no batch: an epoch of it would be over at once.

        Raises:
            ExperimentError: see above.
        """
        loader = runner.train_dataloader
        if len(loader) == 0 and not isinstance(loader.sampler, InfiniteSampler):
            raise ExperimentError(
                f"{len(loader.dataset)} training images do not fill one batch of {loader.batch_size} in each process; "
                f"lower train_dataloader.batch_size, or set its drop_last to False"
            )

    def after_train_iter(self, runner: Any, *arguments: Any, **options: Any) -> None:
        """One was."""
        self._begun = True

    def __call__(self) -> bool:
        return self._begun


class History(Hook):
    """Forwards MMEngine's events to the run's history, and carries that through checkpoints.

    Of several processes the rows have the mean loss, the largest bytes, and the times of the first.

    Args:
        folder: where `metrics.csv` is written, whole after each validation.
    """

    priority = "LOW"

    def __init__(self, folder: Path) -> None:
        self.history = RunHistory(folder)
        self._gathered: dict[str, Any] | None = None

    def before_train(self, runner: Any) -> None:
        """After a resume, take the rows up to there; what they have counted is not counted again.

        A validation of the checkpoint's own iteration counts only if the checkpoint has its row: else the run may have
        been killed before its best weights were saved, so it is made again.
        """
        rows = self.history.rows
        last = rows[-1]["iteration"] if rows else 0
        rows += [row for row in read_rows(self.history.path) if last < row["iteration"] < runner.iter]
        if rows and rows[-1]["iteration"] == runner.iter:
            self.history.drop_pending()
        self.history.start()

    def before_train_epoch(self, runner: Any) -> None:
        """Make up for a validation that an interruption prevented."""
        last = self.history.rows[-1]["iteration"] if self.history.rows else 0
        due = runner.iter % runner.train_loop.val_interval == 0 or runner.iter == runner.max_iters
        if runner.val_loop is not None and last < runner.iter and due:
            runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock of a step."""
        self.history.step_start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note the step's time, loss and the bytes that its layers kept."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        loss = (outputs or {}).get("loss", math.nan)
        self.history.step_end(unwrapped(runner.model), loss.item() if isinstance(loss, torch.Tensor) else loss)

    def before_val_epoch(self, runner: Any) -> None:
        """Take the statistics of the first process, which are those that are saved."""
        if place().count > 1:
            for statistic in unwrapped(runner.model).buffers():
                broadcast(statistic)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the validation's row."""
        if not metrics or not self.history.has_steps:
            return
        self.history.require_finite(unwrapped(runner.model))
        row = self.history.add(
            {
                "iteration": float(runner.iter),
                "train_loss": self.history.mean_loss,
                "miou": _share(metrics, "mIoU"),
                "macc": _share(metrics, "mAcc"),
            }
        )
        if is_first():
            rows_left = (runner.max_iters - runner.iter) / runner.train_loop.val_interval
            left = duration(self.history.seconds_left(rows_left))
            done = f"  iteration {runner.iter}/{runner.max_iters}"
            print(f"{done}  mIoU {100 * row['miou']:.1f} %  {left} left", flush=True)

    def collect(self, runner: Any) -> None:
        """Take from all processes, before the first of them saves a checkpoint, what no row has yet."""
        self._gathered = self.history.shared_state()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Carry the rows, and what no row has yet."""
        checkpoint[KEY] = self.history.state_dict() if self._gathered is None else self._gathered
        self._gathered = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take up the rows, and what no row had."""
        state = checkpoint.pop(KEY, None)
        if state is not None:
            self.history.load_state_dict(state)


def _share(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise ExperimentError(
            f"the validation gives no {name}, by which a run is judged, but {', '.join(metrics)}; have val_evaluator "
            f"give it, as an IoUMetric with 'mIoU' among its iou_metrics does"
        )
    value = float(metrics[name]) / 100
    if not math.isfinite(value):
        raise ExperimentError(
            f"{name} of the validation images is {value}: no pixel of their label maps is of a class; look at the data"
        )
    if not 0 <= value <= 1:
        raise ExperimentError(
            f"{name} of the validation images is {100 * value:g} %, and not from 0 to 100; look at nan_to_num of "
            f"val_evaluator, which stands for classes that are in no label map"
        )
    return round(value, 6)
