"""Provenance of results and weights: version, commit, date and machine, as plain values for JSON."""

from __future__ import annotations

import datetime
import platform
import subprocess
from typing import Any

import torch

from openwu.version import __version__


def origin() -> dict[str, Any]:
    """Return version, commit, date, torch version, processor and threads."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "openwu": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Return the commit of the working directory; None outside a repository."""
    output = _git("rev-parse", "HEAD")
    return None if output is None else output.strip()


def uncommitted() -> bool:
    """Whether tracked files differ from that commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
