"""How a cost grows: measured seconds against sizes enter, a curve and how well a predicted law fits it leave.

A prediction is relative (operations, bytes, pixels): only its shape counts. One factor, fitted to all points, turns it
into seconds; what is left over is how far the measurement departs from the law.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openwu.bench.row import Timing


@dataclass(frozen=True)
class Point:
    """One size."""

    x: float
    """The size, in the curve's unit."""
    measured: Timing
    predicted: float
    """Cost by the law, in any unit that is the same along the curve."""


@dataclass(frozen=True)
class Growth:
    """One curve of cost against size."""

    what: str
    """What is done, and by which law its cost is predicted to grow."""
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
        """Seconds for one unit of the prediction: the geometric mean over the points, so that each counts alike."""
        logs = [math.log(point.measured.median / point.predicted) for point in self.points]
        return math.exp(statistics.fmean(logs))

    @property
    def departure(self) -> float:
        """Largest ratio between measured and predicted seconds, either way: 1 where the law holds exactly."""
        logs = [math.log(point.measured.median / (self.factor * point.predicted)) for point in self.points]
        return math.exp(max(abs(log) for log in logs))

    @property
    def exponent(self) -> float:
        """Slope of the measured curve on logarithmic axes: cost grows as size to this power."""
        logs = [(math.log(point.x), math.log(point.measured.median)) for point in self.points]
        slope, _ = statistics.linear_regression(*zip(*logs, strict=True))
        return slope

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        points = [[point.x, list(point.measured.seconds), point.predicted] for point in self.points]
        return {"what": self.what, "unit": self.unit, "points": points}

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Growth:
        """Plain data -> a curve: `what`, `unit`, `points` of (x, seconds or a list of them, predicted cost)."""
        try:
            points = [
                Point(
                    float(x),
                    Timing(tuple(map(float, [seconds] if isinstance(seconds, int | float) else seconds))),
                    float(cost),
                )
                for x, seconds, cost in data["points"]
            ]
            return cls(str(data["what"]), str(data["unit"]), tuple(points))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"growth: expected what, unit and points of (x, seconds, predicted), got {data!r}"
            ) from error
