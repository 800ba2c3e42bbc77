"""`python -m classification measure | fit | validate | test | sweep | prepare | weights`."""

import sys

from classification import convert_weights, prepare, sweep
from classification.cli import main

OTHERS = {"sweep": sweep.main, "prepare": prepare.main, "weights": convert_weights.main}

if __name__ == "__main__":
    command, *rest = sys.argv[1:] or [""]
    sys.exit(OTHERS[command](rest) if command in OTHERS else main(sys.argv[1:]))
