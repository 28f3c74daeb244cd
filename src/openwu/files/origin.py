"""Where numbers and weights come from: version, commit, date, machine. Leaves: plain values for JSON."""

from __future__ import annotations

import datetime
import platform
import subprocess
from typing import Any

import torch

import openwu


def origin() -> dict[str, Any]:
    """Which code ran, when, on what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "openwu": openwu.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The commit of the working directory, None outside of a repository."""
    found = _git("rev-parse", "HEAD")
    return None if found is None else found.strip()


def uncommitted() -> bool:
    """Whether files that the repository knows differ from that commit, so that it does not say all about the code."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
