"""`python -m classification measure | fit | validate | test | sweep | prepare | weights`."""

from __future__ import annotations

import sys

from classification import help
from experiment.command import Work, dashed, finish, importing
from experiment.errors import ExperimentError
from experiment.processes import leave
from experiment.warned import say_warnings


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names; from the first import on a signal ends it in one line."""
    return finish(lambda work: _command(arguments, work))


def _command(arguments: list[str], work: Work) -> int:
    """Imports no more than the command needs."""
    if help.wanted(arguments):
        print(help.text_of(arguments))
        return 0
    command, *rest = arguments or [""]
    if command not in help.COMMANDS and not command.startswith("-"):
        raise ExperimentError(f"there is no command {command!r}; allowed: {', '.join(help.COMMANDS)}")
    work.title = command
    if command == "sweep":
        from classification import sweep

        return sweep.main(rest)
    if command == "prepare":
        from classification import prepare

        return prepare.main(dashed(rest))
    if command == "weights":
        from classification import convert_weights

        return convert_weights.main(dashed(rest))
    with importing():
        from classification import cli

    return cli.main(arguments)


if __name__ == "__main__":
    say_warnings()
    sys.exit(leave(main(sys.argv[1:])))
