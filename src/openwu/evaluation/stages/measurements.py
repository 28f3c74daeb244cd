"""The one record of every evaluation: case, system, measure, value, status, seed, with where the numbers come from.

Judged runs, the edit suite, wording, strength and the lab all become `Results`, and one report tabulates them.
`measurements.jsonl` holds them: a header, then one measurement a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.evaluation.stages.record import SCORED, StoredCase
from openwu.files.writing import write_text

FORMAT = "openwu-measurements"
VERSION = 1
"""Of the file's layout."""
Scale = tuple[float, float]
"""The worst and the best possible value of a measure; infinite where there is none."""
UNBOUNDED: Scale = (-math.inf, math.inf)
DECIBELS: Scale = (0.0, 100.0)
"""PSNR of 8-bit pictures, as `metrics.psnr` clamps it."""


@dataclass(frozen=True)
class Measurement:
    """One value of one measure of what a system made of a case, or why there is none."""

    case: str
    """Key of the case."""
    system: str
    measure: str
    value: float | None
    """None where `status` is not SCORED."""
    status: str = SCORED
    seed: int = 0
    """Of the training or the draw, or the repeat of a judge's question; values of several are averaged."""


@dataclass(frozen=True)
class Results:
    """Measurements with everything that a report about them needs."""

    name: str
    """Of the benchmark or experiment; the report's title."""
    judge: str
    """Who judged, as RUBRIC/MODEL; empty for plain measurements."""
    scales: Mapping[str, Scale]
    """Measure -> its worst and best value."""
    headline: str
    """The measure by which systems are compared."""
    cases: Sequence[StoredCase]
    measurements: Sequence[Measurement]
    whole: int | None = None
    """How many cases the complete benchmark has; None where that is unknown, or all are here."""
    notes: Sequence[str] = ()
    """What a reader has to know, such as that a quick setting was used."""
    clusters: str = "photographs"
    """What whole clusters are, whose drawing gives the intervals: photographs, sub-tasks, sentences."""
    macro: bool = True
    """Whether an overall mean is the mean of the categories' means."""
    reference: str | None = None
    """The system that all others are compared with; None: every pair is compared."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Version, commit, date, hardware and settings."""

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(each.system for each in self.measurements))


def gather(
    rows: Iterable[tuple[StoredCase, str, Mapping[str, float], int]],
) -> tuple[list[StoredCase], list[Measurement]]:
    """Turn rows (case, system, measure -> value, seed) into cases, each once, and measurements.

    A value that is NaN or infinite has none: its status is "undefined".
    """
    cases: dict[str, StoredCase] = {}
    found = []
    for case, system, values, seed in rows:
        cases.setdefault(case.key, case)
        for measure, value in values.items():
            finite = math.isfinite(value)
            status = SCORED if finite else "undefined"
            found.append(Measurement(case.key, system, measure, value if finite else None, status, seed))
    return list(cases.values()), found


def plain_case(
    key: str, task: str, *, cluster: str, language: str = "", tags: tuple[str, ...] = (), instruction: str = ""
) -> StoredCase:
    """Return a case of which no picture is kept."""
    return StoredCase(key, task, instruction, language, cluster, tags, ())


def write_measurements(path: Path, results: Results) -> None:
    """Write a header and one measurement a line with its case's task, cluster, language and tags, atomically."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": results.name,
        "judge": results.judge,
        "scales": {name: [_finite(edge) for edge in edges] for name, edges in results.scales.items()},
        "headline": results.headline,
        "whole": results.whole,
        "notes": list(results.notes),
        "clusters": results.clusters,
        "macro": results.macro,
        "reference": results.reference,
        "provenance": dict(results.provenance),
    }
    cases = {case.key: case for case in results.cases}
    lines = [header, *(_line(each, cases[each.case]) for each in results.measurements)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines))


def _finite(edge: float) -> float | None:
    return edge if math.isfinite(edge) else None


def _line(each: Measurement, case: StoredCase) -> dict[str, object]:
    return {
        "case": each.case,
        "system": each.system,
        "measure": each.measure,
        "value": each.value,
        "status": each.status,
        "seed": each.seed,
        "task": case.task,
        "cluster": case.cluster,
        "language": case.language,
        "tags": list(case.tags),
    }


def read_measurements(path: Path) -> Results:
    """Read what `write_measurements` wrote. Raises OpenwuError with the number of a broken line."""
    number = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        number = 1
        header = json.loads(lines[0])
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ValueError(f"expected {FORMAT} {VERSION}, got {header['format']} {header['version']}")
        scales = {
            name: (-math.inf if low is None else float(low), math.inf if high is None else float(high))
            for name, (low, high) in header["scales"].items()
        }
        cases: dict[str, StoredCase] = {}
        found = []
        for line in lines[1:]:
            number += 1
            each = json.loads(line)
            tags = tuple(each["tags"])
            case = plain_case(each["case"], each["task"], cluster=each["cluster"], language=each["language"], tags=tags)
            if cases.setdefault(case.key, case) != case:
                raise ValueError(f"case {case.key!r} has another task, cluster, language or tags than before")
            found.append(_checked(each, scales))
        return Results(
            header["name"],
            header["judge"],
            scales,
            header["headline"],
            list(cases.values()),
            found,
            header["whole"],
            tuple(header["notes"]),
            header["clusters"],
            header["macro"],
            header["reference"],
            header["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise OpenwuError(f"{path}:{number}: expected a line of {FORMAT} {VERSION} ({error!r})") from error


def _checked(line: Mapping[str, Any], scales: Mapping[str, Scale]) -> Measurement:
    """Read one measurement; a value without the status SCORED, or the other way round, is none."""
    value, status, measure = line["value"], line["status"], line["measure"]
    if measure not in scales:
        raise ValueError(f"expected a measure of {list(scales)}, got {measure!r}")
    if (value is not None) != (status == SCORED):
        raise ValueError(f"expected a value exactly where the status is {SCORED!r}, got {value!r} and {status!r}")
    low, high = scales[measure]
    if value is not None and not low <= float(value) <= high:
        raise ValueError(f"{measure}: expected a value from {low} to {high}, got {value}")
    return Measurement(
        line["case"], line["system"], measure, None if value is None else float(value), status, int(line["seed"])
    )
