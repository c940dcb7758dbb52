"""``python -m inlay``."""

import sys

from inlay.cli import main

sys.exit(main())
