"""Whether a kernel of ours stands in for plain torch: two ways to compute the same go in, a choice comes out.

A kernel runs on a GPU only, where Triton is installed, and only after a first use on that very device: it must return
what plain torch returns, within its tolerance, and take less time. That is found once per process for about a shape, on
numbers drawn for it, and logged (`logging`, level DEBUG). A kernel that fails or differs is not used again in this
process, with one warning; plain torch computes instead. `OPENWU_KERNELS=0` switches all of them off, and so does the
scope `plain_torch()`.

No kernel is needed for anything: nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from openwu.kernels.attention import bucket, seconds_of

VARIABLE = "OPENWU_KERNELS"
DEVICES = ("cuda",)
"""Types of devices that have kernels."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMEMBERED = 256
"""Shapes whose choice is kept; what was not used for longest is tried again."""

_log = logging.getLogger(__name__)
_plain: ContextVar[bool] = ContextVar("openwu_plain_torch", default=False)

Result = TypeVar("Result")


@contextmanager
def plain_torch() -> Iterator[None]:
    """A scope, of this thread, in which no kernel is used."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def plainly(run: Callable[[], Result]) -> Callable[[], Result]:
    """The same without kernels: a side to compare with."""

    def plain() -> Result:
        with plain_torch():
            return run()

    return plain


@functools.cache
def _triton() -> str | None:
    """Triton's version; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def available(device: torch.device) -> str | None:
    """With what kernels may run there, for keys of what they computed; None where they may not."""
    if device.type not in DEVICES or _plain.get() or os.environ.get(VARIABLE) == "0" or _triton() is None:
        return None
    return f"triton {_triton()}"


def usable(*tensors: Tensor) -> bool:
    """Whether kernels may take these: on one GPU, of a dtype that they know, neither traced nor captured."""
    first = tensors[0]
    if first.device.type not in DEVICES or torch.compiler.is_compiling():
        return False
    return (
        available(first.device) is not None
        # Not a stand-in without memory of its own, such as those of tracing.
        and all(type(each) in (Tensor, nn.Parameter) and each.device == first.device for each in tensors)
        and first.dtype in DTYPES
        and not (first.is_cuda and torch.cuda.is_current_stream_capturing())
    )


@dataclass(frozen=True)
class Trial:
    """Both ways, on inputs of their own that look like those of a call; each returns all that may differ."""

    kernel: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    tolerance: float
    """Largest difference of two numbers, as a share of the reference's number plus its tensor's root mean square."""


class Choices:
    """What was found at first uses. Threads may share one: they wait while one of them tries."""

    def __init__(
        self,
        timer: Callable[[Callable[[], object], torch.device], float] = seconds_of,
        remembered: int = REMEMBERED,
    ) -> None:
        self.timer = timer
        self.remembered = remembered
        self.chosen: OrderedDict[tuple[object, ...], bool] = OrderedDict()
        self.failed: set[str] = set()
        """Kernels that are not used again in this process."""
        self._lock = threading.RLock()

    def run(
        self,
        name: str,
        key: tuple[object, ...],
        device: torch.device,
        trial: Callable[[], Trial],
        kernel: Callable[[], Result],
        reference: Callable[[], Result],
    ) -> Result:
        """The kernel's result where it was chosen for this key, else the reference's.

        `kernel` must change nothing before everything that can be refused has been: what fails is computed again.
        """
        if not self._takes(name, key, device, trial):
            return reference()
        try:
            return kernel()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(name, f"{type(error).__name__}: {error}")
            return reference()

    def found(self) -> dict[str, str]:
        """For every kernel that was tried, for how many shapes it is used."""
        with self._lock:
            names = [str(key[0]) for key in self.chosen]
            taken = [str(key[0]) for key, use in self.chosen.items() if use]
            counts = {name: f"{taken.count(name)} of {names.count(name)} shapes" for name in sorted(set(names))}
            return counts | dict.fromkeys(sorted(self.failed), "failed")

    def _takes(self, name: str, key: tuple[object, ...], device: torch.device, trial: Callable[[], Trial]) -> bool:
        key = (name, *key, device)
        with self._lock:
            if name in self.failed:
                return False
            if key not in self.chosen:
                try:
                    self.chosen[key] = self._tried(name, key, device, trial)
                except torch.OutOfMemoryError:
                    # Not tried again at every call: that would empty torch's cache of memory each time.
                    _log.debug("%s %s: no memory to try the kernel: plain torch", name, key)
                    self.chosen[key] = False
                except Exception as error:
                    self._give_up(name, f"{type(error).__name__}: {error}")
                    return False
                while len(self.chosen) > self.remembered:
                    self.chosen.popitem(last=False)
            else:
                self.chosen.move_to_end(key)
            return self.chosen.get(key, False)

    def _tried(self, name: str, key: tuple[object, ...], device: torch.device, trial: Callable[[], Trial]) -> bool:
        # Gradients may be part of what is compared, whatever the scope of the call.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            ways = trial()
            error = difference(ways.kernel(), ways.reference())
            if not error <= ways.tolerance:
                raise ArithmeticError(f"differs from plain torch by {error:.2g}, more than {ways.tolerance:.2g}")
            ours, plain = (self.timer(run, device) for run in (ways.kernel, ways.reference))
        found = "kernel" if ours < plain else "plain torch"
        _log.debug("%s %s: kernel %.3g s, plain torch %.3g s, error %.2g: %s", name, key, ours, plain, error, found)
        return ours < plain

    def _give_up(self, name: str, why: str) -> None:
        with self._lock:
            if name in self.failed:
                return
            self.failed.add(name)
        warnings.warn(
            f"kernel {name}: {why}; plain torch computes it from now on. {VARIABLE}=0 switches kernels off",
            RuntimeWarning,
            stacklevel=2,
        )


def difference(came: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two numbers, relative to the expected one plus its tensor's root mean square."""
    worst = 0.0
    for one, other in zip(came, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        wide = other.detach().float()
        allowed = wide.abs() + wide.square().mean().sqrt()
        error = (one.detach().float() - wide).abs() / allowed.clamp_(min=torch.finfo(torch.float32).tiny)
        # Not `max(...)` alone: it passes over what is not a number.
        largest = float(error.max())
        worst = max(worst, largest if largest == largest else float("inf"))
    return worst


CHOICES = Choices()

__all__ = [
    "CHOICES",
    "DEVICES",
    "VARIABLE",
    "Choices",
    "Trial",
    "available",
    "bucket",
    "difference",
    "plain_torch",
    "plainly",
    "usable",
]
