"""The machine and the software that a benchmark ran on. Leaves: plain values for JSON, and a short name for files."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "peft", "transformers", "triton")
"""Whose versions can change a result."""


def hardware(gpu: bool) -> dict[str, Any]:
    """Processor, cores, memory in bytes, how busy the machine was just before; with `gpu` the first CUDA device."""
    found: dict[str, Any] = {
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    """Of Python and of the installed packages among PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def described(machine: dict[str, Any]) -> str:
    """What `hardware` found, in words."""
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if machine["memory"] else ""
    gpu = f"{machine['gpu']['name']}; " if machine.get("gpu") else ""
    return f"{gpu}{machine['processor']}, {cores}{memory}"


def short_name(machine: dict[str, Any]) -> str:
    """The same for a file's name: `intel-xeon-2-cores`, `nvidia-h200`."""
    if machine.get("gpu"):
        return _slug(machine["gpu"]["name"])
    plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", machine["processor"], flags=re.IGNORECASE)
    return _slug(f"{plain} {machine['cores']} core{'' if machine['cores'] == 1 else 's'}")


def processor_name() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown processor"


def usable_cores() -> int:
    """Cores that this process may use: a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Of the whole machine; None where the system does not say."""
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
