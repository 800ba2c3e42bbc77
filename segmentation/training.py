"""One run: train or measure what a config describes, in the run's own folder."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.runner import CheckpointLoader, Runner
from mmseg.registry import DATASETS, MODELS
from mmseg.utils import register_all_modules

from experiment import ExperimentError, Record, RunFolder, Status, provenance
from experiment import Run as RunName
from experiment.allocator import keep_freed_memory
from experiment.record import RESULT
from lowrank import account, converted_layers, measure_perplexity, peak_bytes, saved_bytes
from segmentation.batches import first_batch, logits, segmentation_loss, training_mode
from segmentation.checkpoints import LAST, check_fit, load_weights, newest, read_safely_everywhere
from segmentation.compose import hook_settings
from segmentation.data.registry import data_fingerprint, require_data
from segmentation.history import History
from segmentation.hook import LowRankHook, unwrapped
from segmentation.identity import MEASURED, TRAINED, identity_of, method_tag, run_of
from segmentation.saving import write_or_say

TABLE = "perplexity.json"
FINAL = "final.pth"  # the last weights alone, as MMSegmentation loads them


@dataclass(frozen=True)
class Task:
    """A composed config and where its run goes.

    Attributes:
        config: see `segmentation.compose`.
        runs_dir: folder that holds all runs.
        work_dir: the run's own folder; by default one below `runs_dir` by what the run is.
        resume: go on with an interrupted run.
        dry_run: say what would be done, and stop.
    """

    config: Config
    runs_dir: Path
    work_dir: Path | None = None
    resume: bool = False
    dry_run: bool = False

    def folder(self, name: RunName, result: str) -> RunFolder:
        """The run's folder."""
        identity = identity_of(self.config, MEASURED if result == TABLE else TRAINED)
        return RunFolder(self.work_dir or name.folder(self.runs_dir), identity, result, last=LAST)

    def pending(self, name: RunName, folder: RunFolder) -> bool:
        """Whether there is something to do; says so if there is not.

        Raises:
            ExperimentError: the run was interrupted, and `resume` is not asked for.
        """
        status = folder.status()
        if self.dry_run:
            todo = {Status.NEW: "would run", Status.INTERRUPTED: "would resume", Status.DONE: "is done, would skip"}
            print(f"{todo[status]}: {name}\n  folder: {folder.path}")
            return False
        if status is Status.DONE:
            print(f"done already: {name}\n  result: {folder.result}")
            return False
        if status is Status.INTERRUPTED and not self.resume:
            raise ExperimentError(f"{folder.path} holds an interrupted run; add --resume, or delete that folder")
        return True


def train(task: Task) -> Record | None:
    """Train, measure and write the record; None if there was nothing to do.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    allocator = keep_freed_memory()
    name = run_of(task.config, method_tag(task.config))
    folder = task.folder(name, RESULT)
    if not task.pending(name, folder):
        return None
    require_data(task.config)
    read_safely_everywhere()
    if not folder.last_checkpoint:
        require_weights(task.config)
    if not _is_first_process(task.config):
        _trained(task, folder)
        return None
    with folder.locked(as_yaml(task.config)):
        print(f"{'resuming' if folder.last_checkpoint else 'training'}: {name}", flush=True)
        start = time.perf_counter()
        runner, history = _trained(task, folder)
        record = _record(task, name, runner, history, allocator, folder, time.perf_counter() - start)
        write_or_say(folder.path / FINAL, _final(runner))
        record.save(folder.path)
    print(f"  best mIoU {100 * record.accuracy['miou_best']:.1f} %, record in {folder.result}", flush=True)
    return record


def _is_first_process(config: Config) -> bool:
    """Whether this is the process that writes, of those that a launcher started."""
    variable = {"pytorch": "RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}.get(config.get("launcher"))
    return variable is None or os.environ.get(variable, "0") == "0"


def _trained(task: Task, folder: RunFolder) -> tuple[Runner, History]:
    runner, history = _runner(_for_runner(task.config, folder)), History(folder.path)
    runner.register_hook(history)
    runner.train()
    return runner, history


def _runner(config: Config) -> Runner:
    with quietly():
        return Runner.from_cfg(config)


@contextmanager
def quietly() -> Iterator[None]:
    """The log goes to its file, the terminal shows the run's own lines: a logger keeps the stream it is made with."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the logger lives
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def require_weights(config: Config) -> None:
    """Refuse weights that cannot be read, or are of another network, before anything is written.

    Raises:
        ExperimentError: see `segmentation.checkpoints.check_fit`.
    """
    source = config.get("load_from")
    if source:
        content = CheckpointLoader.load_checkpoint(source, "cpu", logger="silent")
        with quietly():
            register_all_modules(init_default_scope=True)
            model = MODELS.build(config.model)
        check_fit(model, content, source)


def _final(runner: Runner) -> bytes:
    """The last weights as a file."""
    weights = {name: tensor.cpu() for name, tensor in unwrapped(runner.model).state_dict().items()}
    file = io.BytesIO()
    torch.save({"meta": {"dataset_meta": _metainfo(runner)}, "state_dict": weights}, file)
    return file.getvalue()


def _metainfo(runner: Runner) -> dict[str, Any]:
    return dict(runner.train_dataloader.dataset.metainfo)


