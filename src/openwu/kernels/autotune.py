"""Decide at first use whether a Triton kernel of ours replaces plain torch.

A kernel runs on a GPU only, where Triton is installed, and only after a trial on that very device: it must return what
plain torch returns, within its tolerance, and take less time. The trial runs once per process and shape bucket, on
random inputs, and is logged (`logging`, level DEBUG). A kernel that fails or differs is not used again in this process,
with one warning; plain torch computes instead. `OPENWU_KERNELS=0` disables all kernels, and so does the scope
`plain_torch()`.

No kernel is required for anything: nothing here imports Triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

VARIABLE = "OPENWU_KERNELS"
DEVICES = ("cuda",)
"""Device types that have kernels."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHED_SHAPES = 256
"""Shape buckets whose choice is kept; the least recently used is tried again."""

_log = logging.getLogger(__name__)
_plain: ContextVar[bool] = ContextVar("openwu_plain_torch", default=False)

Result = TypeVar("Result")


def bucket(count: int) -> int:
    """Return the next power of two: sizes in one bucket share a choice."""
    return 1 << max(0, count - 1).bit_length()


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has finished; other devices need no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time a run on a device: the fastest of three, after one warm-up."""
    seconds = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@contextmanager
def plain_torch() -> Iterator[None]:
    """Disable all kernels in this scope and thread."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def without_kernels(run: Callable[[], Result]) -> Callable[[], Result]:
    """Return a function that calls `run` inside `plain_torch()`."""

    def plain() -> Result:
        with plain_torch():
            return run()

    return plain


@functools.cache
def _triton() -> str | None:
    """Return Triton's version; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def available(device: torch.device) -> str | None:
    """Return what kernels on this device are compiled with, for cache keys; None where they may not run."""
    if device.type not in DEVICES or _plain.get() or os.environ.get(VARIABLE) == "0" or _triton() is None:
        return None
    return f"triton {_triton()}"


def usable(*tensors: Tensor) -> bool:
    """Whether kernels accept these tensors: on one GPU, of a known dtype, neither traced nor captured in a graph."""
    first = tensors[0]
    if first.device.type not in DEVICES or torch.compiler.is_compiling():
        return False
    return (
        available(first.device) is not None
        # No tensor subclass without memory, such as the fake tensors of tracing.
        and all(type(each) in (Tensor, nn.Parameter) and each.device == first.device for each in tensors)
        and first.dtype in DTYPES
        and not (first.is_cuda and torch.cuda.is_current_stream_capturing())
    )


@dataclass(frozen=True)
class Trial:
    """Kernel and reference on random inputs like those of a call; each returns all outputs to compare."""

    kernel: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    tolerance: float
    """Largest `relative_error` allowed."""


class Choices:
    """Cache of which kernels are used, by name, shape bucket and device; thread-safe, trials run one at a time."""

    def __init__(
        self,
        timer: Callable[[Callable[[], object], torch.device], float] = seconds_of,
        cached_shapes: int = CACHED_SHAPES,
    ) -> None:
        self.timer = timer
        self.cached_shapes = cached_shapes
        self.chosen: OrderedDict[tuple[object, ...], bool] = OrderedDict()
        self.failed: set[str] = set()
        """Names of kernels that are not used again in this process."""
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
        """Return the kernel's result where it was chosen for this key, else the reference's.

        `kernel` must raise before it modifies any input: the reference then computes the result.
        """
        if not self._uses_kernel(name, key, device, trial):
            return reference()
        try:
            return kernel()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._disable(name, f"{type(error).__name__}: {error}")
            return reference()

    def found(self) -> dict[str, str]:
        """Return kernel name -> for how many of the tried shapes it is used, or "failed"."""
        with self._lock:
            names = [str(key[0]) for key in self.chosen]
            used = [str(key[0]) for key, use in self.chosen.items() if use]
            counts = {name: f"{used.count(name)} of {names.count(name)} shapes" for name in sorted(set(names))}
            return counts | dict.fromkeys(sorted(self.failed), "failed")

    def _uses_kernel(
        self, name: str, key: tuple[object, ...], device: torch.device, trial: Callable[[], Trial]
    ) -> bool:
        key = (name, *key, device)
        with self._lock:
            if name in self.failed:
                return False
            if key not in self.chosen:
                try:
                    self.chosen[key] = self._try(name, key, device, trial)
                except torch.OutOfMemoryError:
                    # Not tried again at every call: that would empty torch's caching allocator each time.
                    _log.debug("%s %s: no memory to try the kernel: plain torch", name, key)
                    self.chosen[key] = False
                except Exception as error:
                    self._disable(name, f"{type(error).__name__}: {error}")
                    return False
                while len(self.chosen) > self.cached_shapes:
                    self.chosen.popitem(last=False)
            else:
                self.chosen.move_to_end(key)
            return self.chosen.get(key, False)

    def _try(self, name: str, key: tuple[object, ...], device: torch.device, trial: Callable[[], Trial]) -> bool:
        # Gradients may be compared too, whatever the grad mode of the call.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            pair = trial()
            error = relative_error(pair.kernel(), pair.reference())
            if not error <= pair.tolerance:
                raise ArithmeticError(f"differs from plain torch by {error:.2g}, more than {pair.tolerance:.2g}")
            ours, plain = (self.timer(run, device) for run in (pair.kernel, pair.reference))
        choice = "kernel" if ours < plain else "plain torch"
        _log.debug("%s %s: kernel %.3g s, plain torch %.3g s, error %.2g: %s", name, key, ours, plain, error, choice)
        return ours < plain

    def _disable(self, name: str, why: str) -> None:
        with self._lock:
            if name in self.failed:
                return
            self.failed.add(name)
        warnings.warn(
            f"kernel {name}: {why}; plain torch computes it from now on. {VARIABLE}=0 disables kernels",
            RuntimeWarning,
            stacklevel=2,
        )


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of two elements, relative to the expected one plus its tensor's RMS.

    Infinite where shapes or dtypes differ, or where a difference is no number.
    """
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        wide = other.detach().float()
        allowed = wide.abs() + wide.square().mean().sqrt()
        error = (one.detach().float() - wide).abs() / allowed.clamp_(min=torch.finfo(torch.float32).tiny)
        # Not `max(...)` alone: it ignores NaN.
        largest = float(error.max())
        worst = max(worst, largest if largest == largest else float("inf"))
    return worst


CHOICES = Choices()
