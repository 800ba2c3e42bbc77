"""In how many processes a command runs, as Lightning's settings have it, and which of them this one is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy

from experiment import ExperimentError
from experiment.processes import Place, join

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
_ONE_DEVICE = "single_"  # how the names of the strategies of one process start


@dataclass(frozen=True)
class Start:
    """How a command's processes start.

    Attributes:
        place: of this process among them.
        started: whether they are there already: this command has started them, or another launcher has.
    """

    place: Place
    started: bool


def strategy_of(trainer: Mapping[str, Any]) -> Any:
    """The strategy of a `trainer` config by its name, or as it is where it is a class that is none of Lightning's DDP.

    Raises:
        ExperimentError: a strategy that starts its processes within this one, or that takes the network apart.
    """
    strategy = trainer["strategy"]
    if isinstance(strategy, dict):
        if strategy["class_path"].rpartition(".")[2] != DDPStrategy.__name__:
            return strategy
        start = strategy.get("init_args", {}).get("start_method", "popen")
        name = "ddp" if start == "popen" else f"ddp_{start}"
    else:
        name = strategy
    if name in STRATEGIES or name.startswith(_ONE_DEVICE):
        return name
    raise ExperimentError(
        f"--trainer.strategy is {name}; allowed: {', '.join(STRATEGIES)}: every process starts anew and has the whole "
        f"network"
    )


def start_of(settings: Mapping[str, Any], trainer: pl.Trainer) -> Start:
    """How the processes of a command start.

    Args:
        settings: its resolved config.
        trainer: as `classification.settings.check_settings` gave it.

    Raises:
        ExperimentError: several processes, by a strategy that is not known.
    """
    count = trainer.world_size
    if count == 1:
        return Start(Place(), started=True)
    if isinstance(strategy_of(settings["trainer"]), dict):
        raise ExperimentError(
            f"--trainer.strategy is of a kind that is not known to work in {count} processes; allowed: "
            f"{', '.join(STRATEGIES)}"
        )
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    return Start(Place(trainer.global_rank, count), environment.creates_processes_externally)


def join_others(start: Start, trainer: pl.Trainer) -> None:
    """Meet the other processes, if there are any.

    Raises:
        ExperimentError: they did not come.
    """
    if start.place.count == 1 or not start.started:
        return
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    os.environ.setdefault("MASTER_ADDR", environment.main_address)
    os.environ.setdefault("MASTER_PORT", str(environment.main_port))
    join(start.place, trainer.strategy.root_device)
