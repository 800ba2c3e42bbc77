"""One run: train or measure what a config describes, in the run's own folder."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend
from mmseg.registry import DATASETS
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from experiment import ExperimentError, Record, RunFolder
from experiment import Run as RunName
from experiment.allocator import keep_freed_memory
from experiment.checkpoints import FINAL
from experiment.command import Work
from experiment.contents import tell_repeated
from experiment.execute import at_work_on, nothing_to_do
from experiment.files import write_whole
from experiment.measure import Trained, recipe_of, record_of, write_table
from experiment.method import table_tag
from experiment.processes import first_does, first_holds, place, say
from experiment.record import RESULT, TABLE
from experiment.signals import held
from lowrank import converted_layers, kernels
from segmentation.batches import first_batch, first_batches, logits, segmentation_loss, training_mode
from segmentation.building import require_optimizer
from segmentation.checkpoints import LAST, newest, read_safely_everywhere
from segmentation.compose import frozen_statistics, with_naming_readers
from segmentation.data.registry import Data, data_of, require_data
from segmentation.data.samples import require_samples
from segmentation.formatting import formatted_once
from segmentation.history import Begun, History
from segmentation.hook import LowRankHook, unwrapped
from segmentation.identity import (
    MEASURED,
    TRAINED,
    advice,
    budget_settings,
    further_settings,
    identity_of,
    method_tag,
    perplexity_settings,
    require_budget,
    run_of,
)
from segmentation.network import prepared_model, require_classes, require_steps, require_trainable, require_weights
from segmentation.quiet import quietly
from segmentation.runner_config import runner_config
from segmentation.sources import own_sources
from segmentation.unread import require_read


@dataclass(frozen=True)
class Task:
    """A composed config and where its run goes.

    Attributes:
        config: see `segmentation.compose`.
        runs_dir: folder that holds all runs.
        work_dir: the run's own folder; by default one below `runs_dir` by what the run is.
        dry_run: say what would be done, and stop.
    """

    config: Config
    runs_dir: Path
    work_dir: Path | None = None
    dry_run: bool = False

    def begin(self, name: RunName, result: str, work: Work | None) -> RunFolder | None:
        """The run's folder, once its data are there and its weights are right; None where there is nothing to do.

        Raises:
            ExperimentError: the folder holds another run, there are no data, or the weights are of another network.
        """
        keep_freed_memory()
        kernels.wanted()
        identity = identity_of(self.config, MEASURED if result == TABLE else TRAINED)
        path = self.work_dir or name.folder(self.runs_dir)
        data = data_of(self.config)
        about = (identity, result, _told(data, result), LAST, name, own_sources(identity), advice(self.config))
        folder = RunFolder(path, *about, earlier_data=data.fingerprint if result == TABLE else None)
        if work is not None:
            work.title, work.folder = str(name), path
        said = nothing_to_do(name, folder, self.dry_run, lambda: self._check(folder, data))
        if said is not None:
            print(said)
            return None
        require_data(self.config)
        require_budget(self.config, folder.identity, data.fingerprint, data.measured)
        require_classes(self.config)
        if result == RESULT:
            require_optimizer(self.config)
            require_read(self.config)
        require_steps(self.config)
        data = data if data.fingerprint else data_of(self.config)
        folder.data_fingerprint = _told(data, result)
        if self.config.get("processes", 1) == place().count:  # else those that are to be started tell it
            require_samples(self.config, trains=result == RESULT)
            folder.repeated = tell_repeated(self.config.get("dataset") or "the data set", data.trained, data.tested)
        if not folder.last_checkpoint:
            require_weights(self.config, download=True)
        return folder

    def _check(self, folder: RunFolder, data: Data) -> None:
        """Refuse what the run would, as far as what it needs is there; nothing is downloaded."""
        if folder.result.name == TABLE:
            prepared_model(self.config, weights=False)
            if data.fingerprint is not None:
                DATASETS.build(with_naming_readers(self.config).train_dataloader.dataset)
        else:
            require_optimizer(self.config)
            require_read(self.config)
            of_runner = runner_config(self.config, folder.path, folder.identity_hash)
            require_trainable(self.config, of_runner, with_data=data.fingerprint is not None)
        require_budget(self.config, folder.identity, data.fingerprint, data.measured)
        if data.fingerprint is None:
            return
        require_classes(self.config)
        require_samples(self.config, trains=folder.result.name == RESULT)
        if not folder.last_checkpoint:
            require_weights(self.config, download=False)


def _told(data: Data, result: str) -> str | None:
    """The fingerprint of what counts of the data: of a perplexity table those that it is measured on."""
    return data.measured if result == TABLE else data.fingerprint


def is_due(task: Task, work: Work | None = None) -> bool:
    """Whether there is something to train; says so if there is not.

    Raises:
        ExperimentError: see `Task.begin`.
    """
    name = run_of(task.config, method_tag(task.config))
    return task.begin(name, RESULT, work) is not None


def train(task: Task, work: Work | None = None) -> Record | None:
    """Train, measure and write the record; None if there was nothing to do, or the first of several processes did it.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    name = run_of(task.config, method_tag(task.config))
    folder = _begun(task, name, RESULT, work)
    if folder is None:
        return None
    records: list[Record] = []
    begun = Begun()
    with formatted_once(), first_holds(at_work_on(name, folder, as_yaml(task.config), begun)):
        checkpoint = first_does(lambda: _resumed(name, folder))
        runner, history = _trained(task, folder, checkpoint, begun)

        def save() -> None:
            record = _record(task, name, runner, history, folder)
            write_whole(folder.path / FINAL, _final(runner))
            record.save(folder.path)
            _log_settings(runner, record)
            records.append(record)

        first_does(save)
    for record in records:
        say(f"  best mIoU {100 * record.accuracy['miou_best']:.1f} %, record in {folder.result}")
    return records[0] if records else None


