"""`python -m msd`."""

import sys

from msd.cli import main

if __name__ == "__main__":
    sys.exit(main())
