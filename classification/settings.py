"""Settings that cannot work, refused in one line before anything is built or written."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from classification.data.module import FRONT_OF_AUGMENTED
from classification.identity import is_lightnings, path_of
from classification.start import strategy_of
from experiment import ExperimentError
from experiment.limit import check_limit
from experiment.method import check_precision, require_own_ranks, require_use
from experiment.process_group import require_room
from experiment.warned import tell_crowded

PRECISIONS = {"32", "32-true", "16-mixed", "bf16-mixed", "16", "bf16"}  # what is measured is in single precision
LEAST = {  # per number that has one
    "seed_everything": 0,
    "batches": 1,
    "trainer.max_epochs": 1,
    "trainer.min_epochs": 0,
    "trainer.min_steps": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 0,
    "trainer.reload_dataloaders_every_n_epochs": 0,
    "trainer.gradient_clip_val": 0,
    "trainer.num_nodes": 1,
    "model.learning_rate": 0,
    "model.momentum": 0,
    "model.weight_decay": 0,
    "model.warmup_epochs": 0,
    "model.warmup_start": 0,
    "model.final_learning_rate": 0,
    "data.workers": 0,
    "data.partition_seed": 0,
    "data.limit_seed": 0,
    **dict.fromkeys(("data.image_size", "data.batch_size", "data.eval_batch_size", "data.max_length"), 1),
}
MOST = {"seed_everything": 2**32 - 1, "model.momentum": 1}  # numpy's generators have no other seeds
ABOVE_0 = tuple(f"trainer.limit_{part}_batches" for part in ("train", "val", "test"))
_WHOLE_EPOCHS = "a run is made of whole epochs"
WORDS = {  # settings that are one of these words, or not given, which Lightning looks at once it has read the data
    "trainer.gradient_clip_algorithm": ("norm", "value"),
    "trainer.profiler": ("simple", "advanced", "pytorch", "xla"),
}
NAMED = {  # files and folders that have a name, or are not given
    "runs_dir": "give a folder, such as runs",
    "data.root": "give a folder, such as data",
    **dict.fromkeys(("model.weights", "data.split_file", "ckpt_path"), "give a file, or leave the option out"),
}
ONLY = {  # settings of a training run that have one value alone
    "trainer.check_val_every_n_epoch": (1, "each epoch has a row in metrics.csv"),
    "trainer.val_check_interval": (None, "each epoch is validated once, at its end"),
    "trainer.max_steps": (-1, f"{_WHOLE_EPOCHS}; give --trainer.max_epochs"),
    "trainer.enable_checkpointing": (None, "without checkpoints a run cannot be resumed, nor its best epoch be tested"),
    "trainer.barebones": (False, "it does without all that a record is made of"),
    "trainer.overfit_batches": (0.0, "it validates on training images"),
    "trainer.sync_batchnorm": (False, "statistics are frozen, or of each process"),
}
UNFIT = {  # Lightning's callbacks that change what the record says of a run, or what it trains
    "StochasticWeightAveraging": "it trains one epoch more than --trainer.max_epochs; WeightAveraging has them all",
    "BatchSizeFinder": "memory is that of --data.batch_size; find it beforehand, and give it so",
    "BackboneFinetuning": "which layers train is said by --model.layers, and it would freeze these and train others",
    "SpikeDetection": "it cannot load what it saves, so no run with it goes on or is tested (Lightning 2.6)",
    "ModelPruning": "it puts masked weights in the place of those that are trained and saved",
    "LearningRateFinder": "the rate is that of --model.learning_rate; find it beforehand, and give it so",
}
_AS_GOOD = {"trainer.val_check_interval": (1.0,), "trainer.enable_checkpointing": (True,)}


def check_settings(config: Mapping[str, Any], trains: bool) -> pl.Trainer:
    """Check a resolved config.

    Args:
        config: of a command.
        trains: whether the command trains.

    Returns:
        A trainer as Lightning makes it by these settings, of which nothing but its devices and processes is of use.

    Raises:
        ExperimentError: a setting that cannot work; names it and what is allowed.
    """
    for key, instead in NAMED.items():
        if _at(config, key) == "":  # as of a variable that is not set
            raise ExperimentError(f"--{key} is empty; {instead}")
    for key, words in WORDS.items():
        if isinstance(value := _at(config, key), str) and value not in words:
            raise ExperimentError(f"--{key} is {value}; allowed: {', '.join(words)}")
    _check_numbers(config)
    workers = _at(config, "data.workers") or 0
    require_room(f"--data.workers {workers}", workers)
    tell_crowded(f"--data.workers {workers}", workers)
    precision = _at(config, "trainer.precision")
    if precision is not None and str(precision) not in PRECISIONS:
        raise ExperimentError(f"--trainer.precision is {precision}; allowed: {', '.join(sorted(PRECISIONS))}")
    if _at(config, "trainer.fast_dev_run"):
        raise ExperimentError("--trainer.fast_dev_run leaves no record; give --trainer.max_epochs 1")
    _check_together(config)
    if trains:
        _check_training(config)
    return _check_device(config["trainer"])


def _check_numbers(config: Mapping[str, Any]) -> None:
    for key in (*LEAST, *ABOVE_0):
        value = _at(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least, most = LEAST.get(key, 0), MOST.get(key, math.inf)
        if not least <= value <= most or value == math.inf or (value == 0 and key in ABOVE_0):
            span = f"above {least}" if key in ABOVE_0 else f"from {least}{f' to {most}' if key in MOST else ''}"
            raise ExperimentError(f"--{key} is {value}; allowed are finite numbers {span}")
    for key, least in (("data.mean", -math.inf), ("data.std", 0)):
        if not all(least < value < math.inf for value in _at(config, key) or ()):
            above = " above 0" if least == 0 else ""
            raise ExperimentError(f"--{key} is {_at(config, key)}; allowed are finite numbers{above}")
    check_limit(_at(config, "data.limit"), "--data.limit")
    if not 0 <= (select_from := _at(config, "model.select_from")) < 1:
        raise ExperimentError(f"--model.select_from is {select_from}; allowed are numbers from 0 to below 1")


def _check_together(config: Mapping[str, Any]) -> None:
    """Refuse settings that cannot work with one another."""
    model, data = config["model"], config["data"]
    if data["augment"]:
        if data["cache"]:
            raise ExperimentError(
                "--data.augment draws every image anew, so it cannot go with --data.cache; set one off"
            )
        if model["cache_front"]:
            raise ExperimentError(FRONT_OF_AUGMENTED)
        if data["image_size"] < 2:  # torchvision's crops of so little end in an assertion of PyTorch's, now and then
            raise ExperimentError(
                f"--data.image_size is {data['image_size']}; allowed with --data.augment are whole numbers from 2"
            )
    if data["limit"] is not None and data["drop_last"] and 1 < data["limit"] < data["batch_size"]:
        raise ExperimentError(
            f"--data.limit is {data['limit']:g}, which does not fill one batch of {data['batch_size']}; raise it, or "
            f"lower --data.batch_size"
        )
    if data["split_file"] is not None and data["partition"] == "all":
        raise ExperimentError("--data.split_file divides the data set: set --data.partition to pretrain or finetune")
    if model["optimizer"] == "adamw" and model["momentum"]:
        raise ExperimentError(f"--model.momentum is {model['momentum']}, and AdamW has its own; set it to 0")
    if model["method"] is not None and model["budget"] is None:
        require_own_ranks(model["method"])


def _check_training(config: Mapping[str, Any]) -> None:
    fewest, epochs = _at(config, "trainer.min_epochs"), _at(config, "trainer.max_epochs")
    if epochs is not None and (fewest or 0) > epochs:
        raise ExperimentError(f"--trainer.min_epochs is {fewest}, above the {epochs} of --trainer.max_epochs")
    for key, (only, reason) in ONLY.items():
        value = _at(config, key)
        if value != only and value not in _AS_GOOD.get(key, ()):
            raise ExperimentError(f"--{key} is {value}; allowed is {_AS_GOOD.get(key, (only,))[0]} alone: {reason}")
    given = _at(config, "trainer.callbacks") or ()
    for path in map(path_of, given if isinstance(given, list) else [given]):
        if is_lightnings(path) and (reason := UNFIT.get(path.rpartition(".")[2])):
            raise ExperimentError(f"--trainer.callbacks has {path}, which no run can have: {reason}")
    precision = str(_at(config, "trainer.precision"))
    if "16" in precision:
        check_precision(_at(config, "model.method"), f"--trainer.precision is {precision}")
    if _at(config, "model.budget") is not None:
        require_use(_at(config, "model.method"), "--model.budget")
    if (choice := _at(config, "model.rank_choice")) != "perplexity":
        require_use(_at(config, "model.method"), f"--model.rank_choice {choice}")
    _check_time(_at(config, "trainer.max_time"))
    if config.get("ckpt_path") is not None:
        raise ExperimentError(
            "--ckpt_path is not for fit: an interrupted run goes on by itself, and --model.weights gives what to "
            "start from"
        )


def _check_time(given: Any) -> None:
    try:
        seconds = Timer(given)._duration
    except (MisconfigurationException, TypeError):
        seconds = -1.0
    if seconds is not None and seconds < 0:
        raise ExperimentError(
            f"--trainer.max_time is {given}; allowed are times from 0 as DD:HH:MM:SS, such as 00:12:00:00"
        )


def _check_device(trainer: Mapping[str, Any]) -> pl.Trainer:
    """Let Lightning say whether it finds the device, before data is read and a network built."""
    every = {key: trainer[key] for key in ("accelerator", "devices", "num_nodes", "precision")} | {
        "strategy": strategy_of(trainer)
    }
    asked: dict[str, Any] = {key: value for key, value in every.items() if not isinstance(value, dict)}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    before = dict(os.environ)
    try:
        with warnings.catch_warnings(action="ignore"):
            return pl.Trainer(**asked, **quiet, max_epochs=1)
    except Exception as error:  # Lightning and torch have no base of their own for these
        reason = " ".join(str(error).split())[:300]
        told = ", ".join(f"--trainer.{key} {value}" for key, value in asked.items() if value not in (None, "auto"))
        raise ExperimentError(f"{told} is not to be had on this machine ({reason})") from None
    finally:
        os.environ.clear()
        os.environ.update(before)


def _at(config: Mapping[str, Any], key: str) -> Any:
    part, _, name = key.rpartition(".")
    return config[part].get(name) if part else config.get(name)
