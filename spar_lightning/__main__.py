"""Entry point of `python -m spar_lightning`, which is the same as `spar`."""

import sys

from spar_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
