"""`python -m testbed`: make sure that every model has its INT8 variant."""

import sys

from testbed.int8 import main

if __name__ == "__main__":
    sys.argv = [sys.argv[0], *(sys.argv[1:] or ["--all"])]
    main()
