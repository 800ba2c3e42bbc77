"""`python -m segmentation prepare | measure | train | sweep | picture`."""

import sys
import warnings

if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="mm(cv|engine|seg)")  # of parts that are not used here
    from segmentation.cli import main

    sys.exit(main(sys.argv[1:]))
