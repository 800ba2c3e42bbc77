"""What a run writes down while it trains, and what makes a resumed run the same run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from classification.loggers import log_resources
from experiment import ExperimentError
from experiment.checkpoints import BEST, LAST
from experiment.history import History as RunHistory
from experiment.processes import asked_to_stop, own_part, with_others
from experiment.random_state import random_state, set_random_state
from experiment.signals import Stopped, hold


class History(pl.Callback):
    """Forwards the events of an epoch to the run's history, and carries that through checkpoints.

    Of several processes the rows have the largest bytes, and the times of the first.

    Args:
        folder: where `metrics.csv` is written, whole after each epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.history = RunHistory(folder)
        self._learning_rate = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Rows and step times so far, and what the epoch's row will have."""
        return {**self.history.shared_state(), "learning_rate": self._learning_rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after these rows. Testing an earlier checkpoint of the same run changes nothing."""
        self.history.load_state_dict(state_dict)
        self._learning_rate = state_dict.get("learning_rate", math.nan)

    def on_train_start(self, *_: Any) -> None:
        """Start the clock, also where a resumed run is within an epoch."""
        self.history.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and note the epoch's learning rate."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.history.drop_pending()
        self.history.start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of a step."""
        self.history.step_start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step's time, loss and the bytes that its layers kept."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # by which Lightning divides it
        self.history.step_end(pl_module, loss, len(batch[1]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's row, and log what the epoch used."""
        self.history.require_finite(pl_module)
        metrics = {"epoch": trainer.current_epoch, "learning_rate": self._learning_rate}
        metrics["train_loss"] = self.history.mean_loss
        metrics |= {key: float(trainer.callback_metrics[key]) for key in ("val_loss", "val_accuracy")}
        pl_module.log("train_loss", metrics["train_loss"], sync_dist=True)
        row = self.history.add(metrics)
        used = {key: row[key] for key in ("activation_bytes", "step_seconds", "seconds", "learning_rate")}
        log_resources(trainer.loggers, used, trainer.global_step)


class EpochCheckpoint(ModelCheckpoint):
    """Keeps a whole epoch.

    Args:
        folder: where it is written.
        options: of `ModelCheckpoint`.
    """

    name: str

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, filename=Path(self.name).stem, **options)

    @property
    def path(self) -> Path:
        """The file that is written."""
        assert self.dirpath is not None
        return Path(self.dirpath) / self.name

    def state_dict(self) -> dict[str, Any]:
        """Nothing that depends on where the folder is: it may be elsewhere when the run goes on."""
        return {}


class LastCheckpoint(EpochCheckpoint):
    """Keeps the last whole epoch; where a signal or a limit of time ends the run, its last step.

    Within validation that is the epoch's last step, so that a resumed run validates again.
    """

    name = LAST
    _out_of_time = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a signal waits for the end of a step."""
        hold()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """End the run where it is to end, but within a step of several batches, whose gradients nothing saves."""
        loop = trainer.fit_loop
        if trainer.should_stop and loop._can_stop_early and not loop.epoch_loop._num_ready_batches_reached():
            self._out_of_time, trainer.should_stop = True, False  # else an unfinished epoch is validated
        if not loop._should_accumulate():
            self._end(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """End the run where it is to end."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        number = asked_to_stop()
        if not number and not self._out_of_time:
            return
        trainer.save_checkpoint(self.path)
        if number:
            raise Stopped(number)
        raise ExperimentError(unfinished(trainer))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Within an epoch, name the last whole one; after its last step, have its validation done, not left out."""
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        if epochs["processed"] == epochs["started"]:
            return
        checkpoint["epoch"] -= 1
        if batches["current"]["ready"] == trainer.num_training_batches:
            for kind, validated in loop["epoch_loop.val_loop.batch_progress"].items():
                if kind in ("total", "current"):
                    batches[kind]["completed"] = batches[kind]["processed"]
                    validated |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class BestCheckpoint(EpochCheckpoint):
    """Keeps the epoch with the best validation accuracy; of equals the last, which has trained the longest.

    On a small validation part many epochs are equal, and the first of them is far from trained.

    Args:
        folder: where `best.ckpt` is written.
        first_epoch: epochs before this one are not considered.
        options: of `ModelCheckpoint`.
    """

    name = BEST

    def __init__(self, folder: Path, first_epoch: int = 0, **options: Any) -> None:
        super().__init__(folder, monitor="val_accuracy", mode="max", **options)
        self.first_epoch = first_epoch

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is kept in place of the one before."""
        best = self.best_model_score
        if trainer.current_epoch < self.first_epoch:
            return False
        return current is not None and bool(best is None or current >= best)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score, of the file in this folder, wherever the folder was before."""
        score = state_dict["best_model_score"]
        if score is None:
            return
        path = str(self.path)
        self.best_model_score = self.current_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = path
        self.best_k_models = {path: score}


class WholeEpochs(pl.Callback):
    """A run is made of whole epochs: what ends it within one leaves it as it was saved after the one before."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Forget how long earlier tries took: a limit of time is of each try."""
        states = checkpoint.get("callbacks", {})
        for key in [key for key in states if key.startswith("Timer")]:
            del states[key]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse the end of an epoch that has not seen all of its batches.

        Raises:
            ExperimentError: something stopped the epoch.
        """
        if trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches:
            raise ExperimentError(unfinished(trainer))


def unfinished(trainer: pl.Trainer) -> str:
    """What is said of a run that something has stopped."""
    batch = trainer.fit_loop.batch_idx + 1
    where = f", at batch {batch}" if 0 < batch < trainer.num_training_batches else ""
    return (
        f"stopped after {trainer.current_epoch} of {trainer.max_epochs} epochs{where}, by --trainer.max_time or by a "
        f"callback, so there is no record; the same command goes on"
    )


class RandomState(pl.Callback):
    """Carry the random generators through checkpoints, so that a resumed run draws what it would have drawn."""

    def state_dict(self) -> dict[str, Any]:
        """States of the generators of torch, numpy and Python, in each process."""
        return with_others(random_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._loaded = own_part(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators to the states of the checkpoint, if there was one."""
        state = self.__dict__.pop("_loaded", None)
        if state is not None:
            set_random_state(state)
