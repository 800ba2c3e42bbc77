"""The command line: `python -m classification measure | fit | validate | test`, on LightningCLI."""

from __future__ import annotations

import json
import logging
import math
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from classification.backbones.weights import read_state_dict
from classification.callbacks import BestCheckpoint, History, LastCheckpoint, RandomState, WholeEpochs, unfinished
from classification.checkpoint_io import WholeCheckpointIO
from classification.config_files import check_config_files
from classification.data import ImageDataModule
from classification.data.text import TEXTS
from classification.identity import data_fingerprint, identity_of, method_tag, run_of
from classification.loggers import log_record, loggers
from classification.module import Batch, FineTune, classification_loss
from classification.progress import Progress
from classification.settings import check_settings
from experiment import ExperimentError, Record, RunFolder, Status, provenance
from experiment.allocator import keep_freed_memory
from experiment.checkpoints import BEST, LAST, resumable
from experiment.command import Work, finish, underscored
from experiment.record import RESULT, TABLE
from lowrank import (
    LowRankError,
    PerplexityTable,
    TableError,
    account,
    measure_perplexity,
    peak_bytes,
    saved_bytes,
    weight_memory,
)

SPLIT = "split.npz"
# What a user can mend, in one line.
MENDABLE = (ExperimentError, LowRankError, ArgumentError, MisconfigurationException)
SEED = 233  # the papers' seed


class _NothingToDo(Exception):
    """Ends a command that has no work, before anything is built."""


class Trainer(pl.Trainer):
    """Lightning's trainer with the suite's own command beside fit, validate and test."""

    def measure(self, model: FineTune, datamodule: ImageDataModule) -> None:
        """Measure the perplexity of the trailing layers on one training batch."""