def _begun(task: Task, name: RunName, result: str, work: Work | None) -> RunFolder | None:
    """The run's folder in every process, once the first has looked at it; None where there is nothing to do."""
    folder = first_does(lambda: task.begin(name, result, work))
    read_safely_everywhere()
    return folder


def _resumed(name: RunName, folder: RunFolder) -> Path | None:
    """The checkpoint to go on from, if there is one; says that the run begins."""
    resumes = folder.last_checkpoint is not None
    say(f"{'resuming' if resumes else 'training'}: {name}")
    return newest(folder.path, folder.identity_hash) if resumes else None


def _trained(task: Task, folder: RunFolder, checkpoint: Path | None, begun: Begun) -> tuple[Runner, History]:
    config = runner_config(task.config, folder.path, folder.identity_hash, checkpoint)
    runner, history = _runner(config), History(folder.path)
    for hook in (begun, history):
        runner.register_hook(hook)
    try:
        with held(later=True):
            runner.train()
    finally:
        _end_loading(runner)
    _require_whole(runner)
    return runner, history


def _require_whole(runner: Runner) -> None:
    """Refuse a run that something has ended before its length, which its record would say.

    Raises:
        ExperimentError: see above.
    """
    by_iterations = runner.cfg.train_cfg.get("max_iters") is not None
    done, length = (runner.iter, runner.max_iters) if by_iterations else (runner.epoch, runner.max_epochs)
    if done < length:
        what = "iterations" if by_iterations else "epochs"
        raise ExperimentError(
            f"stopped after {done} of {length} {what}, by a hook such as EarlyStoppingHook, so there is no record; "
            f"leave it out, or give another length"
        )


def _end_loading(runner: Runner) -> None:
    """End the processes that load data, which live as long as the runner: when that is collected as garbage, their
    queues are gone, and each is waited for, for five seconds."""
    for loop in (runner._train_loop, runner._val_loop):
        holders = (getattr(loop, name, None) for name in ("dataloader_iterator", "dataloader"))
        for holder in filter(None, holders):
            if isinstance(getattr(holder, "_iterator", None), _MultiProcessingDataLoaderIter):
                holder._iterator._shutdown_workers()
                holder._iterator = None


def _runner(config: Config) -> Runner:
    with quietly():
        return Runner.from_cfg(config)


def _final(runner: Runner) -> bytes:
    """The last weights as a file: those that were validated, which are averages where a hook makes them."""
    content = {"state_dict": dict(unwrapped(runner.model).state_dict())}
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.before_save_checkpoint(runner, content)
    weights = {name: tensor.cpu() for name, tensor in content["state_dict"].items()}
    file = io.BytesIO()
    torch.save({"meta": {"dataset_meta": _metainfo(runner)}, "state_dict": weights}, file)
    return file.getvalue()


