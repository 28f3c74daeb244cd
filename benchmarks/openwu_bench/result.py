"""Result files of `openwu bench`: JSON with every timing, machine and versions, and the same as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import write_findings
from openwu.evaluation.machine.hardware import described, short_name
from openwu.files.markdown import table
from openwu.files.origin import origin, uncommitted
from openwu.files.writing import write_text
from openwu_bench.measurement import Curve, Row, Timing

PACKAGES = ("torch", "numpy", "safetensors", "pillow", "peft", "transformers", "triton")
"""Packages whose versions can change a result."""


@dataclass
class Result:
    """Rows and curves of one theme that one run measured."""

    theme: str
    began: datetime
    """In UTC."""
    quick: bool
    """Small sizes and few repetitions: shows that everything runs, and is no evidence."""
    machine: dict[str, Any]
    """See `hardware`."""
    versions: dict[str, str]
    origin: dict[str, Any] = field(default_factory=lambda: {**origin(), "uncommitted": uncommitted()})
    """Commit, version, threads; see `openwu.files.origin`."""
    rows: dict[str, Row] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Row or curve -> why it could not be measured."""
    file: Path | None = None
    """Where it is stored."""

    def write(self, folder: Path) -> None:
        """Write `[theme]_[hardware]_[date].json` and `.md`; a second call rewrites them, but never another run's."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.file is None:
            kind = "quick-" if self.quick else ""
            stem = f"{kind}{self.theme}_{short_name(self.machine)}_{self.began.date().isoformat()}"
            self.file = folder / f"{stem}.json"
            number = 1
            while self.file.exists():
                number += 1
                self.file = folder / f"{stem}_{number}.json"
        values = {
            "theme": self.theme,
            "began": self.began.isoformat(),
            "machine": self.machine,
            "versions": self.versions,
            "rows": [row_json(row) for row in self.rows.values()],
            "growths": [{"name": name, **curve.to_json()} for name, curve in self.curves.items()],
            "failed": self.failed,
        }
        write_findings(self.file, {"quick": self.quick}, {**self.origin, **values})
        write_text(self.file.with_suffix(".md"), self.page())

    @property
    def commit(self) -> str:
        """The commit that ran, in words."""
        changed = " with changes that are not committed" if self.origin["uncommitted"] else ""
        return f"commit {str(self.origin['commit'])[:12]}{changed}" if self.origin["commit"] else "no known commit"

    def page(self) -> str:
        """Return the result as Markdown."""
        installed = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        text = f"# Benchmark: {self.theme}, {self.began.date().isoformat()}\n\n"
        if self.quick:
            text += "A quick run: small sizes, few repetitions. It shows that everything works and is no evidence.\n\n"
        text += (
            f"{described(self.machine)}; {self.machine['system']}; {self.origin['threads']} threads, load before the "
            f"run {self.machine['load']}. openwu {self.origin['openwu']} at {self.commit}; {installed}.\n\n"
        )
        if self.rows:
            head = ("row", "what", "measured", "goal", "reached", "largest difference")
            text += table(
                head, [(row.name, row.title, *verdict(row), f"{row.error:.1g}") for row in self.rows.values()]
            )
            sides = ("row", "side", "median", "quartiles", "runs")
            text += table(sides, [line for row in self.rows.values() for line in _sides(row)])
        for name, curve in self.curves.items():
            text += f"## {name}: {curve.what}\n\n" + curve_table(curve)
        for row in self.rows.values():
            if row.details:
                text += f"Details of {row.name}:\n\n```json\n{json.dumps(dict(row.details), indent=1)}\n```\n\n"
        for name, reason in self.failed.items():
            text += f"{name} was not measured: {reason}\n\n"
        return text.rstrip() + "\n"


def read_result(file: Path) -> Result | None:
    """Read what `Result.write` wrote; None for JSON of another kind, which may lie in the same folder.

    Raises OpenwuError for a damaged file.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "theme" not in data:
            return None
        rows = [_read_row(row) for row in data["rows"]]
        return Result(
            theme=data["theme"],
            began=datetime.fromisoformat(data["began"]),
            quick=data["settings"]["quick"],
            machine=data["machine"],
            versions=data["versions"],
            origin={key: data[key] for key in ("openwu", "commit", "uncommitted", "threads", "processor")},
            rows={row.name: row for row in rows},
            curves={curve["name"]: Curve.from_json(curve) for curve in data["growths"]},
            failed=data["failed"],
            file=file,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise OpenwuError(f"{file}: expected a result file of openwu bench: {error!r}; move it elsewhere") from error


def row_json(row: Row) -> dict[str, Any]:
    """Return a row as plain JSON values."""
    names = ("name", "title", "value", "unit", "goal", "at_least", "reached")
    sides = {name: list(timing.seconds) for name, timing in row.sides.items()}
    values = {name: getattr(row, name) for name in names}
    return {**values, "sides": sides, "error": row.error, "details": dict(row.details)}


def _read_row(data: Mapping[str, Any]) -> Row:
    fields = {key: value for key, value in data.items() if key not in ("sides", "reached")}
    return Row(**fields, sides={name: Timing(tuple(each)) for name, each in data["sides"].items()})


def verdict(row: Row) -> tuple[str, str, str]:
    """Return measured value, goal, and whether it is reached, in words."""
    goal = f"{'at least' if row.at_least else 'at most'} {number(row.goal)} {row.unit}"
    return f"{number(row.value)} {row.unit}", goal, "yes" if row.reached else "**no**"


def curve_table(curve: Curve) -> str:
    """Return a Markdown table of measured and predicted times."""
    lines = []
    for point in curve.points:
        measured, predicted = point.measured.median, curve.factor * point.predicted
        lines.append((number(point.x), seconds(measured), seconds(predicted), f"{measured / predicted:.2f}"))
    return table((curve.unit, "measured", "predicted", "measured / predicted"), lines)


def seconds(value: float) -> str:
    """Format a time with three digits, in s, ms or µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value / 1e-6)} µs"


def number(value: float) -> str:
    """Format a number with three significant digits, never as a power of ten."""
    return f"{float(f'{value:.3g}'):,.12g}"


def _sides(row: Row) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for side, timing in row.sides.items():
        quartiles = " to ".join(seconds(value) for value in timing.quartiles)
        lines.append((row.name, side, seconds(timing.median), quartiles, str(len(timing.seconds))))
    return lines


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
