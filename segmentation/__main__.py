"""`python -m segmentation prepare | measure | train | sweep | picture`."""

import sys
import warnings

if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="mm(cv|engine|seg)")  # of parts that are not used here
    from experiment.processes import leave
    from experiment.warned import say_warnings

    say_warnings()
    from segmentation.cli import main

    sys.exit(leave(main(sys.argv[1:])))
