"""The command line: `python -m classification measure | fit | validate | test`."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import ArgumentError
from collections.abc import Sequence

from classification.built import require_layers
from classification.config_files import check_config_files
from classification.data import ImageDataModule
from classification.data.prepared import forget_ahead
from classification.help import TRAINER_DEFAULTS
from classification.lightning_cli import NothingToDo, SeveralProcesses, SuiteCLI, Trainer
from classification.module import FineTune
from classification.parser_errors import readable
from classification.start import within_slurm
from experiment import ExperimentError
from experiment.command import Work, finish, underscored
from experiment.process_group import run_all
from experiment.processes import alone, say


class _Check(SuiteCLI):
    """Parses and checks a command, and ends before anything is read or written."""

    def _set_seed(self) -> None:
        super()._set_seed()
        require_layers(self.settings)
        raise NothingToDo


def run(arguments: Sequence[str], work: Work | None = None, kind: type[SuiteCLI] = SuiteCLI) -> None:
    """Run one command.

    Args:
        arguments: of the command.
        work: where the run that it is about is noted, and its folder.
        kind: how the command is run.

    Raises:
        ExperimentError, LowRankError: something that the user can mend.
    """
    for message in (
        ".*in eval mode at the start.*",
        ".*does not have many workers.*",
        ".*args parameter is intended.*",
        ".*isinstance.treespec.*",
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*Grad strides do not match.*",
        ".*srun. command is available.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Of how Lightning calls it, which would end the command where Python is asked to take warnings for errors.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    words = underscored(arguments)
    check_config_files(words)
    try:
        with alone(), within_slurm():
            kind(
                FineTune,
                ImageDataModule,
                work=work or Work(),
                save_config_callback=None,
                trainer_class=Trainer,
                trainer_defaults=dict(TRAINER_DEFAULTS),
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                args=words,
            )
    except NothingToDo as done:
        if kind is SuiteCLI:
            say(done)
    except SeveralProcesses as several:
        run_all("classification", arguments, several.count)
    except ArgumentError as error:
        kind._parsers.clear()  # what was asked of them besides may be left in them
        raise ExperimentError(readable(error, words)) from None
    finally:
        forget_ahead()


def check(arguments: Sequence[str]) -> None:
    """Raise what `run` would raise of a command's options, settings and number of layers, before anything is read
    or written."""
    run(arguments, kind=_Check)


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code; see `experiment.command.finish`."""
    return finish(lambda work: run(arguments, work))
