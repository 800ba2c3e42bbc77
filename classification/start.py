"""In how many processes a command runs, as Lightning's settings have it, and which of them this one is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
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
        ExperimentError: several processes, by a strategy that is not known, or on machines on which none is started.
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
    external = environment.creates_processes_externally
    if trainer.num_nodes > 1 and not external:
        raise ExperimentError(
            f"--trainer.num_nodes is {trainer.num_nodes}, and nothing has started processes on other machines; start "
            f"the command by srun or torch.distributed.run"
        )
    return Start(Place(trainer.global_rank, count), external)


@contextlib.contextmanager
def within_slurm() -> Iterator[None]:
    """In a job of Slurm's that has one task, a command starts its processes itself, as anywhere else.

    Lightning would take the one for all there are, and train in one process where several were asked for. It leaves
    a job alone that is called "interactive".
    """
    name = "SLURM_JOB_NAME"
    before = os.environ.get(name)
    if os.environ.get("SLURM_NTASKS", "1") == "1":
        os.environ[name] = "interactive"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def forbid_requeue(trainer: pl.Trainer) -> None:
    """Keep Lightning from asking Slurm to start the job again: its own way to go on knows no run's identity."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if hasattr(environment, "auto_requeue"):
        environment.auto_requeue = False


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