def as_yaml(config: Config) -> str:
    """A config as YAML, from which the run can be started again; tuples stay what they are."""
    text: str = yaml.dump(config.to_dict(), sort_keys=False)
    return text


def _for_runner(config: Config, folder: RunFolder) -> Config:
    config = Config(config.to_dict())
    config.work_dir = str(folder.path)
    # MMEngine's logger and message hub are found by this name; two runs in one process must not share them.
    config.experiment_name = f"{folder.identity_hash}_{time.time_ns()}"
    config.setdefault("default_hooks", {})
    saving = dict(config.default_hooks.get("checkpoint") or {"type": "CheckpointHook", "interval": 1})
    if saving["type"] == "CheckpointHook":
        config.default_hooks["checkpoint"] = {**saving, "type": "WholeCheckpoints", "identity": folder.identity_hash}
    if folder.last_checkpoint:
        config.load_from, config.resume = str(newest(folder.path, folder.identity_hash)), True
    return config


def _record(
    task: Task, name: RunName, runner: Runner, history: History, allocator: str, folder: RunFolder, seconds: float
) -> Record:
    model, config = unwrapped(runner.model), task.config
    batch = first_batch(model, runner.train_dataloader.dataset, config.train_dataloader.batch_size, name.seed)
    settings = hook_settings(config) or {}
    frozen = settings.get("freeze_statistics", True)
    training_mode(model) if frozen else model.train()
    layers = [layer._lowrank.name for layer in converted_layers(model)]
    kept = saved_bytes(model, segmentation_loss, batch)
    peak = peak_bytes(model, segmentation_loss, batch)
    total = account(model, layers, batch, forward=segmentation_loss).total if layers else None
    inference = peak_bytes(model.eval(), logits, batch, backward=False)
    rows = history.rows
    if not rows:
        raise ExperimentError("the run ended without a validation; set train_cfg.val_interval to at most max_iters")
    return Record(
        run=name,
        accuracy={
            "miou_best": max(row["miou"] for row in rows),
            "miou_last": rows[-1]["miou"],
            "macc_best": max(row["macc"] for row in rows),
            "macc_last": rows[-1]["macc"],
        },
        memory_bytes={
            "activation_formula": history.activation_bytes,
            "saved_measured": kept,
            "peak_measured": peak,
            "peak_inference": inference,
        },
        flops={"paper": total.flops_paper, "corrected": total.flops} if total else {},
        time_s={
            "step_median": statistics.median(row["step_seconds"] for row in rows),
            "total": max(seconds, sum(row["seconds"] for row in rows)),
        },
        provenance=provenance(folder.identity_hash, data_fingerprint(config), allocator),
        recipe=recipe_of(config),
    )


def recipe_of(config: Config) -> dict[str, Any]:
    """How a run is trained, as a record says it; see `experiment.Record`."""
    wrapper = config.optim_wrapper
    return {
        "epochs": config.train_cfg.get("max_epochs"),
        "steps": config.train_cfg.get("max_iters"),
        "learning_rate": wrapper.get("optimizer", {}).get("lr"),
        "batch_size": config.train_dataloader.batch_size,
        "image_size": list(config.crop_size) if config.get("crop_size") else None,
        "precision": "16-mixed" if wrapper.get("type") == "AmpOptimWrapper" else "32-true",
    }


def measure(task: Task) -> Path | None:
    """Measure the perplexity of the chosen layers on one training batch and write the table; None if it was there.

    `perplexity` in the config holds further arguments of `lowrank.measure_perplexity`, such as its energies.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    keep_freed_memory()
    name = run_of(task.config, "perplexity")
    folder = task.folder(name, TABLE)
    if not task.pending(name, folder):
        return None
    require_data(task.config)
    read_safely_everywhere()
    require_weights(task.config)
    with folder.locked(as_yaml(task.config)):
        model, layers = prepared_model(task.config)
        dataset = DATASETS.build(task.config.train_dataloader.dataset)
        batch = first_batch(model, dataset, task.config.train_dataloader.batch_size, name.seed)
        settings = {"storages": ("input", "int8"), **task.config.get("perplexity", {})}
        table = measure_perplexity(training_mode(model), layers, segmentation_loss, batch, **settings)
        replace(table, model=name.model).save(folder.result)
    print(f"perplexity of {len(table.layers)} layers in {folder.result}", flush=True)
    return folder.result


def prepared_model(config: Config) -> tuple[Any, list[str]]:
    """The config's model with its weights, frozen as for training but not converted, and the layers it trains.

    Raises:
        ExperimentError: the config has no `LowRankHook` with layers, or an earlier version saved the weights.
    """
    settings = hook_settings(config)
    if settings is None or not settings["layers"]:
        raise ExperimentError("the config names no layers; give --layers, or a LowRankHook in custom_hooks")
    read_safely_everywhere()
    with quietly():
        register_all_modules(init_default_scope=True)
        model = MODELS.build(config.model)
        model.init_weights()
    if config.get("load_from"):
        load_weights(model, config.load_from)
    exact = {**settings, "method": {"type": "Vanilla"}, "budget": None, "fuse": False, "recompute_loss": False}
    hook = LowRankHook(**exact)
    layers = hook.prepare(model)
    return model, layers