def _metainfo(runner: Runner) -> dict[str, Any]:
    return dict(runner.train_dataloader.dataset.metainfo)


def as_yaml(config: Config) -> str:
    """A config as YAML, from which the run can be started again; tuples stay what they are."""
    text: str = yaml.dump(config.to_dict(), sort_keys=False)
    return text


def _log_settings(runner: Runner, record: Record) -> None:
    """Give a run's settings with its results to TensorBoard, where the config asks for that."""
    for backend in runner.visualizer._vis_backends.values():
        if isinstance(backend, TensorboardVisBackend):
            backend.experiment.add_hparams(record.settings, record.results, run_name=".")


def _record(task: Task, name: RunName, runner: Runner, forwarding: History, folder: RunFolder) -> Record:
    model, config, history = unwrapped(runner.model), task.config, forwarding.history
    rows = history.rows
    if not rows:
        raise ExperimentError("the run ended without a validation; set train_cfg.val_interval to at most max_iters")
    accuracy = {f"{key}_best": max(row[key] for row in rows) for key in ("miou", "macc")}
    accuracy |= {f"{key}_last": rows[-1][key] for key in ("miou", "macc")}
    batch = first_batch(model, runner.train_dataloader.dataset, config.train_dataloader.batch_size, name.seed)
    training_mode(model) if frozen_statistics(config) else model.train()
    layers = [layer._lowrank.name for layer in converted_layers(model)]
    method = next((hook.method for hook in runner.hooks if isinstance(hook, LowRankHook)), None)
    trained = Trained(model, layers, segmentation_loss, logits, batch, runner.optim_wrapper.optimizer, method)
    further = further_settings(folder.identity)
    return record_of(name, folder, trained, history, accuracy, _recipe(config), further, budget_settings(config))


def _recipe(config: Config) -> dict[str, Any]:
    wrapper, limit = config.optim_wrapper, config.train_dataloader.dataset.get("limit")
    return recipe_of(
        config.train_dataloader.batch_size,
        limit,
        epochs=config.train_cfg.get("max_epochs"),
        steps=_steps(config),
        learning_rate=_learning_rate(config),
        image_size=list(config.crop_size) if config.get("crop_size") else None,
        precision="16-mixed" if wrapper.get("type") == "AmpOptimWrapper" else "32-true",
    )


def _steps(config: Config) -> int | None:
    """How many steps the optimizer makes, of a run that counts iterations: one for several, and one for the rest."""
    iterations = config.train_cfg.get("max_iters")
    return None if iterations is None else math.ceil(iterations / config.optim_wrapper.get("accumulative_counts", 1))


def _learning_rate(config: Config) -> float | None:
    """The rate that is trained with: MMEngine may scale the config's by the batch of all processes."""
    rate, scaling = config.optim_wrapper.get("optimizer", {}).get("lr"), config.get("auto_scale_lr") or {}
    if rate is None or not scaling.get("enable"):
        return rate
    batch = config.train_dataloader.batch_size * config.get("processes", 1)
    return float(rate * batch / scaling["base_batch_size"])


def measure(task: Task, work: Work | None = None) -> Path | None:
    """Measure the perplexity of the chosen layers on training batches and write the table; None if it was there.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    name = run_of(task.config, table_tag(perplexity_settings(task.config).get("derive", False)))
    folder = _begun(task, name, TABLE, work)
    if folder is None:
        return None
    first_does(lambda: _measure(task, name, folder))
    return folder.result


def _measure(task: Task, name: RunName, folder: RunFolder) -> None:
    with at_work_on(name, folder, as_yaml(task.config), begun=lambda: False):
        torch.manual_seed(name.seed)  # what has no weights to start from gets the same ones every time
        model, layers = prepared_model(task.config)
        dataset = DATASETS.build(with_naming_readers(task.config).train_dataloader.dataset)
        settings = perplexity_settings(task.config)
        shape = (task.config.train_dataloader.batch_size, name.seed, settings.pop("batches", 1))
        batches = first_batches(model, dataset, *shape)
        write_table(name, folder, training_mode(model), layers, segmentation_loss, batches, settings)
