"""The command line in process: tiny arguments, what it printed, and callbacks that interrupt a run."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch

from classification.cli import main
from experiment.signals import pending

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "classification"

TINY = (
    *("--data.image_size", "32", "--data.batch_size", "8", "--data.eval_batch_size", "16"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),  # 1 would be all of them, as a share
    *("--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
    *("--trainer.enable_progress_bar", "false"),
)


def config(kind, name):
    """One shipped config as an argument."""
    return ["--config", str(CONFIGS / kind / f"{name}.yaml")]


def arguments(command, runs, *options, setup="b", model="mcunet", method="vanilla"):
    """Arguments of one small command on the digits; options come last and so win."""
    configs = [*config("setups", setup), *config("models", model), *config("data", "digits")]
    return [command, *configs, *config("methods", method), *TINY, "--runs_dir", str(runs), *map(str, options)]


@dataclass
class Finished:
    """One finished run: its arguments, its folder and what the command printed."""

    arguments: list[str]
    folder: Path
    printed: str

    @property
    def record(self):
        """Content of result.json."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def rows(self):
        """Rows of metrics.csv as numbers."""
        return metrics(self.folder)

    def checkpoint(self, name):
        """A checkpoint's content."""
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def metrics(folder):
    """Rows of metrics.csv as numbers."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def only_file(folder, name):
    """The one file of this name below a folder."""
    (path,) = folder.rglob(name)
    return path


def execute(command, capsys):
    """Run a command that must succeed. Returns what it printed."""
    capsys.readouterr()
    code = main(command)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def finish(command, runs, capsys):
    """Run a fit to its end, the only one in `runs`."""
    printed = execute(command, capsys)
    return Finished(command, only_file(runs, "result.json").parent, printed)


class Interruption(Exception):
    """Stands for a crash."""


class CrashInEpoch(pl.Callback):
    """A crash in the middle of an epoch, after its first batch."""

    no_influence = True

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def interrupt(self):
        raise Interruption

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            self.interrupt()


class UnfreezeInEpoch(pl.Callback):
    """Trains everything from an epoch on, as Lightning's callbacks for fine-tuning may."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            pl_module.requires_grad_()


class HaltInEpoch(CrashInEpoch):
    """Says so in the middle of an epoch and waits there to be killed, or for another signal."""

    def interrupt(self):
        print("halted", flush=True)
        while not pending():
            time.sleep(0.01)


class KillInEpoch(CrashInEpoch):
    """Kills the process in the middle of an epoch of the run whose folder's path has a word in it."""

    def __init__(self, epoch: int, word: str) -> None:
        super().__init__(epoch)
        self.word = word

    def on_train_batch_start(self, trainer, *words):
        if self.word in trainer.default_root_dir:
            super().on_train_batch_start(trainer, *words)

    def interrupt(self):
        os.kill(os.getpid(), signal.SIGKILL)


class SignalIn(pl.Callback):
    """A signal to this process in the middle of a step: of training, or of validation; and dropout of the logits.

    Args:
        epoch: of the step, from 0; -1 for no signal.
        batch: of the step, from 0.
        validating: whether the step is of validation.
        number: of the signal.
    """

    no_influence = True

    def __init__(self, epoch: int = -1, batch: int = 0, validating: bool = False, number: int = 15) -> None:
        self.moment, self.number = (epoch, batch, validating), number

    def _signal(self, trainer, batch, validating):
        if (trainer.current_epoch, batch, validating) == self.moment:
            self.moment = None
            signal.raise_signal(self.number)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._signal(trainer, batch_idx, False)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._signal(trainer, batch_idx, True)

    def on_fit_start(self, trainer, pl_module):
        def drop(network, inputs, logits):
            return torch.nn.functional.dropout(logits, 0.3, network.training)

        self.hook = pl_module.backbone.register_forward_hook(drop)

    def on_fit_end(self, trainer, pl_module):
        self.hook.remove()


class StopIn(pl.Callback):
    """Tells the trainer to stop at the end of a batch, as a limit of time does."""

    no_influence = True

    def __init__(self, epoch: int, batch: int) -> None:
        self.moment = (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = (trainer.current_epoch, batch_idx) == self.moment


class CrashBeforeTest(pl.Callback):
    """A crash when training is over and the record is not yet written."""

    no_influence = True

    def on_test_start(self, trainer, pl_module):
        raise Interruption


def trainer(epochs=1, **options):
    """A trainer that prints and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
