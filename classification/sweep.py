"""Many runs by one command: pretrain (setup B), measure perplexity, train every method at every depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A failure stops only runs that need that one. Arguments that are not of this
command, such as --data.batch_size 16, go to every run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence

from classification.plans import METHODS, TRANSFORMER_METHODS, Sweep, is_transformer, names
from experiment.command import finish, importing
from experiment.jobs import Command, Program
from experiment.sweep import do_sweep, length_word, numbers, parsed, shared_settings, sweep_parser

PROGRAM = "python -m classification"


def parse(arguments: Sequence[str]) -> tuple[Sweep, bool]:
    """The sweep that the arguments describe, and whether only to list it."""
    usual = f"{' '.join(METHODS)}; of a transformer: {' '.join(TRANSFORMER_METHODS)}"
    parser = sweep_parser(PROGRAM, __doc__, names("methods"), usual)
    parser.add_argument("--setup", choices=("a", "b"), required=True)
    parser.add_argument("--model", choices=names("models"), required=True)
    parser.add_argument("--dataset", nargs="+", choices=names("data"), required=True, metavar="DATASET")
    depths = "whole numbers, ranges such as 1-14, or 'all' (default: 2 and 4, and vanilla on all as well)"
    parser.add_argument("--layers", nargs="+", metavar="N", help=depths)
    parser.add_argument("--epochs", type=length_word, metavar="N", help="of every run, in place of the setup's")
    weights = "to start from, in place of pretraining (setup B) or of a download (setup A)"
    parser.add_argument("--weights", metavar="FILE", help=weights)

    def sweep_of(options: argparse.Namespace, extra: list[str]) -> Sweep:
        options.methods = options.methods or (TRANSFORMER_METHODS if is_transformer(options.model) else METHODS)
        return Sweep(
            stage=options.setup,
            datasets=tuple(dict.fromkeys(options.dataset)),
            layers=numbers(options.layers) if options.layers else None,
            length=options.epochs,
            **shared_settings(options, extra),
        )

    return parsed(parser, arguments, sweep_of, _check)


def _check(arguments: Sequence[str]) -> None:
    """Raise what is wrong with the options and settings of a run."""
    with importing():
        from classification.cli import check  # takes seconds

    check(arguments)


def _run(arguments: Sequence[str]) -> None:
    with importing():
        from classification.cli import run  # not before the first run, as it takes seconds

    gc.collect()  # the run before leaves its network and images in reference cycles
    run(arguments)


def main(arguments: Sequence[str], command: Command = _run) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what is not done, or 2 if nothing could be begun."""
    return finish(lambda work: do_sweep(*parse(arguments), Program(PROGRAM, command)))
