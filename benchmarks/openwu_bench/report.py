"""Fill docs/performance.md and draw its figures from a folder of result files.

What was not measured is reported as not measured; quick runs do not count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from openwu.errors import OpenwuError
from openwu.evaluation.machine.hardware import described
from openwu.files.markdown import filled, table
from openwu.files.writing import write_text
from openwu_bench import ROWS
from openwu_bench.result import Result, curve_table, number, read_result, verdict

ROWS_FIGURE = Path("results/performance-rows.png")
CURVES_FIGURE = Path("results/performance-growth.png")
"""Beside the page."""


def write_report(folder: Path, page: Path) -> None:
    """Fill the marked sections of `page` from the results in `folder`, and draw its figures."""
    results = read_results(folder)
    text = filled(page, sections(results, page), "--page")
    from openwu_bench.figures import draw_curves, draw_rows

    rows = {name: result.rows[name] for name, result in newest_rows(results).items()}
    curves = {name: result.curves[name] for name, result in newest_curves(results).items()}
    for figure in (ROWS_FIGURE, CURVES_FIGURE):
        (page.parent / figure).parent.mkdir(parents=True, exist_ok=True)
        (page.parent / figure).unlink(missing_ok=True)
    if rows:
        draw_rows(rows, page.parent / ROWS_FIGURE)
    if curves:
        draw_curves(curves, page.parent / CURVES_FIGURE)
    write_text(page, text)


def read_results(folder: Path) -> list[Result]:
    """Read all result files but those of quick runs, from the oldest to the newest."""
    if not folder.is_dir():
        raise OpenwuError(f"--report: expected a folder of result files, got {folder}")
    results = [read_result(file) for file in sorted(folder.glob("*.json"))]
    return sorted((each for each in results if each is not None and not each.quick), key=lambda result: result.began)


def newest_rows(results: Sequence[Result]) -> dict[str, Result]:
    """Return row -> the newest result that has it, in the order of `ROWS`."""
    newest = {name: result for result in results for name in result.rows}
    return {name: newest[name] for name in ROWS if name in newest}


def newest_curves(results: Sequence[Result]) -> dict[str, Result]:
    """Return curve -> the newest result that has it, sorted by name."""
    return dict(sorted({name: result for result in results for name in result.curves}.items()))


def sections(results: Sequence[Result], page: Path) -> dict[str, str]:
    """Return the text of each marked section of the page."""
    rows, curves = newest_rows(results), newest_curves(results)
    rows_figure = f"![every row against its goal, and the times of its sides]({ROWS_FIGURE.as_posix()})\n\n"
    curves_figure = f"![measured cost against size, and the law]({CURVES_FIGURE.as_posix()})\n\n"
    return {
        "rows": _rows(rows) + (rows_figure if rows else ""),
        "growth": _curves(curves) + curves_figure if curves else "Not measured yet.\n\n",
        "runs": _runs([*rows.values(), *curves.values()], page),
    }


def _rows(newest: Mapping[str, Result]) -> str:
    lines = []
    for name, planned in ROWS.items():
        if name in newest:
            row = newest[name].rows[name]
            lines.append((name, row.title, *verdict(row), _stem(newest[name])))
        else:
            lines.append((name, planned.title, "not measured", planned.goal, "", ""))
    return table(("row", "what", "measured", "goal", "reached", "run"), lines)


def _curves(newest: Mapping[str, Result]) -> str:
    text = ""
    for name, result in newest.items():
        curve = result.curves[name]
        text += (
            f"**{name}** ({_stem(result)}): {curve.what}. Grows as size to the power of {curve.exponent:.2f}; "
            f"at most {number((curve.max_deviation - 1) * 100)} % away from the law.\n\n" + curve_table(curve)
        )
    return text


def _runs(used: Sequence[Result], page: Path) -> str:
    lines = []
    for stem, result in {_stem(each): each for each in used}.items():
        assert result.file is not None
        link = Path(os.path.relpath(result.file.with_suffix(".md"), page.parent)).as_posix()
        installed = ", ".join(
            f"{name} {result.versions[name]}" for name in ("python", "torch") if name in result.versions
        )
        threads = str(result.origin["threads"])
        lines.append((f"[{stem}]({link})", described(result.machine), threads, installed, result.commit))
    return table(("run", "machine", "threads", "versions", "code"), sorted(lines)) if lines else "Not measured yet.\n\n"


def _stem(result: Result) -> str:
    assert result.file is not None
    return result.file.stem
