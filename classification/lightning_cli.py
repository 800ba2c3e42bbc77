"""LightningCLI of one run: its settings, its folder, and what each of its commands does there."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from torch.optim import Optimizer

from classification.backbones.registry import model_sources
from classification.backbones.weights import read_state_dict
from classification.built import require_network
from classification.callbacks import BestCheckpoint, History, LastCheckpoint, RandomState, WholeEpochs, unfinished
from classification.checkpoint_io import WholeCheckpointIO
from classification.data import ImageDataModule
from classification.data.module import check_size
from classification.data.text import TEXTS
from classification.help import RUN_OPTIONS
from classification.identity import (
    UNTESTED,
    budget_settings,
    callback_sources,
    data_fingerprint,
    further_settings,
    identity_of,
    method_tag,
    run_of,
    weights_of,
    weights_of_done,
)
from classification.image_size import require_image_size
from classification.loggers import log_record, loggers
from classification.module import Batch, FineTune, classification_loss
from classification.progress import Progress
from classification.settings import check_settings
from classification.start import forbid_requeue, join_others, start_of
from experiment import ExperimentError, Record, RunFolder
from experiment.allocator import keep_freed_memory
from experiment.checkpoints import BEST, LAST, resumable
from experiment.command import Work
from experiment.execute import at_work_on, nothing_to_do
from experiment.measure import Trained, recipe_of, record_of, write_table
from experiment.method import table_tag
from experiment.moved import place_now
from experiment.processes import first_does, first_holds, say
from experiment.ranks import Budget
from experiment.record import RESULT, TABLE
from experiment.signals import held
from experiment.sweep import SEED
from lowrank import kernels

FRONTS = "fronts"  # the folder of runs' fronts, below that of the runs
SPLIT = "split.npz"
OF_OTHER_RUNS = ("model.weights", "model.budget.table", "model.budget.run", "data.split_file")
_TO_TEST = "give the settings of that run, which are in its config.yaml, or another checkpoint as --ckpt_path"


class NothingToDo(Exception):
    """Ends a command that has no work, before anything is built."""


class SeveralProcesses(Exception):
    """Ends a command that this process does not do itself: so many others do it."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


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

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, which is a number: Lightning's would take true for one at random, which no other run could have."""
        parser.add_argument("--seed_everything", type=int, default=SEED, help="seed of the run")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, settings in RUN_OPTIONS.items():
            spellings = dict.fromkeys((name, f"--{name[2:].replace('-', '_')}"))
            parser.add_argument(*spellings, **settings)
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
        self.probe = check_settings(self.settings, trains=self.subcommand == "fit")
        self.start = start_of(self.settings, self.probe)
        # What is measured is measured by one process, whatever the number of those that train.
        self.settings["processes"] = 1 if self.subcommand == "measure" else self.start.place.count
        super()._set_seed()
        self.settings["seed_everything"] = config["seed_everything"]

    def before_instantiate_classes(self) -> None:
        keep_freed_memory()
        kernels.wanted()
        join_others(self.start, self.probe)
        self._find_moved()
        measuring = self.subcommand == "measure"
        model = self.settings["model"]
        method = table_tag(model["derive"]) if measuring else method_tag(model)
        self.identity = run_of(self.settings, method)
        path = self.identity.folder(Path(self.settings["runs_dir"]))
        result = TABLE if measuring else RESULT
        weights = weights_of_done(self.settings, path / result)
        identity = identity_of(self.settings, measuring, weights)
        told = (identity, result, data_fingerprint(self.settings))
        sources = model_sources(model["backbone"]) | callback_sources(identity)
        self.folder = RunFolder(path, *told, run=self.identity, sources=sources)
        self.work.title, self.work.folder = str(self.identity), path
        if self.subcommand in ("fit", "measure"):
            told_to_stop = first_does(self._nothing_to_do)
            if told_to_stop is not None:
                raise NothingToDo(told_to_stop)
            first_does(self._require_budget)
        elif self._checkpoint_path().parent == self.folder.checkpoints:
            first_does(lambda: self.folder.require_this_run(_TO_TEST, UNTESTED))
        if self.settings["processes"] > 1 and not self.start.started:
            raise SeveralProcesses(self.settings["processes"])

    def _find_moved(self) -> None:
        """Set what names other runs to where these are now; see `experiment.moved`."""
        config = self.config[self.subcommand]
        for key in OF_OTHER_RUNS:
            given = config.get(key)
            if isinstance(given, str):
                config[key] = place_now(given, Path(self.settings["runs_dir"]))
                *parts, name = key.split(".")
                functools.reduce(lambda settings, part: settings[part], parts, self.settings)[name] = config[key]

    def _nothing_to_do(self) -> str | None:
        return nothing_to_do(self.identity, self.folder, self.settings["dry_run"], self._check)

    def _check(self) -> None:
        """Refuse what is not for the network, and a data set, as far as it is there, of which there is too little."""
        self._require_budget()
        require_network(self.settings)
        if self.folder.data_fingerprint is not None:
            check_size(self.settings["data"], self.settings["processes"], self.settings.get("batches", 1))

    def _require_budget(self) -> None:
        """Refuse a budget that is of other data or weights than the run's, as far as these are there."""
        if given := self.settings["model"]["budget"]:
            budget = Budget(**given)
            budget.require_data(self.folder.data_fingerprint)
            budget.require_weights(self.folder.identity, weights_of)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self.settings["trainer"]
        if self.subcommand == "fit" and trainer["max_epochs"] is None:
            raise ExperimentError("--trainer.max_epochs is not given; a run needs a number of epochs")
        forwarding = History(self.folder.path)
        self.history = forwarding.history
        # At the end of the training epoch, when the history has its row.
        after_each_epoch: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        first = math.floor(self.settings["model"]["select_from"] * (trainer["max_epochs"] or 0))
        self.best = BestCheckpoint(self.folder.checkpoints, first, **after_each_epoch)
        last = LastCheckpoint(self.folder.checkpoints, **after_each_epoch)
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        configured = given if isinstance(given, list) else [given]
        callbacks = [*configured, WholeEpochs(), forwarding, RandomState(), self.best, last]
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(Progress(self.history))
        if self.subcommand == "fit" and trainer["logger"] is False:
            told = (self.settings["tensorboard"], self.settings["wandb"])
            kwargs["logger"] = loggers(self.folder.path, self.identity, *told)
        kwargs["use_distributed_sampler"] = False  # the data module shares out what each process gets
        made = super().instantiate_trainer(callbacks=callbacks, default_root_dir=str(self.folder.path), **kwargs)
        forbid_requeue(made)
        made.strategy.checkpoint_io = WholeCheckpointIO(self.folder.identity_hash)  # whatever plugins there are
        return made

    def after_instantiate_classes(self) -> None:
        data = self.settings["data"]
        if data["dataset"] not in TEXTS:
            told = (data["image_size"], self.settings["model"]["backbone"], self.datamodule.num_classes)
            require_image_size(self.model.backbone, *told)
            self.model.train()

    def fit(self, **options: Any) -> None:
        """Train, test the best epoch, measure, and write the record."""
        self.model.front_folder = Path(self.settings["runs_dir"]) / FRONTS
        self.folder.data_fingerprint, self.folder.repeated = self.datamodule.fingerprint, self.datamodule.repeated
        with first_holds(at_work_on(self.identity, self.folder, self._config_text(), self._has_begun)):
            resume = first_does(self._begin)
            with held(later=True):
                self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=resume)
            if len(self.history.rows) < self.trainer.max_epochs:
                raise ExperimentError(unfinished(self.trainer))
            recipe = self._recipe(self.trainer.global_step)
            optimizer = self.trainer.optimizers[0]
            self.trainer.test(
                self.model, datamodule=self.datamodule, ckpt_path=self.best.best_model_path, verbose=False
            )
            first_does(lambda: self._save_record(optimizer, recipe))
        accuracy = float(self.trainer.callback_metrics["test_accuracy"])
        say(f"  test accuracy {100 * accuracy:.1f} %, record in {self.folder.result}")

    def _has_begun(self) -> bool:
        """Whether there is something to keep: a step was made, or what it led to is saved."""
        return self.trainer.global_step > 0 or self.folder.last_checkpoint is not None

    def _begin(self) -> Path | None:
        """The checkpoint to go on from, if there is one; what a run has to say and to write when it begins."""
        self.datamodule.save_split(self.folder.path / SPLIT)
        resume = resumable(self.folder.checkpoints, self.folder.identity_hash, self.best.first_epoch)
        word = "training" if resume is None else "resuming" if resume.name == LAST else f"from {resume.name}"
        print(f"{word}: {self.identity}", flush=True)
        warmup, epochs = self.model.warmup_epochs, self.trainer.max_epochs
        if warmup > epochs:  # as where a recipe is cut short for a quick look
            print(f"  note: of {warmup} epochs of warm-up (--model.warmup_epochs) there are {epochs} only", flush=True)
        return resume

    def _save_record(self, optimizer: Optimizer, recipe: dict[str, Any]) -> None:
        record = self._record(optimizer, recipe)
        record.save(self.folder.path)
        log_record(self.trainer.loggers, record, self.trainer.global_step)

    def _config_text(self) -> str:
        return self._parser(self.subcommand).dump(self.config[self.subcommand])

    def _recipe(self, steps: int) -> dict[str, Any]:
        data = self.settings["data"]
        return recipe_of(
            data["batch_size"],
            data["limit"],
            epochs=self.trainer.max_epochs,
            steps=steps,
            learning_rate=self.settings["model"]["learning_rate"],
            image_size=None if data["dataset"] in TEXTS else data["image_size"],
            precision=str(self.trainer.precision),
        )

    def _record(self, optimizer: Optimizer, recipe: dict[str, Any]) -> Record:
        accuracies = [row["val_accuracy"] for row in self.history.rows]
        accuracy = {
            "val_best": max(accuracies[self.best.first_epoch :]),
            "val_last": accuracies[-1],
            "test": float(self.trainer.callback_metrics["test_accuracy"]),
        }
        network, loss = self.model.train().backbone, classification_loss
        trained = Trained(network, self.model.names, loss, loss, self._batches()[0], optimizer, self.model.method)
        further = further_settings(self.folder.identity)
        beside = budget_settings(self.settings["model"])
        return record_of(self.identity, self.folder, trained, self.history, accuracy, recipe, further, beside)

    def _batches(self) -> list[Batch]:
        """The batches that measurements are made on, as the network gets them."""
        count = self.settings["batches"] if self.subcommand == "measure" else 1
        found = self.datamodule.first_batches(self.identity.seed, count)
        return [(self.model.prepare(images), labels.to(self.model.device)) for images, labels in found]

    def measure(self, **options: Any) -> None:
        """Measure perplexity and write the table."""
        first_does(self._measure)

    def _measure(self) -> None:
        with at_work_on(self.identity, self.folder, self._config_text(), begun=lambda: False):
            model = self.model.train()
            settings = {
                "energies": model.energies,
                "mode_energies": model.mode_energies,
                "storages": model.storages,
                "derive": model.derive,
            }
            told = (model.backbone, model.names, classification_loss, self._batches(), settings)
            write_table(self.identity, self.folder, *told)

    def validate(self, ckpt_path: str | None = None, verbose: bool = True, **options: Any) -> None:
        """Validation accuracy of a checkpoint, by default the run's best."""
        self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(), verbose=verbose)

    def test(self, ckpt_path: str | None = None, verbose: bool = True, **options: Any) -> None:
        """Test accuracy of a checkpoint, by default the run's best."""
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(), verbose=verbose)

    def _checkpoint_path(self) -> Path:
        """What is validated or tested: what was given, by default the run's best."""
        given = self.settings.get("ckpt_path")
        return Path(given) if given else self.folder.checkpoints / BEST

    def _checkpoint(self) -> str:
        path = self._checkpoint_path()
        if not path.is_file():
            raise ExperimentError(f"there is no checkpoint {path}; train this run first, or give --ckpt_path")
        _require_checkpoint_of(self.model, path)
        return str(path)


def _require_checkpoint_of(model: FineTune, path: Path) -> None:
    """Raise unless a checkpoint is whole and of this network."""
    if read_state_dict(str(path)).keys() != model.backbone.state_dict().keys():
        raise ExperimentError(f"checkpoint {path} is of another network; delete that run's folder")
