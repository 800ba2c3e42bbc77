"""`python -m classification measure | fit | validate | test | sweep | prepare | weights`."""

import sys


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names; imports no more than it needs."""
    command, *rest = arguments or [""]
    if command == "sweep":
        from classification import sweep

        return sweep.main(rest)
    if command == "prepare":
        from classification import prepare

        return prepare.main(rest)
    if command == "weights":
        from classification import convert_weights

        return convert_weights.main(rest)
    from classification import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
