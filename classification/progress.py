"""How far a run is, and how long it will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

LINES = 4  # in a whole run, where there is no terminal


class Progress(ProgressBar):
    """One bar for the whole run, with the time left and the latest validation accuracy."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Show nothing; the trainer says so to all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where an earlier try of this run has come to."""
        self._start, self._first_epoch = time.perf_counter(), trainer.current_epoch
        if self._enabled and sys.stdout.isatty():
            total = (trainer.max_epochs or 0) * int(trainer.num_training_batches)
            options = {"file": sys.stdout, "unit": "step", "dynamic_ncols": True}
            self._bar = tqdm(desc="  training", total=total, initial=trainer.global_step, **options)

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the bar by a step."""
        if self._bar is not None:
            self._bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the accuracy that the epoch has reached."""
        accuracy = f"{100 * float(trainer.callback_metrics['val_accuracy']):.1f} %"
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {done}/{epochs}, val accuracy {accuracy}")
        elif self._enabled and (done == epochs or done % max(1, epochs // LINES) == 0):
            each = (time.perf_counter() - self._start) / (done - self._first_epoch)
            left = each * (epochs - done)
            print(f"  epoch {done}/{epochs}  val accuracy {accuracy}  {left:.0f} s left", flush=True)

    def on_train_end(self, *_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        """Close the bar, so that the error has a line of its own."""
        self.on_train_end()
