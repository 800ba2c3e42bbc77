"""What a run writes down while it trains, and what makes a resumed run the same run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from classification.loggers import log_resources
from experiment import ExperimentError
from experiment.checkpoints import BEST, LAST
from experiment.history import History as RunHistory
from experiment.processes import own_part, with_others
from experiment.signals import check


class History(pl.Callback):
    """Forwards the events of an epoch to the run's history, and carries that through checkpoints.

    Of several processes the rows have the largest bytes, and the times of the first.

    Args:
        folder: where `metrics.csv` is written, whole after each epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.history = RunHistory(folder)

    def state_dict(self) -> dict[str, Any]:
        """Rows and step times so far."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after these rows. Testing an earlier checkpoint of the same run changes nothing."""
        self.history.load_state_dict(state_dict)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and note the epoch's learning rate."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.history.drop_pending()
        self.history.start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock of a step."""
        self.history.step_start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the step's time and the bytes that its layers kept."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.history.step_end(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's row, and log what the epoch used."""
        metrics = {key: float(trainer.callback_metrics[key]) for key in ("train_loss", "val_loss", "val_accuracy")}
        metrics = {"epoch": trainer.current_epoch, "learning_rate": self._learning_rate, **metrics}
        row = self.history.add(metrics)
        used = {key: row[key] for key in ("activation_bytes", "step_seconds", "seconds", "learning_rate")}
        log_resources(trainer.loggers, used, trainer.global_step)


class LastCheckpoint(ModelCheckpoint):
    """Keeps the last whole epoch.

    Args:
        folder: where `last.ckpt` is written.
        options: of `ModelCheckpoint`.
    """

    name = LAST

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


class BestCheckpoint(LastCheckpoint):
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

    def on_train_batch_end(self, *_: Any) -> None:
        """End at a signal that was swallowed where it came."""
        check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse the end of an epoch that has not seen all of its batches.

        Raises:
            ExperimentError: something stopped the epoch.
        """
        done, batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
        if done < batches:
            raise ExperimentError(unfinished(trainer.current_epoch, trainer.max_epochs, f", at batch {done}"))


def unfinished(epochs: int, of: int | None, where: str = "") -> str:
    """What is said of a run that something has stopped after so many whole epochs."""
    return (
        f"stopped after {epochs} of {of} epochs{where}, by --trainer.max_time or by a callback, so there is no record; "
        f"the same command goes on"
    )


class RandomState(pl.Callback):
    """Carry the random generators through checkpoints, so that a resumed run draws what it would have drawn."""

    def state_dict(self) -> dict[str, Any]:
        """States of the generators of torch, numpy and Python, in each process."""
        version, internal, gauss = random.getstate()
        kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
        own = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": [version, list(internal), gauss],
            "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        }
        return with_others(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._loaded = own_part(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the generators to the states of the checkpoint, if there was one."""
        state = self.__dict__.pop("_loaded", None)
        if state is None:
            return
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
