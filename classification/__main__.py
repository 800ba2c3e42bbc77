"""`python -m classification measure | fit | validate | test | sweep`."""

import sys


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names."""
    if arguments[:1] == ["sweep"]:
        from classification import sweep

        return sweep.main(arguments[1:])
    from classification import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
