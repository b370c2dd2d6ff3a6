"""`python -m spar_lightning` is `spar`."""

import sys

from spar_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
