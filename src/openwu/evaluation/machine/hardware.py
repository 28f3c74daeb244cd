"""Describe the machine: processor, usable cores, memory, load, and the units that multiply matrices."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

UNITS = {"amx_bf16": "AMX (bfloat16)", "avx512_bf16": "AVX-512 (bfloat16)", "avx512": "AVX-512", "avx2": "AVX2"}
"""Capabilities of a processor as torch names them -> in words, those that multiply 16 bits first."""


def hardware(gpu: bool) -> dict[str, Any]:
    """Describe processor, usable cores, memory in bytes and current load; with `gpu` also the CUDA device."""
    values: dict[str, Any] = {
        "processor": _processor_name(),
        # A container may have fewer cores than the machine.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": None,
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    with suppress(AttributeError, OSError, ValueError):  # where the system does not say
        values["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        values["gpu"] = {"name": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return values


def units() -> list[str]:
    """Name the processor's units for matrix products that torch uses, the best first."""
    capabilities = torch.cpu.get_capabilities()
    return [words for name, words in UNITS.items() if capabilities.get(name)]


def described(machine: Mapping[str, Any]) -> str:
    """Return what `hardware` found, in words."""
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if machine["memory"] else ""
    gpu = f"{machine['gpu']['name']}; " if machine.get("gpu") else ""
    return f"{gpu}{machine['processor']}, {_cores(machine)}{memory}"


def short_name(machine: Mapping[str, Any]) -> str:
    """Return a machine's name for file names: `intel-xeon-2-cores`, `nvidia-h200`."""
    if machine.get("gpu"):
        name = str(machine["gpu"]["name"])
    else:
        plain = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", machine["processor"], flags=re.IGNORECASE)
        name = f"{plain} {_cores(machine)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cores(machine: Mapping[str, Any]) -> str:
    return f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"


def _processor_name() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown processor"
