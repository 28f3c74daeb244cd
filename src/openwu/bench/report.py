"""The page on performance: a folder of result files enters, sections of Markdown and two pictures leave.

What was not measured is shown as not measured; quick runs do not count as measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from openwu.bench.machine import described
from openwu.bench.plan import PLAN
from openwu.bench.result import Result, growth_table, judged, number, read_result
from openwu.errors import OpenwuError
from openwu.files.markdown import filled, table
from openwu.files.writing import write_text

ROWS_PICTURE = Path("results/performance-rows.png")
GROWTH_PICTURE = Path("results/performance-growth.png")
"""Beside the page."""
NOTHING = "Not measured yet."


def write_report(folder: Path, page: Path) -> None:
    """Fill the page's marks from the results in `folder`, and draw its pictures."""
    results = read_results(folder)
    text = filled(page, sections(results, page), "--page")
    from openwu.bench.pictures import draw_growths, draw_rows

    rows = {name: result.rows[name] for name, result in newest_rows(results).items()}
    growths = {name: result.growths[name] for name, result in newest_growths(results).items()}
    for picture in (ROWS_PICTURE, GROWTH_PICTURE):
        (page.parent / picture).parent.mkdir(parents=True, exist_ok=True)
        (page.parent / picture).unlink(missing_ok=True)
    if rows:
        draw_rows(rows, page.parent / ROWS_PICTURE)
    if growths:
        draw_growths(growths, page.parent / GROWTH_PICTURE)
    write_text(page, text)


def read_results(folder: Path) -> list[Result]:
    """All that count, from the oldest to the newest."""
    if not folder.is_dir():
        raise OpenwuError(f"--report: expected a folder of result files, got {folder}")
    results = [read_result(file) for file in sorted(folder.glob("*.json"))]
    counted = [result for result in results if result is not None and not result.quick]
    return sorted(counted, key=lambda result: result.began)


def newest_rows(results: Sequence[Result]) -> dict[str, Result]:
    """Row -> the newest result that has it, in the order of the plan."""
    found = {name: result for result in results for name in result.rows}
    return {name: found[name] for name in PLAN if name in found}


def newest_growths(results: Sequence[Result]) -> dict[str, Result]:
    found = {name: result for result in results for name in result.growths}
    return dict(sorted(found.items()))


def sections(results: Sequence[Result], page: Path) -> dict[str, str]:
    """Name of a mark -> what stands between its begin and end."""
    rows, growths = newest_rows(results), newest_growths(results)
    return {
        "rows": _rows(rows) + _picture(rows, ROWS_PICTURE, "every row against its goal, and the times of its sides"),
        "growth": _growths(growths) + _picture(growths, GROWTH_PICTURE, "measured cost against size, and the law"),
        "runs": _runs([*rows.values(), *growths.values()], page),
    }


def _rows(found: Mapping[str, Result]) -> str:
    lines = []
    for name, planned in PLAN.items():
        if name not in found:
            lines.append((name, planned.title, "not measured", planned.goal, "", ""))
            continue
        row = found[name].rows[name]
        lines.append((name, row.title, *judged(row), _where(found[name])))
    return table(("row", "what", "measured", "goal", "reached", "run"), lines)


def _growths(found: Mapping[str, Result]) -> str:
    text = ""
    for name, result in found.items():
        growth = result.growths[name]
        text += (
            f"**{name}** ({_where(result)}): {growth.what}. Grows as size to the power of {growth.exponent:.2f}; "
            f"at most {number((growth.departure - 1) * 100)} % away from the law.\n\n" + growth_table(growth)
        )
    return text or f"{NOTHING}\n\n"


def _runs(used: Sequence[Result], page: Path) -> str:
    lines = []
    for result in {_where(each): each for each in used}.values():
        assert result.file is not None
        link = Path(os.path.relpath(result.file.with_suffix(".md"), page.parent)).as_posix()
        installed = ", ".join(
            f"{name} {result.versions[name]}" for name in ("python", "torch") if name in result.versions
        )
        threads = str(result.origin["threads"])
        lines.append((f"[{_where(result)}]({link})", described(result.machine), threads, installed, result.commit))
    return table(("run", "machine", "threads", "versions", "code"), sorted(lines)) if lines else f"{NOTHING}\n\n"


def _where(result: Result) -> str:
    assert result.file is not None
    return result.file.stem


def _picture(found: Mapping[str, Result], file: Path, what: str) -> str:
    return f"![{what}]({file.as_posix()})\n\n" if found else ""
