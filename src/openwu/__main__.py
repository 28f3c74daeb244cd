"""`python -m openwu`: the command line."""

from __future__ import annotations

import sys

from openwu.cli import main

sys.exit(main())
