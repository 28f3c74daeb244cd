"""`openwu bench`: names of rows and curves enter; a table in the terminal, and result files of every timing leave.

With `--report`, nothing is measured: the page on performance and its pictures are made again from result files.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from openwu.bench import GROWTHS, ROWS
from openwu.bench.growth import Growth
from openwu.bench.machine import hardware, versions
from openwu.bench.plan import PLAN, needs_gpu
from openwu.bench.report import write_report
from openwu.bench.result import Result, judged, number, seconds
from openwu.bench.row import Row
from openwu.cli.console import Parser, UsageError, complain, note
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import columns

GROWTH = "growth"
"""Theme of all curves."""
PAGE = "docs/performance.md"


def run(arguments: Sequence[str]) -> int:
    """Entry of `openwu bench`; returns the exit code: 1 where something could not be measured."""
    options = _parser().parse_args(arguments)
    if unknown := [name for name in options.names if name not in (*PLAN, *GROWTHS)]:
        raise UsageError(
            f"ROW: expected some of {', '.join((*PLAN, *GROWTHS))}, got {', '.join(unknown)}; "
            "`openwu bench --list` describes them"
        )
    if options.list:
        sys.stdout.write(listed())
        return 0
    if options.report is not None:
        write_report(Path(options.report), Path(options.page))
        sys.stdout.write(f"{options.report} -> {options.page}\n")
        return 0
    names, reasons = chosen(options.names)
    for name, reason in reasons.items():
        note(f"{name}: skipped, {reason}")
    results = measure(names, options.quick, Path(options.output))
    sys.stdout.write("\n" + overview(results))
    for result in results:
        sys.stdout.write(f"-> {result.file}\n")
    missing = [name for name in options.names if name in reasons]
    return 1 if missing or any(result.failed for result in results) else 0


def chosen(asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What can be measured here of what was asked for (all, if nothing was), and why the rest cannot."""
    reasons: dict[str, str] = {}
    for name in asked or (*PLAN, *GROWTHS):
        if name in PLAN and name not in ROWS:
            reasons[name] = "nobody has written it yet"
        elif needs_gpu(name) and not torch.cuda.is_available():
            reasons[name] = "it needs a GPU, and no CUDA device is here"
    names = [name for name in dict.fromkeys(asked or (*PLAN, *GROWTHS)) if name not in reasons]
    return names, reasons


def measure(names: Sequence[str], quick: bool, output: Path) -> list[Result]:
    """Measure one after another; files are written after each, so that stopping loses only what is under way."""
    results: dict[tuple[str, bool], Result] = {}
    with tqdm(names, disable=not sys.stderr.isatty(), unit="row", leave=False) as bar:
        for name in bar:
            bar.set_description(name)
            key = (PLAN[name].theme if name in PLAN else GROWTH, needs_gpu(name))
            if key not in results:
                results[key] = Result(key[0], datetime.now(UTC), quick, hardware(key[1]), versions())
            _measure_into(results[key], name, quick)
            results[key].write(output)
    return list(results.values())


def _measure_into(result: Result, name: str, quick: bool) -> None:
    """One row or curve. Whatever goes wrong in it belongs to it alone: the others are measured all the same."""
    try:
        if name in ROWS:
            row = _resolve(ROWS[name])(quick)
            check_row(row, name)
            result.rows[name] = row
            tqdm.write("  ".join((name, *judged(row))).replace("**", ""), file=sys.stderr)
        else:
            found = _resolve(GROWTHS[name])(quick)
            growth = found if isinstance(found, Growth) else Growth.read(found)
            result.growths[name] = growth
            tqdm.write(f"{name}  {_grown(growth)}", file=sys.stderr)
    except ModuleNotFoundError as error:
        result.failed[name] = f"the Python package {error.name!r} is not installed"
    except Exception as error:
        result.failed[name] = f"{type(error).__name__}: {error}"
    if name in result.failed:
        complain(f"{name}: {result.failed[name]}")


def check_row(row: Row, name: str) -> None:
    """Refuse a row that would not survive being written, or that says nothing."""
    if row.name != name:
        raise OpenwuError(f"expected a row named {name}, got {row.name!r}")
    if not all(math.isfinite(value) for value in (row.value, row.goal, row.error)):
        raise OpenwuError(f"expected finite value, goal and error, got {row.value}, {row.goal}, {row.error}")
    json.dumps(dict(row.details), allow_nan=False)


def overview(results: Sequence[Result]) -> str:
    """What was measured, for a terminal."""
    rows = [
        (row.name, *judged(row), row.title) for result in results for row in sorted(result.rows.values(), key=_place)
    ]
    text = columns(("row", "measured", "goal", "reached", "what"), rows).replace("**", "") if rows else ""
    curves = [(name, _grown(growth)) for result in results for name, growth in result.growths.items()]
    return text + ("\n" + columns(("curve", "found"), curves) if curves else "")


def listed() -> str:
    """Everything that has a name."""
    rows = [
        (
            name,
            "GPU" if needs_gpu(name) else "CPU",
            planned.goal,
            planned.title + ("" if name in ROWS else " (to come)"),
        )
        for name, planned in PLAN.items()
    ]
    return columns(("row", "on", "goal", "what"), rows) + "".join(f"\ncurve  {name}" for name in GROWTHS) + "\n"


def _grown(growth: Growth) -> str:
    last = growth.points[-1]
    return (
        f"{seconds(last.measured.median)} at {number(last.x)} {growth.unit}, grows as size ^ {growth.exponent:.2f}, "
        f"at most {number((growth.departure - 1) * 100)} % off its law"
    )


def _place(row: Row) -> int:
    return list(PLAN).index(row.name)


def _resolve(path: str) -> Callable[[bool], Any]:
    module, _, function = path.partition(":")
    found: Callable[[bool], Any] = getattr(importlib.import_module(module), function)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="openwu bench",
        description="Measure speed and memory. Every row checks that both sides agree, then times them in turn.",
    )
    parser.add_argument("names", nargs="*", metavar="ROW", help="rows and curves (default: all; see --list)")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it works, and is no evidence")
    parser.add_argument("--list", action="store_true", help="show every row and curve, and measure nothing")
    parser.add_argument(
        "--output", default="runs/bench", metavar="FOLDER", help="where result files go (default: runs/bench)"
    )
    parser.add_argument(
        "--report", metavar="FOLDER", help="measure nothing; make the page and its pictures from this folder's results"
    )
    parser.add_argument("--page", default=PAGE, metavar="FILE", help=f"page that --report fills (default: {PAGE})")
    return parser
