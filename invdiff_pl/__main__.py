"""``python -m invdiff_pl COMMAND …``."""

import sys

from invdiff_pl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
