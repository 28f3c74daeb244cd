"""One row of the benchmark: sides that do the same enter, timings and a verdict leave."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one side, in seconds, in the order in which they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """What other work on the machine has disturbed least: for differences of two sides, which it can turn round."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; both the median where there are fewer than two measurements."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Row:
    """What one benchmark found."""

    name: str
    """As in docs/performance.md: C1 to C8 on a CPU, G1 to G4 on a GPU."""
    title: str
    """What is done, and what it is compared with."""
    value: float
    """The number that is judged."""
    unit: str
    """Of `value`: "x" for a ratio, "%" for a share, "GB/s", ..."""
    goal: float
    at_least: bool = True
    """Whether `value` should be at least `goal`; otherwise at most."""
    sides: Mapping[str, Timing] = field(default_factory=dict)
    error: float = 0.0
    """Largest relative difference between what the sides return; the row is not measured where it is too large."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, dtypes, further numbers: plain JSON values. `floor`, if there, is drawn: the least seconds that the
    machine's peak speed or bandwidth allows."""

    @property
    def reached(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time all sides in turn, `repeats` times, so that other work on the machine meets them alike.

    Python's garbage is collected before, not in between: a call right after a collection finds its code and weights
    gone from the processor's caches and torch's threads asleep. Of less than a millisecond that is the larger part.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, repeats):
            for name, run in sides.items():
                began = time.perf_counter()
                run()
                if number >= 0:
                    found[name].append(time.perf_counter() - began)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}
