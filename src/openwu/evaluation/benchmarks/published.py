"""Scores that others published, as facts to read beside one's own; none was computed or verified here.

Their judges, prompts and cases differ from ours, so a difference to one of our numbers is no comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One system's row of a published table."""

    system: str
    judge: str
    """Judge and subset, as published."""
    scores: Mapping[str, float]


def _gedit(system: str, semantics: float, quality: float, overall: float) -> PublishedRow:
    return PublishedRow(system, "GPT-4.1, en", {"SC": semantics, "PQ": quality, "O": overall})


def _imgedit(system: str, overall: float) -> PublishedRow:
    return PublishedRow(system, "as published", {"overall": overall})


PUBLISHED: Mapping[str, tuple[PublishedRow, ...]] = {
    "gedit": (
        _gedit("Step1X-Edit v1.1", 7.66, 7.35, 6.97),
        _gedit("Qwen-Image-Edit", 8.00, 7.86, 7.56),
        _gedit("LongCat-Image-Edit", 8.18, 8.00, 7.64),
        _gedit("FLUX.2 dev", 7.84, 8.06, 7.41),
        _gedit("Nano Banana Pro", 8.10, 8.34, 7.74),
        _gedit("Seedream 4.5", 8.27, 8.17, 7.82),
    ),
    "imgedit": (
        _imgedit("HY-WU", 4.05),
        _imgedit("Qwen-Image-Edit-2511", 4.51),
        _imgedit("FLUX.2 dev", 4.35),
        _imgedit("LongCat-Image-Edit", 4.45),
    ),
}
"""Benchmark -> published rows, on the benchmark's own scale."""


def published_rows(benchmark: str) -> tuple[PublishedRow, ...]:
    """Return the published rows of a benchmark, "gedit (partial)" included; none for a benchmark without."""
    return PUBLISHED.get(benchmark.partition(" ")[0], ())
