"""Plan device memory before anything is loaded: bytes of tensors, free bytes of a device, and what does not fit.

Bytes are decimal in messages: 1 GB = 10^9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from openwu.errors import OpenwuError

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes per element of the dtypes in safetensors headers; those that are missing here (float8) have one."""


def tensor_bytes(code: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a tensor from its safetensors header.

    `code`: the header's dtype. `dtype`: what floats are converted to on loading; None keeps the stored dtype.
    """
    is_float = code.startswith(("F", "BF"))
    width = dtype.itemsize if is_float and dtype is not None else DTYPE_BYTES.get(code, 1)
    return math.prod(shape) * width


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device or of main memory; None where the system does not report them."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def gigabytes(size: int) -> str:
    """Format bytes for a message."""
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a job needs on one device: phases that follow each other, and a rough estimate for the last one."""

    phases: Mapping[str, Mapping[str, int]]
    """Phase -> purpose -> bytes, counted exactly. A phase frees what the one before it held."""
    activations: Mapping[str, int] = field(default_factory=dict)
    """Purpose -> bytes that the last phase adds while it computes: an estimate."""

    @property
    def certain(self) -> int:
        """The largest phase, without the estimate."""
        return max(map(_sum, self.phases.values()))

    @property
    def total(self) -> int:
        """The largest phase, with the estimate on top of the last one."""
        *earlier, last = map(_sum, self.phases.values())
        return max([*earlier, last + _sum(self.activations)])

    def report(self, device: torch.device, free: int | None) -> str:
        """Describe the plan, one line per phase, and what the device has."""
        parts = {**self.phases, "activations, estimated": self.activations}
        lines = [f"  {name}: {gigabytes(_sum(part))} ({_listed(part.items())})" for name, part in parts.items() if part]
        has = "unknown" if free is None else f"{gigabytes(free)} free"
        return "\n".join([f"memory on {device}: about {gigabytes(self.total)} of {has}", *lines]) + "\n"

    def check(self, device: torch.device, free: int | None, advice: str, subject: str = "memory") -> bool:
        """Raise OpenwuError if the certain part exceeds the free bytes; return whether the whole plan fits.

        `free` None (unknown) counts as enough. `advice`: what the user can do, for the message; `subject`: its start.
        """
        if free is None or self.certain <= free:
            return free is None or self.total <= free
        largest = max(self.phases.values(), key=_sum)
        raise OpenwuError(
            f"{subject}: expected {gigabytes(self.certain)} free on {device} ({_listed(largest.items())}), "
            f"got {gigabytes(free)}; {advice}"
        )


def _sum(part: Mapping[str, int]) -> int:
    return sum(part.values())


def _listed(part: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in part)
