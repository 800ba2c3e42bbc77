"""`python -m classification measure | fit | validate | test | sweep | prepare | weights`."""

from __future__ import annotations

import sys

from experiment.command import Work, finish, underscored
from experiment.processes import leave


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names; from the first import on a signal ends it in one line."""
    return finish(lambda work: _command(arguments, work))


def _command(arguments: list[str], work: Work) -> int:
    """Imports no more than the command needs."""
    command, *rest = arguments or [""]
    work.title = command
    if command == "sweep":
        from classification import sweep

        return sweep.main(rest)
    if command == "prepare":
        from classification import prepare

        return prepare.main(underscored(rest))
    if command == "weights":
        from classification import convert_weights

        return convert_weights.main(underscored(rest))
    from classification import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(leave(main(sys.argv[1:])))
