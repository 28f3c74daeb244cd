"""`openwu bench ROW ...`: measure rows and curves, print a table, and write result files with every timing.

With `--report` nothing is measured: docs/performance.md and its figures are made again from result files.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from openwu.cli.console import UsageError, complain, note
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.results import columns
from openwu.evaluation.machine.hardware import hardware
from openwu.registry import resolve
from openwu_bench import CURVES, ROWS, needs_gpu
from openwu_bench.measurement import Curve, Row, rehearsal, rehearsed
from openwu_bench.report import write_report
from openwu_bench.result import Result, number, seconds, verdict, versions

CURVES_THEME = "growth"


def run(options: argparse.Namespace) -> int:
    """Run `openwu bench` with rows and return its exit code: 1 where something could not be measured.

    options: those of `openwu.cli.bench`.
    """
    if unknown := [name for name in options.names if name not in (*ROWS, *CURVES)]:
        raise UsageError(
            f"ROW: expected some of {', '.join((*ROWS, *CURVES))}, got {', '.join(unknown)}; "
            "`openwu bench --list` describes them"
        )
    if options.list:
        sys.stdout.write(listed())
        return 0
    if options.report is not None:
        write_report(Path(options.report), Path(options.page))
        sys.stdout.write(f"{options.report} -> {options.page}\n")
        return 0
    if options.rehearse:
        with rehearsal():
            return _measured(options)
    return _measured(options)


def _measured(options: argparse.Namespace) -> int:
    names, skipped = selected(options.names)
    for name, reason in skipped.items():
        note(f"{name}: skipped, {reason}")
    results = measure(names, options.quick or rehearsed(), Path(options.output))
    sys.stdout.write("\n" + overview(results))
    for result in results:
        sys.stdout.write(f"-> {result.file}\n")
    missing = [name for name in options.names if name in skipped]
    return 1 if missing or any(result.failed for result in results) else 0


def selected(requested: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return which of the requested names (all, if none) can be measured here, and why the others are skipped."""
    names = list(dict.fromkeys(requested or (*ROWS, *CURVES)))
    skipped = {}
    if not torch.cuda.is_available() and not rehearsed():
        skipped = {name: "it needs a GPU, and no CUDA device is here" for name in names if needs_gpu(name)}
    return [name for name in names if name not in skipped], skipped


def measure(names: Sequence[str], quick: bool, output: Path) -> list[Result]:
    """Measure one after another; files are written after each, so that an interrupt loses only the current one."""
    results: dict[tuple[str, bool], Result] = {}
    with tqdm(names, disable=not sys.stderr.isatty(), unit="row", leave=False) as bar:
        for name in bar:
            bar.set_description(name)
            on_gpu = needs_gpu(name) and not rehearsed()
            key = (ROWS[name].theme if name in ROWS else CURVES_THEME, on_gpu)
            if key not in results:
                results[key] = Result(key[0], datetime.now(UTC), quick, hardware(key[1]), versions())
            _measure_into(results[key], name, quick)
            results[key].write(output)
    return list(results.values())


def _measure_into(result: Result, name: str, quick: bool) -> None:
    """Measure one row or curve; its error is stored and reported, and the others are measured all the same."""
    try:
        if name in ROWS:
            row = resolve(ROWS[name].measure)(quick)
            check_row(row, name)
            result.rows[name] = row
            tqdm.write("  ".join((name, *verdict(row))).replace("**", ""), file=sys.stderr)
        else:
            curve = resolve(CURVES[name])(quick)
            result.curves[name] = curve
            tqdm.write(f"{name}  {_scaling(curve)}", file=sys.stderr)
    except ModuleNotFoundError as error:
        result.failed[name] = f"the Python package {error.name!r} is not installed"
    except Exception as error:
        result.failed[name] = f"{type(error).__name__}: {error}"
    if name in result.failed:
        complain(f"{name}: {result.failed[name]}")


def check_row(row: Row, name: str) -> None:
    """Raise where a row has another name, a value that is not finite, or details that are no JSON."""
    if row.name != name:
        raise OpenwuError(f"expected a row named {name}, got {row.name!r}")
    if not all(math.isfinite(value) for value in (row.value, row.goal, row.error)):
        raise OpenwuError(f"expected finite value, goal and error, got {row.value}, {row.goal}, {row.error}")
    json.dumps(dict(row.details), allow_nan=False)


def overview(results: Sequence[Result]) -> str:
    """Return tables of what was measured, for a terminal."""
    measured = {row.name: row for result in results for row in result.rows.values()}
    rows = [(name, *verdict(measured[name]), measured[name].title) for name in ROWS if name in measured]
    text = columns(("row", "measured", "goal", "reached", "what"), rows).replace("**", "") if rows else ""
    curves = [(name, _scaling(curve)) for result in results for name, curve in result.curves.items()]
    return text + ("\n" + columns(("curve", "found"), curves) if curves else "")


def listed() -> str:
    """Return a table of all rows, and the names of all curves."""
    rows = [(name, "GPU" if needs_gpu(name) else "CPU", planned.goal, planned.title) for name, planned in ROWS.items()]
    return columns(("row", "on", "goal", "what"), rows) + "".join(f"\ncurve  {name}" for name in CURVES) + "\n"


def _scaling(curve: Curve) -> str:
    last = curve.points[-1]
    return (
        f"{seconds(last.measured.median)} at {number(last.x)} {curve.unit}, grows as size ^ {curve.exponent:.2f}, "
        f"at most {number((curve.max_deviation - 1) * 100)} % off its law"
    )
