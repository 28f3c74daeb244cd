"""Result files: what a run of the benchmark found enters, JSON and Markdown leave, and the JSON is read again.

The JSON holds every single timing, so that nothing that is shown later has to be measured again or believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from openwu.bench.growth import Growth
from openwu.bench.machine import described, short_name
from openwu.bench.row import Row, Timing
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import write_findings
from openwu.files.markdown import table
from openwu.files.origin import origin, uncommitted
from openwu.files.writing import write_text


@dataclass
class Result:
    """What one run found on one theme."""

    theme: str
    began: datetime
    """In UTC."""
    quick: bool
    """Small sizes and few repetitions: shows that it works, and is no evidence."""
    machine: dict[str, Any]
    """See `machine.hardware`."""
    versions: dict[str, str]
    origin: dict[str, Any] = field(default_factory=lambda: {**origin(), "uncommitted": uncommitted()})
    """Commit, version, threads; see `openwu.files.origin`."""
    rows: dict[str, Row] = field(default_factory=dict)
    growths: dict[str, Growth] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Row -> why it could not be measured."""
    file: Path | None = None
    """Where it is stored."""

    def write(self, folder: Path) -> None:
        """Write `[theme]_[hardware]_[date].json` and `.md`; called again, the same files, but never another run's."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.file is None:
            kind = "quick-" if self.quick else ""
            stem = f"{kind}{self.theme}_{short_name(self.machine)}_{self.began.date().isoformat()}"
            self.file = folder / f"{stem}.json"
            number = 1
            while self.file.exists():
                number += 1
                self.file = folder / f"{stem}_{number}.json"
        found = {
            "theme": self.theme,
            "began": self.began.isoformat(),
            "machine": self.machine,
            "versions": self.versions,
            "rows": [row_json(row) for row in self.rows.values()],
            "growths": [{"name": name, **growth.to_json()} for name, growth in self.growths.items()],
            "failed": self.failed,
        }
        write_findings(self.file, {"quick": self.quick}, {**self.origin, **found})
        write_text(self.file.with_suffix(".md"), self.page())

    @property
    def commit(self) -> str:
        """Which code ran, in words."""
        changed = " with changes that are not committed" if self.origin["uncommitted"] else ""
        return f"commit {str(self.origin['commit'])[:12]}{changed}" if self.origin["commit"] else "no known commit"

    def page(self) -> str:
        """The result as Markdown."""
        installed = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        text = f"# Benchmark: {self.theme}, {self.began.date().isoformat()}\n\n"
        if self.quick:
            text += "A quick run: small sizes, few repetitions. It shows that everything works and is no evidence.\n\n"
        load, ran = self.machine["load"], self.origin
        text += (
            f"{described(self.machine)}; {self.machine['system']}; {ran['threads']} threads, "
            f"load before the run {load}. openwu {ran['openwu']} at {self.commit}; {installed}.\n\n"
        )
        if self.rows:
            head = ("row", "what", "measured", "goal", "reached", "largest difference")
            text += table(head, [(row.name, row.title, *judged(row), f"{row.error:.1g}") for row in self.rows.values()])
            sides = ("row", "side", "median", "quartiles", "runs")
            text += table(sides, [line for row in self.rows.values() for line in _sides(row)])
        for name, growth in self.growths.items():
            text += f"## {name}: {growth.what}\n\n" + growth_table(growth)
        for row in self.rows.values():
            if row.details:
                text += f"Details of {row.name}:\n\n```json\n{json.dumps(dict(row.details), indent=1)}\n```\n\n"
        for name, reason in self.failed.items():
            text += f"{name} was not measured: {reason}\n\n"
        return text.rstrip() + "\n"


def read_result(file: Path) -> Result | None:
    """Read what `Result.write` wrote; None for JSON of another kind, which may lie in the same folder."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "theme" not in data:
            return None
        rows = [read_row(row) for row in data["rows"]]
        return Result(
            theme=data["theme"],
            began=datetime.fromisoformat(data["began"]),
            quick=data["settings"]["quick"],
            machine=data["machine"],
            versions=data["versions"],
            origin={key: data[key] for key in ("openwu", "commit", "uncommitted", "threads", "processor")},
            rows={row.name: row for row in rows},
            growths={growth["name"]: Growth.read(growth) for growth in data["growths"]},
            failed=data["failed"],
            file=file,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OpenwuError(f"{file}: expected a result file of openwu bench: {error!r}; move it elsewhere") from error


def row_json(row: Row) -> dict[str, Any]:
    sides = {name: list(timing.seconds) for name, timing in row.sides.items()}
    judged = {"value": row.value, "unit": row.unit, "goal": row.goal, "at_least": row.at_least, "reached": row.reached}
    return {
        "name": row.name,
        "title": row.title,
        **judged,
        "sides": sides,
        "error": row.error,
        "details": dict(row.details),
    }


def read_row(data: Mapping[str, Any]) -> Row:
    fields = {key: value for key, value in data.items() if key not in ("sides", "reached")}
    return Row(**fields, sides={name: Timing(tuple(seconds)) for name, seconds in data["sides"].items()})


def judged(row: Row) -> tuple[str, str, str]:
    """What was measured, the goal, and whether it is reached, in words."""
    goal = f"{'at least' if row.at_least else 'at most'} {number(row.goal)} {row.unit}"
    return f"{number(row.value)} {row.unit}", goal, "yes" if row.reached else "**no**"


def growth_table(growth: Growth) -> str:
    rows = [
        (
            number(point.x),
            seconds(point.measured.median),
            seconds(growth.factor * point.predicted),
            f"{point.measured.median / (growth.factor * point.predicted):.2f}",
        )
        for point in growth.points
    ]
    return table((growth.unit, "measured", "predicted", "measured / predicted"), rows)


def seconds(value: float) -> str:
    """A time with three digits, in a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-6)} µs"


def number(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{float(f'{value:.3g}'):,.12g}"


def _sides(row: Row) -> list[tuple[str, ...]]:
    return [
        (
            row.name,
            side,
            seconds(timing.median),
            " to ".join(seconds(value) for value in timing.quartiles),
            str(len(timing.seconds)),
        )
        for side, timing in row.sides.items()
    ]
