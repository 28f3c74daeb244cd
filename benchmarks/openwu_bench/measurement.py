"""Timings, benchmark rows and scaling curves: what a benchmark returns, and how its sides are timed in alternation."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_REHEARSED: ContextVar[bool] = ContextVar("rehearsed", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Run rows that need a GPU on the CPU at tiny sizes: a test of their code, and no evidence."""
    token = _REHEARSED.set(True)
    try:
        yield
    finally:
        _REHEARSED.reset(token)


def rehearsed() -> bool:
    """Whether this is a rehearsal."""
    return _REHEARSED.get()


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one side in seconds, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """The run least disturbed by other work: for differences of two sides, whose sign noise could flip."""
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; both the median where there are fewer than two measurements."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Row:
    """Result of one benchmark: a value judged against its goal, and the timings it comes from."""

    name: str
    """As in docs/performance.md: C1 to C16 on a CPU, G1 to G9 on a GPU."""
    title: str
    """What is measured, and what it is compared with."""
    value: float
    """The number that is judged."""
    unit: str
    """Of `value`: "x" for a ratio, "%" for a share, "GB/s", ..."""
    goal: float
    at_least: bool = True
    """Whether `value` should be at least `goal`; otherwise at most."""
    sides: Mapping[str, Timing] = field(default_factory=dict)
    error: float = 0.0
    """Largest relative difference between the outputs of the sides; too large a difference fails the row."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Sizes, dtypes and further numbers as plain JSON values. `floor`, if present, is drawn: the least seconds that
    the machine's peak speed or bandwidth allows."""

    @property
    def reached(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time all sides alternately, `repeats` times, so that other work on the machine disturbs them alike.

    Garbage is collected before, not in between: a call right after a collection finds its code and weights evicted from
    the processor's caches and torch's threads asleep, which dominates calls of less than a millisecond.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warmup, repeats):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


@dataclass(frozen=True)
class Point:
    """Measured and predicted cost at one size."""

    x: float
    """The size, in the curve's unit."""
    measured: Timing
    predicted: float
    """Cost predicted by the cost model, in any unit that is the same along the curve."""


@dataclass(frozen=True)
class Curve:
    """Measured cost against size, with the prediction of a cost model (operations, bytes, pixels).

    Only the shape of the prediction counts: one factor, fitted to all points, turns it into seconds.
    """

    what: str
    """What is measured, and what its cost model counts."""
    unit: str
    """Of x: "tokens", "megapixels", "requests", ..."""
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        sizes = [point.x for point in self.points]
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise ValueError(f"points: expected at least two sizes, from small to large, got {sizes}")
        for point in self.points:
            numbers = (point.x, point.predicted, *point.measured.seconds)
            if not point.measured.seconds or not all(math.isfinite(number) and number > 0 for number in numbers):
                raise ValueError(f"points: expected size, seconds and prediction above 0, got {point}")

    @property
    def factor(self) -> float:
        """Seconds per unit of the prediction: the geometric mean over the points, so that each counts alike."""
        return math.exp(statistics.fmean(math.log(point.measured.median / point.predicted) for point in self.points))

    @property
    def max_deviation(self) -> float:
        """Largest ratio between measured and predicted seconds, either way: 1 where the cost model is exact."""
        logs = [math.log(point.measured.median / (self.factor * point.predicted)) for point in self.points]
        return math.exp(max(abs(log) for log in logs))

    @property
    def exponent(self) -> float:
        """Slope of the measured curve on logarithmic axes: cost grows as size to this power."""
        logs = [(math.log(point.x), math.log(point.measured.median)) for point in self.points]
        slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
        return slope

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        points = [[point.x, list(point.measured.seconds), point.predicted] for point in self.points]
        return {"what": self.what, "unit": self.unit, "points": points}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Build a curve from `what`, `unit` and `points` of (x, list of seconds, predicted cost).

        Raises ValueError where one of them is missing or has another form.
        """
        try:
            points = [Point(float(x), Timing(tuple(map(float, each))), float(cost)) for x, each, cost in data["points"]]
            return cls(str(data["what"]), str(data["unit"]), tuple(points))
        except (KeyError, TypeError) as error:
            raise ValueError(f"curve: expected what, unit and points (x, seconds, predicted), got {data!r}") from error
