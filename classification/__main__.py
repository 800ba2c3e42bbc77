"""`python -m classification measure | fit | validate | test | sweep`."""

import sys

from classification import sweep
from classification.cli import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(sweep.main(arguments[1:]) if arguments[:1] == ["sweep"] else main(arguments))
