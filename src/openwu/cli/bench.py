"""`openwu bench`: what an edit costs on this machine; with rows, the benchmarks of a source checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from openwu.cli.console import Parser, UsageError, note
from openwu.errors import OpenwuError
from openwu.version import __version__

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
"""In a source checkout; the wheel does not contain them."""
PACKAGE = "openwu_bench"
ROWS = "runs/bench"
"""Default folder of the rows' result files."""
PAGE = "docs/performance.md"


def run(arguments: Sequence[str]) -> int:
    """Run `openwu bench` and return its exit code; raise OpenwuError where something cannot be measured."""
    options = _parser().parse_args(arguments)
    if options.names or options.all or options.quick or options.rehearse or options.list or options.report is not None:
        return _rows(options)
    return _machine(options)


def _machine(options: argparse.Namespace) -> int:
    """Measure this machine, print the page, and write it where `--output` says."""
    from openwu.evaluation.machine.measure import measure_machine
    from openwu.evaluation.machine.page import as_json, as_text, check_suffix, write_page

    output = None if options.output is None else Path(options.output)
    if output is not None:
        check_suffix(output)
    note("measuring for about a minute; on a busy machine for longer")
    cost = measure_machine(note)
    sys.stdout.write(as_json(cost) if options.json else as_text(cost))
    if output is not None:
        write_page(cost, output)
        note(f"-> {output}")
    return 0


def _rows(options: argparse.Namespace) -> int:
    """Hand over to the benchmarks of a source checkout."""
    if options.json:
        raise UsageError("--json: the page of this machine has it; rows write JSON files into --output")
    if not (FOLDER / PACKAGE / "command.py").is_file():
        raise OpenwuError(
            f"openwu bench: expected the benchmarks in {FOLDER}, found none: rows are part of the source, not of the "
            f"installed package; run `pip install -e .` in a checkout of openwu {__version__}, then try again; "
            "`openwu bench` without rows needs none"
        )
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    options.output = options.output or ROWS
    return int(importlib.import_module(f"{PACKAGE}.command").run(options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="openwu bench",
        description="Measure what an edit costs on this machine, in about a minute: seconds, memory, what limits it "
        "and what would help. With rows: measure openwu against other implementations and against its goals.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="also write the page to this .html, .md or .json file; of rows, the folder of result files (default: "
        f"{ROWS})",
    )
    parser.add_argument("--json", action="store_true", help="print the page as JSON on standard output")
    rows = parser.add_argument_group("rows, for developers", "they need a checkout of the source")
    rows.add_argument("names", nargs="*", metavar="ROW", help="these rows and curves; see --list")
    rows.add_argument("--all", action="store_true", help="all rows and curves that this machine can measure")
    rows.add_argument("--quick", action="store_true", help="small sizes, few repeats: a smoke test, no evidence")
    rows.add_argument(
        "--rehearse", action="store_true", help="run GPU rows on the CPU at tiny sizes: shows that they run"
    )
    rows.add_argument("--list", action="store_true", help="show every row and curve, and measure nothing")
    rows.add_argument(
        "--report",
        metavar="FOLDER",
        help="measure nothing; fill the page and draw its figures from this folder's results",
    )
    rows.add_argument("--page", default=PAGE, metavar="FILE", help=f"page that --report fills (default: {PAGE})")
    return parser
