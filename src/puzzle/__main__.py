"""`python -m puzzle`."""

import sys

from puzzle.cli import main

sys.exit(main())
