"""Draw benchmark rows and scaling curves as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from openwu_bench.measurement import Curve, Row, Timing
from openwu_bench.result import seconds, verdict

FLOOR = "floor"
"""Key in a row's details: the least seconds that any implementation needs on that machine."""
REACHED, MISSED, LAW = "tab:green", "tab:red", "0.5"
PANELS = 3
"""Panels per line."""
TICKS = 4
"""Most ticks of an axis."""
TICK_DIGITS = ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
"""Leading digits of ticks, from many to few."""


def draw_rows(rows: Mapping[str, Row], path: Path) -> None:
    """Draw every row's value as a share of its goal and, below, a panel with the times of its sides for each."""
    timed = {name: row for name, row in rows.items() if row.sides}
    sides = [len(row.sides) for row in timed.values()]
    lines = [max(2.3, 0.2 * max(sides[at : at + PANELS]) + 0.8) for at in range(0, len(sides), PANELS)]
    height = 0.35 * len(rows) + 1.2
    figure = Figure(figsize=(12, height + sum(lines)), layout="constrained")
    if timed:
        top, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, sum(lines)])[:, 0]
        panels = list(below.subplots(len(lines), PANELS, squeeze=False, height_ratios=lines).flat)
        for panel, row in zip(panels, timed.values(), strict=False):
            _draw_sides(panel, row)
        for panel in panels[len(timed) :]:
            panel.set_axis_off()
        _draw_goals(top.subplots(), rows)
    else:
        _draw_goals(figure.subplots(), rows)
    figure.savefig(path, dpi=100)


def share(row: Row) -> float:
    """Return how many times better than its goal a row is; below 1 it misses it."""
    better, worse = (row.value, row.goal) if row.at_least else (row.goal, row.value)
    # The difference of two timings may be 0 or, within noise, negative.
    return max(better, 1e-3) / max(worse, 1e-3)


def _draw_goals(panel: Axes, rows: Mapping[str, Row]) -> None:
    for y, row in enumerate(list(rows.values())[::-1]):
        panel.plot([1, share(row)], [y, y], color=REACHED if row.reached else MISSED, linewidth=3)
        panel.plot(share(row), y, "o", color=REACHED if row.reached else MISSED)
        value, goal, _ = verdict(row)
        panel.annotate(f" {value} ({goal})", (share(row), y), va="bottom", fontsize=8)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xscale("log")
    _readable(panel.xaxis, lambda value: f"{value:g}")
    panel.set_xlabel("times better than the goal (line: the goal)")
    panel.set_yticks(range(len(rows)), list(rows)[::-1])
    panel.margins(x=0.2, y=0.15)
    panel.grid(axis="x", alpha=0.3)


def _draw_sides(panel: Axes, row: Row) -> None:
    for y, timing in enumerate(list(row.sides.values())[::-1]):
        panel.errorbar(timing.median, y, xerr=_bars([timing]), fmt="o", capsize=3, color="tab:blue")
    floor = row.details.get(FLOOR)
    if isinstance(floor, int | float) and floor > 0:
        panel.axvline(floor, color="black", linestyle="--", linewidth=1, label="floor")
        panel.legend(fontsize=7)
    panel.set_xscale("log")
    _readable(panel.xaxis, seconds)
    panel.set_yticks(range(len(row.sides)), list(row.sides)[::-1], fontsize=8)
    panel.set_title(f"{row.name}: median and quartiles", fontsize=9)
    panel.margins(x=0.15, y=0.25)
    panel.grid(axis="x", alpha=0.3)


def draw_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw a panel per curve, both axes logarithmic: measured medians with quartiles, and the prediction as a line."""
    lines = math.ceil(len(curves) / PANELS)
    figure = Figure(figsize=(12, 3.4 * lines), layout="constrained")
    panels = list(figure.subplots(lines, PANELS, squeeze=False).flat)
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        sizes = [point.x for point in curve.points]
        timings = [point.measured for point in curve.points]
        panel.plot(sizes, [curve.factor * point.predicted for point in curve.points], color=LAW, label="law")
        medians = [timing.median for timing in timings]
        panel.errorbar(sizes, medians, yerr=_bars(timings), fmt="o", capsize=3, color="tab:blue", label="measured")
        panel.set_xscale("log")
        _readable(panel.xaxis, lambda value: f"{value:g}")
        panel.set_yscale("log")
        _readable(panel.yaxis, seconds)
        panel.set_xlabel(curve.unit)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=100)


def _bars(timings: Sequence[Timing]) -> list[list[float]]:
    """Lengths of error bars from the median down to the first and up to the third quartile."""
    return [
        [timing.median - timing.quartiles[0] for timing in timings],
        [timing.quartiles[1] - timing.median for timing in timings],
    ]


def _readable(axis: Axis, write: Callable[[float], str]) -> None:
    """Set few, formatted ticks on a logarithmic axis; matplotlib's own overlap where a panel is small."""
    axis.set_major_locator(FixedLocator(round_numbers(*axis.get_data_interval())))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def round_numbers(first: float, last: float) -> list[float]:
    """Return at most TICKS round numbers between two positive numbers, with the same digits in each decade."""
    decades = range(math.floor(math.log10(first)), math.floor(math.log10(last)) + 1)
    for leading in TICK_DIGITS:
        found = [number for decade in decades for digits in leading if first <= (number := digits * 10**decade) <= last]
        if len(found) <= TICKS:
            return found or [first, last]
    return found[:: -(-len(found) // TICKS)]
