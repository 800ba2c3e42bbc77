"""How far a run is, and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from experiment.history import History
from experiment.jobs import duration

BAR = "{desc}: {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}{postfix}"
LINES = 4  # in a whole run, where there is no terminal


class Progress(ProgressBar):
    """One bar for the whole run, with the time left and the latest validation accuracy.

    Args:
        history: of the run; has each epoch's row when this is told of the epoch's end.
    """

    def __init__(self, history: History) -> None:
        super().__init__()
        self._enabled, self._history = True, history
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Show nothing; the trainer says so to all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where an earlier try of this run has come to."""
        if self._enabled and sys.stdout.isatty():
            total = (trainer.max_epochs or 0) * int(trainer.num_training_batches)
            options = {"file": sys.stdout, "unit": "step", "dynamic_ncols": True, "bar_format": BAR}
            self._bar = tqdm(desc="  training", total=total, initial=trainer.global_step, **options)

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the accuracy that the epoch has reached."""
        accuracy = f"{100 * float(trainer.callback_metrics['val_accuracy']):.1f} %"
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        left = duration(self._history.seconds_left(epochs - done))
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {done}/{epochs}, val accuracy {accuracy}, {left} left")
        elif self._enabled and (done == epochs or done % max(1, epochs // LINES) == 0):
            print(f"  epoch {done}/{epochs}  val accuracy {accuracy}  {left} left", flush=True)

    def on_train_end(self, *_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        """Close the bar, so that the error has a line of its own."""
        self.on_train_end()