class SuiteCLI(LightningCLI):
    """LightningCLI that knows the run's folder: skips what is done, resumes what was interrupted, writes the record."""

    folder: RunFolder
    work: Work
    _parsers: ClassVar[dict[str, Any]] = {}  # the parsers as the first command built them, which takes most of a second

    def __init__(self, *arguments: Any, work: Work, **options: Any) -> None:
        self.work = work
        super().__init__(*arguments, **options)

    def setup_parser(self, *arguments: Any) -> None:
        """Build the parsers, or take those of an earlier command of this process."""
        if not self._parsers:
            super().setup_parser(*arguments)
            made = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            self._parsers.update({name: getattr(self, name) for name in made})
        vars(self).update(self._parsers)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "ckpt_path", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "measure": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--setup", type=str, default="A", help="name of the setup, for the record")
        parser.add_argument("--runs_dir", type=str, default="runs", help="folder that holds all runs")
        parser.add_argument("--dry_run", action="store_true", help="say what would be done, and stop")
        parser.add_argument("--tensorboard", type=bool, default=True, help="log to TensorBoard, in the run's folder")
        wandb = "project of Weights & Biases to log to as well"
        parser.add_argument("--wandb", type=str | None, default=None, metavar="PROJECT", help=wandb)
        parser.link_arguments("seed_everything", "data.shuffle_seed")
        parser.link_arguments("seed_everything", "model.rank_seed")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: this suite's checkpoints hold no settings, and whether one is whole is checked when it is read."""

    def _set_seed(self) -> None:
        """Check the settings first, of which the seed is one."""
        config = self.config[self.subcommand]
        plain = self._parser(self.subcommand).dump(config, format="json", skip_unset=False)
        self.settings = json.loads(plain)
        check_settings(self.settings, trains=self.subcommand == "fit")
        super()._set_seed()
        self.settings["seed_everything"] = config["seed_everything"]

    def before_instantiate_classes(self) -> None:
        keep_freed_memory()
        measuring = self.subcommand == "measure"
        method = "perplexity" if measuring else method_tag(self.settings["model"])
        self.identity = run_of(self.settings, method)
        path = self.identity.folder(Path(self.settings["runs_dir"]))
        result = TABLE if measuring else RESULT
        told = (identity_of(self.settings), result, data_fingerprint(self.settings))
        self.folder = RunFolder(path, *told, run=self.identity)
        self.work.title, self.work.folder = str(self.identity), path
        if self.subcommand not in ("fit", "measure"):
            return
        status = self.folder.status()
        if measuring and status is Status.DONE and not _is_table(self.folder.result):
            status = Status.NEW
        if self.settings["dry_run"]:
            todo = {Status.NEW: "would run", Status.INTERRUPTED: "would resume", Status.DONE: "is done, would skip"}
            raise _NothingToDo(f"{todo[status]}: {self.identity}\n  folder: {path}")
        if status is Status.DONE:
            raise _NothingToDo(f"done already: {self.identity}\n  result: {self.folder.result}")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self.settings["trainer"]
        if self.subcommand == "fit" and trainer["max_epochs"] is None:
            raise ExperimentError("--trainer.max_epochs is not given; a run needs a number of epochs")
        self.history = History(self.folder.path)
        # At the end of the training epoch, when the history has its row.
        after_each_epoch: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        first = math.floor(self.settings["model"]["select_from"] * (trainer["max_epochs"] or 0))
        self.best = BestCheckpoint(self.folder.checkpoints, first, **after_each_epoch)
        last = LastCheckpoint(self.folder.checkpoints, **after_each_epoch)
        configured = self._get(self.config_init, "trainer").get("callbacks") or []
        callbacks = [*configured, WholeEpochs(), self.history, RandomState(), self.best, last]
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(Progress())
        if self.subcommand == "fit" and trainer["logger"] is False:
            told = (self.settings["tensorboard"], self.settings["wandb"])
            kwargs["logger"] = loggers(self.folder.path, self.identity, *told)
        made = super().instantiate_trainer(callbacks=callbacks, default_root_dir=str(self.folder.path), **kwargs)
        made.strategy.checkpoint_io = WholeCheckpointIO(self.folder.identity_hash)  # whatever plugins there are
        return made

    def fit(self, **options: Any) -> None:
        """Train, test the best epoch, measure, and write the record."""
        with self.folder.locked(self._config_text()):
            self.datamodule.save_split(self.folder.path / SPLIT)
            resume = resumable(self.folder.checkpoints, self.folder.identity_hash, self.best.first_epoch)
            word = "training" if resume is None else "resuming" if resume.name == LAST else f"from {resume.name}"
            print(f"{word}: {self.identity}", flush=True)
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=resume)
            if len(self.history.rows) < self.trainer.max_epochs:
                raise ExperimentError(unfinished(len(self.history.rows), self.trainer.max_epochs))
            recipe = self._recipe(self.trainer.global_step)
            optimizer = self.trainer.optimizers[0]
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=self.best.best_model_path, verbose=False
            )
            record = self._record(optimizer, recipe)
            record.save(self.folder.path)
            log_record(self.trainer.loggers, record, self.trainer.global_step)
        print(f"  test accuracy {100 * record.accuracy['test']:.1f} %, record in {self.folder.result}", flush=True)

    def _config_text(self) -> str:
        return self._parser(self.subcommand).dump(self.config[self.subcommand])

    def _recipe(self, steps: int) -> dict[str, Any]:
        data = self.settings["data"]
        return {
            "epochs": self.trainer.max_epochs,
            "steps": steps,
            "learning_rate": self.settings["model"]["learning_rate"],
            "batch_size": data["batch_size"],
            "image_size": None if data["dataset"] in TEXTS else data["image_size"],
            "precision": str(self.trainer.precision),
        }

    def _record(self, optimizer: Optimizer, recipe: dict[str, Any]) -> Record:
        model, history = self.model, self.history
        batch = self._first_batch()
        network = model.train().backbone
        kept, peak = saved_bytes(network, classification_loss, batch), peak_bytes(network, classification_loss, batch)
        total = account(network, model.names, batch).total
        weights = weight_memory(network, model.names, classification_loss, batch, optimizer)
        inference = peak_bytes(model.eval().backbone, classification_loss, batch, backward=False)
        accuracies = [row["val_accuracy"] for row in history.rows]
        return Record(
            run=self.identity,
            accuracy={
                "val_best": max(accuracies[self.best.first_epoch :]),
                "val_last": accuracies[-1],
                "test": float(self.trainer.callback_metrics["test_accuracy"]),
            },
            memory_bytes={
                "activation_formula": history.activation_bytes,
                "saved_measured": kept,
                "peak_measured": peak,
                "peak_inference": inference,
                "weight_measured": weights.weight,
                "weight_gradient_measured": weights.gradient,
                "weight_optimizer_measured": weights.optimizer,
                **({"weight_emulated_formula": weights.emulated} if weights.emulated else {}),
            },
            flops={"paper": total.flops_paper, "corrected": total.flops},
            time_s={
                "step_median": sorted(history.step_seconds)[len(history.step_seconds) // 2],
                "total": sum(row["seconds"] for row in history.rows),
            },
            provenance=provenance(self.folder.identity_hash, self.datamodule.fingerprint, keep_freed_memory()),
            recipe=recipe,
        )

    def _first_batch(self) -> Batch:
        """The batch that measurements are made on, as the network gets it."""
        images, labels = self.datamodule.first_batch(self.identity.seed)
        return self.model.prepare(images), labels.to(self.model.device)

    def measure(self, **options: Any) -> None:
        """Measure perplexity and write the table."""
        with self.folder.locked(self._config_text()):
            model = self.model.train()
            table = measure_perplexity(
                *(model.backbone, model.names, classification_loss, self._first_batch()),
                *(model.energies, model.mode_energies, model.storages),
            )
            replace(table, model=self.identity.model).save(self.folder.result)
        print(f"perplexity of {len(table.layers)} layers in {self.folder.result}", flush=True)

    def validate(self, ckpt_path: str | None = None, verbose: bool = True, **options: Any) -> None:
        """Validation accuracy of a checkpoint, by default the run's best."""
        self.trainer.validate(
            self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(ckpt_path), verbose=verbose
        )

    def test(self, ckpt_path: str | None = None, verbose: bool = True, **options: Any) -> None:
        """Test accuracy of a checkpoint, by default the run's best."""
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(ckpt_path), verbose=verbose
        )

    def _checkpoint(self, given: str | None) -> str:
        path = Path(given) if given else self.folder.checkpoints / BEST
        if not path.is_file():
            raise ExperimentError(f"there is no checkpoint {path}; train this run first, or give --ckpt_path")
        _require_checkpoint_of(self.model, path)
        return str(path)


