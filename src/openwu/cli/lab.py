"""`openwu audit` and `openwu lab`: run an experiment on the embedded model, or on a folder with another one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from openwu.cli.console import Parser, UsageError
from openwu.cli.evaluate.report import note_reports
from openwu.evaluation.experiments.comparisons.conflict import CLOCKS
from openwu.evaluation.experiments.comparisons.own_pairs import LOOKS, WAYS
from openwu.evaluation.experiments.comparisons.scaling import AXES
from openwu.evaluation.experiments.runs import EXPERIMENTS, TASKS, LabSettings, stored_table
from openwu.evaluation.experiments.runs import run_audit as audit

SIDE = 256
"""Default of --side."""
READ: dict[str, tuple[str, ...]] = {
    "conflict": ("steps", "photos", "tasks", "clock", "edits", "side", "batch", "search", "methods"),
    "continual": ("steps", "photos", "edits", "side", "batch"),
    "examples": ("side",),
    "gradients": ("photos", "along", "edits"),
    "operators": ("steps", "photos", "edits", "side", "batch", "operators"),
    "own-pairs": ("steps", "photos", "side", "ways", "looks"),
    "manifold": ("edits", "side"),
    "scaling": ("steps", "photos", "axis", "edits", "side", "batch"),
    "understood": ("photos", "side"),
    "video": ("edits", "side"),
}
"""Experiment -> the options of SOME that it reads; the others it would ignore, and therefore refuses."""
SOME = (
    *("steps", "axis", "photos", "tasks", "clock", "edits", "along", "side", "batch", "search", "ways", "looks"),
    *("operators", "methods"),
)
OPTIONS = {"edits": "edit", "ways": "way", "looks": "look", "operators": "operator", "methods": "method"}
"""Field of LabSettings -> its option, where that has another name."""


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
        "--tasks", choices=TASKS, help="conflict: edits with names (default), or programs shown by pairs of pictures"
    )
    parser.add_argument(
        "--batch", type=int, nargs=2, metavar=("N", "CROP"), help="requests of every training step, and their side"
    )
    parser.add_argument(
        "--search", type=int, metavar="N", help="conflict: search learning rates by trainings of so many steps"
    )
    parser.add_argument(
        "--method", action="append", dest="methods", metavar="NAME", help="conflict of examples: only this; repeatable"
    )
    parser.add_argument("--way", action="append", dest="ways", choices=WAYS, help="own-pairs: only this; repeatable")
    parser.add_argument("--look", action="append", dest="looks", choices=LOOKS, help="own-pairs: only this; repeatable")
    parser.add_argument(
        "--operator",
        action="append",
        dest="operators",
        metavar="NAME[:RANK]",
        help="operators: train only this, such as offset or lora:1; repeatable (default: all)",
    )
    parser.add_argument(
        "--from", dest="stored", metavar="FILE", help="print the table of this result file, run nothing"
    )
    options = parser.parse_args(arguments)
    if options.stored is not None:
        sys.stdout.write(stored_table(options.what, Path(options.stored)))
        return 0
    del options.stored
    given = [name for name in SOME if getattr(options, name) is not None]
    ignored = [OPTIONS.get(name, name) for name in given if name not in READ[options.what]]
    if ignored:
        raise UsageError(f"openwu lab {options.what}: it does not read --{', --'.join(ignored)}; leave that out")
    what, run = options.what, EXPERIMENTS[options.what]
    del options.what
    settings = _settings(options)
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    sys.stdout.write(run(settings))
    name = what.replace("-", "_") if settings.tasks == TASKS[0] else f"{what}_{settings.tasks}"
    name = f"{name}-along" if settings.along else name
    note_reports(Path(settings.output) / f"{name}.json")
    return 0


def _settings(options: argparse.Namespace) -> LabSettings:
    """Check the numbers before photographs and models are looked for, or a folder is made."""
    given = vars(options)
    for name in ("steps", "side", "search"):
        value = given.get(name)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected a number above 0, got {value}")
    given["clock"] = given.get("clock") or CLOCKS[0]
    given["tasks"] = given.get("tasks") or TASKS[0]
    given["photos"] = given.get("photos") or "photos"
    given["side"] = SIDE if given["side"] is None else given["side"]
    given["seeds"] = tuple(given["seeds"])
    given["along"] = tuple(given["along"]) if given.get("along") else None
    for name in ("edits", "ways", "looks", "operators", "methods", "batch"):
        given[name] = tuple(given[name]) if given.get(name) else None
    if given["batch"] is not None and min(given["batch"]) < 1:
        raise UsageError(f"--batch: expected two numbers above 0, got {' '.join(map(str, given['batch']))}")
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
