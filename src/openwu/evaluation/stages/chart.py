"""Draw a report's systems with their intervals as an SVG picture."""

from __future__ import annotations

import html
import math

from openwu.evaluation.stages.report import Report, Row

WIDTH, LABEL, LINE, MARGIN = 760, 260, 24, 30
"""Pixels: of the picture, of a name, of a row's height, and around."""
MOST = 40
"""Rows that are drawn."""


def chart(report: Report) -> str:
    """Return an SVG of the headline measure: a dot and its 95% interval per system and subset."""
    rows = [row for row in report.rows if not math.isnan(row.overall[report.headline].value)][:MOST]
    edges = [edge for row in rows for edge in _span(row, report.headline)]
    low, high = (min(edges), max(edges)) if edges else (0.0, 1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    height = 2 * MARGIN + LINE * max(1, len(rows))

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - MARGIN) * (value - low) / (high - low)

    title = f"{report.headline}, 95% intervals" + (f" ({report.scope})" if report.scope else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="currentColor" stroke="currentColor">',
        f'<text x="4" y="16" stroke="none">{html.escape(title)}</text>',
    ]
    for i, row in enumerate(rows):
        y, mean = MARGIN + LINE * (i + 0.5), row.overall[report.headline]
        first, last = _span(row, report.headline)
        name = row.system if row.subset == "all" else f"{row.system}, {row.subset}"
        parts += [
            f'<text x="4" y="{y + 4:.1f}" stroke="none">{html.escape(name[:40])}</text>',
            f'<line x1="{x(first):.1f}" y1="{y:.1f}" x2="{x(last):.1f}" y2="{y:.1f}" stroke-width="2"/>',
            f'<circle cx="{x(mean.value):.1f}" cy="{y:.1f}" r="4"/>',
        ]
    y = height - MARGIN + 14
    for value in (low, (low + high) / 2, high):
        parts.append(f'<text x="{x(value):.1f}" y="{y}" text-anchor="middle" stroke="none">{value:.3g}</text>')
    return "".join(parts) + "</svg>\n"


def _span(row: Row, metric: str) -> tuple[float, float]:
    """The interval, or the mean alone where there is none."""
    mean = row.overall[metric]
    edges = (mean.interval.low, mean.interval.high)
    return edges if all(map(math.isfinite, edges)) else (mean.value, mean.value)
