"""`python -m segmentation prepare | measure | train | sweep`."""

import sys

from segmentation.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