def _is_table(path: Path) -> bool:
    try:
        PerplexityTable.load(path)
    except TableError:
        return False
    return True


def _require_checkpoint_of(model: FineTune, path: Path) -> None:
    """Raise unless a checkpoint is whole and of this network."""
    if read_state_dict(str(path)).keys() != model.backbone.state_dict().keys():
        raise ExperimentError(f"checkpoint {path} is of another network; delete that run's folder")


class _Check(SuiteCLI):
    """Parses and checks a command, and ends before anything is built."""

    def _set_seed(self) -> None:
        super()._set_seed()
        raise _NothingToDo


def run(arguments: Sequence[str], work: Work | None = None, kind: type[SuiteCLI] = SuiteCLI) -> None:
    """Run one command.

    Args:
        arguments: of the command.
        work: where the run that it is about is noted, and its folder.
        kind: how the command is run.

    Raises:
        ExperimentError, LowRankError, ArgumentError: something that the user can mend.
    """
    for message in (
        ".*in eval mode at the start.*",
        ".*does not have many workers.*",
        ".*args parameter is intended.*",
        ".*isinstance.treespec.*",
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    words = underscored(arguments)
    check_config_files(words)
    try:
        kind(
            FineTune,
            ImageDataModule,
            work=work or Work(),
            save_config_callback=None,
            seed_everything_default=SEED,
            trainer_class=Trainer,
            trainer_defaults={"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=words,
        )
    except _NothingToDo as done:
        if kind is SuiteCLI:
            print(done)


def check(arguments: Sequence[str]) -> None:
    """Raise what `run` would raise of a command's options and settings, before anything is built or written."""
    run(arguments, kind=_Check)


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code; see `experiment.command.finish`."""
    return finish(lambda work: run(arguments, work), MENDABLE)
