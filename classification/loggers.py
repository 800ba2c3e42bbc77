"""Where a run's curves go beside metrics.csv: TensorBoard, unless turned off, and Weights & Biases if asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from experiment import ExperimentError, Record, Run


def loggers(folder: Path, run: Run, tensorboard: bool, wandb: str | None) -> list[Logger]:
    """The loggers of a run.

    Args:
        folder: the run's folder; TensorBoard writes below it.
        run: names the run in Weights & Biases.
        tensorboard: whether to log to TensorBoard.
        wandb: project of Weights & Biases to log to, if any.

    Raises:
        ExperimentError: Weights & Biases is not installed.
    """
    found: list[Logger] = []
    if tensorboard:
        found.append(TensorBoardLogger(folder, name=None, version="tensorboard", default_hp_metric=False))
    if wandb is not None:
        try:
            found.append(WandbLogger(name=str(run), project=wandb, save_dir=folder))
        except ModuleNotFoundError:
            raise ExperimentError(
                "--wandb needs Weights & Biases, which is not installed; install the package wandb or leave --wandb out"
            ) from None
    return found


def log_resources(loggers: Iterable[Logger], values: Mapping[str, float], step: int) -> None:
    """Log memory, operations or times of a run at a step."""
    for logger in loggers:
        logger.log_metrics({f"resources/{name}": value for name, value in values.items()}, step)


def log_record(loggers: Iterable[Logger], record: Record, step: int) -> None:
    """Log what a finished run used in all, and what was chosen for it, beside what came of that."""
    parts = {"memory_bytes": record.memory_bytes, "flops": record.flops, "time_s": record.time_s}
    values = {f"{part}_{name}": value for part, content in parts.items() for name, value in content.items()}
    log_resources(loggers, values, step)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(record.settings, record.results, step)
        else:
            logger.log_hyperparams(record.settings)
        logger.finalize("success")
