"""`openwu bench`: hand over to the benchmarks of a source checkout, which the wheel does not contain."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from openwu.errors import OpenwuError
from openwu.version import __version__

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
"""In a source checkout."""
PACKAGE = "openwu_bench"


def run(arguments: Sequence[str]) -> int:
    """Run `openwu bench` and return its exit code; raise OpenwuError where the benchmarks are not there."""
    if not (FOLDER / PACKAGE / "command.py").is_file():
        raise OpenwuError(
            f"openwu bench: expected the benchmarks in {FOLDER}, found none: they are part of the source, not of the "
            f"installed package; run `pip install -e .` in a checkout of openwu {__version__}, then try again"
        )
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return int(importlib.import_module(f"{PACKAGE}.command").run(arguments))
