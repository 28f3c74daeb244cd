"""`openwu bench`: hand over to the benchmarks of a source checkout, which the wheel does not contain."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import openwu
from openwu.errors import OpenwuError

PACKAGE = "openwu_bench"


def run(arguments: Sequence[str]) -> int:
    """Run `openwu bench` and return its exit code; raise OpenwuError where the benchmarks are not there."""
    folder = benchmarks_folder()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return int(importlib.import_module(f"{PACKAGE}.command").run(arguments))


def benchmarks_folder() -> Path:
    """Return `benchmarks/` of the checkout that this package is imported from."""
    folder = Path(openwu.__file__).resolve().parents[2] / "benchmarks"
    if not (folder / PACKAGE / "command.py").is_file():
        raise OpenwuError(
            f"openwu bench: expected the benchmarks in {folder}, found none: they are part of the source, not of the "
            f"installed package; run `pip install -e .` in a checkout of openwu {openwu.__version__}, then try again"
        )
    return folder
