"""docs/reports.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "reports.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \S+#\d+ \|", line)
]


def test_every_test_that_it_names_exists() -> None:
    existing = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    named = {name for row in ROWS for name in re.findall(r"`(test_\w+)`", row[-1])}
    assert len(named) >= 18
    assert named <= existing, sorted(named - existing)


def test_every_row_is_one_report_told_whole() -> None:
    assert len(ROWS) >= 18
    assert all(len(row) == 4 and all(row) for row in ROWS)
    reports = [row[0] for row in ROWS]
    assert len(set(reports)) == len(reports)
    assert all(row[3] == "none" or row[3].startswith("`test_") for row in ROWS)
