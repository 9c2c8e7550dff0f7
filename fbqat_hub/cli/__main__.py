"""``python -m fbqat_hub.cli``."""

import sys

from fbqat_hub.cli import main

sys.exit(main())
