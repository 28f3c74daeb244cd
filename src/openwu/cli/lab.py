"""`openwu audit` and `openwu lab`: run an experiment on the embedded model, or on a folder with another one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from openwu.cli.console import Parser, UsageError
from openwu.cli.evaluate.report import note_reports
from openwu.evaluation.experiments.comparisons.conflict import CLOCKS
from openwu.evaluation.experiments.comparisons.scaling import AXES
from openwu.evaluation.experiments.runs import EXPERIMENTS, LabSettings, stored_table
from openwu.evaluation.experiments.runs import run_audit as audit

SIDE = 256
"""Default of --side."""
IGNORED: dict[str, tuple[str, ...]] = {
    "conflict": ("axis", "along"),
    "continual": ("axis", "clock", "along"),
    "examples": ("steps", "axis", "photos", "clock", "edits", "along"),
    "gradients": ("steps", "axis", "side", "clock"),
    "operators": ("axis", "clock", "along"),
    "own-pairs": ("axis", "clock", "edits", "along"),
    "manifold": ("steps", "axis", "photos", "clock", "along"),
    "scaling": ("clock", "along"),
    "understood": ("steps", "axis", "clock", "edits", "along"),
    "video": ("steps", "axis", "photos", "clock", "along"),
}
"""Experiment -> options that it would ignore, and therefore refuses."""


def run_audit(arguments: list[str]) -> int:
    """Run `openwu audit`; return the exit code."""
    parser = _parser("openwu audit", "Does the condition matter? Adapters that know less and less.")
    settings = _settings(parser.parse_args(arguments))
    sys.stdout.write(audit(settings))
    note_reports(Path(settings.output) / "audit.json")
    return 0


def run_lab(arguments: list[str]) -> int:
    """Run `openwu lab`; return the exit code."""
    parser = _parser("openwu lab", "Test a claim of functional memory.")
    parser.add_argument("what", choices=sorted(EXPERIMENTS), help="the experiment")
    parser.add_argument("--photos", metavar="FOLDER", help="training photographs (default: photos)")
    parser.add_argument("--steps", type=int, metavar="N", help="length of every training, instead of the setting's")
    parser.add_argument(
        "--along", type=int, nargs="+", metavar="N", help="gradients: after these numbers of steps, as a curve"
    )
    parser.add_argument("--axis", choices=AXES, help="scaling: vary only this (default: both)")
    parser.add_argument(
        "--clock", choices=CLOCKS, help="conflict: what is equal for all methods, their steps (default) or their time"
    )
    parser.add_argument(
        "--from", dest="stored", metavar="FILE", help="print the table of this result file, run nothing"
    )
    options = parser.parse_args(arguments)
    if options.stored is not None:
        sys.stdout.write(stored_table(options.what, Path(options.stored)))
        return 0
    del options.stored
    ignored = [name for name in IGNORED[options.what] if getattr(options, name) is not None]
    if ignored:
        raise UsageError(f"openwu lab {options.what}: it does not read --{', --'.join(ignored)}; leave that out")
    what, run = options.what, EXPERIMENTS[options.what]
    del options.what
    settings = _settings(options)
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    sys.stdout.write(run(settings))
    note_reports(Path(settings.output) / f"{what.replace('-', '_')}.json")
    return 0


def _settings(options: argparse.Namespace) -> LabSettings:
    """Check the numbers before photographs and models are looked for, or a folder is made."""
    given = vars(options)
    for name in ("steps", "side"):
        value = given.get(name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected a number above 0, got {value}")
    given["clock"] = given.get("clock") or CLOCKS[0]
    given["photos"] = given.get("photos") or "photos"
    given["side"] = SIDE if given["side"] is None else given["side"]
    given["seeds"] = tuple(given["seeds"])
    given["along"] = tuple(given["along"]) if given.get("along") else None
    given["edits"] = tuple(given["edits"]) if given["edits"] else None
    return LabSettings(**given)


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--quick", action="store_true", help="fewer photographs and sub-tasks: minutes on two cores")
    parser.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    parser.add_argument("--output", default="runs/lab", metavar="FOLDER", help="where results go (default: runs/lab)")
    parser.add_argument("--side", type=int, metavar="N", help=f"longest side of a test photograph (default: {SIDE})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--edit", action="append", dest="edits", metavar="NAME", help="only this sub-task; repeatable")
    return parser
