"""`openwu audit` and `openwu lab`: an experiment on the embedded model, or on a folder with another one.

Enters: arguments. Leaves: a table in the terminal, JSON with every number and its origin, a picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from openwu.backbones.embedded.base import WEIGHTS, native_dtype
from openwu.cli.console import Parser, UsageError
from openwu.data.suite import BASE_EDITS, CONTRADICTORY_PAIRS, EDITS, FAMILIES
from openwu.data.suite.photographs import folder_hashes, load_folder, load_test_photographs
from openwu.errors import OpenwuError
from openwu.evaluation.experiments.audit import Ladder, audit
from openwu.evaluation.experiments.conflict import Contest, conflict
from openwu.evaluation.experiments.continual import Course, continual
from openwu.evaluation.experiments.embedded import embedded_subject
from openwu.evaluation.experiments.embedded_gradients import generator_conflict, shared_conflicts
from openwu.evaluation.experiments.gradients import Conflict
from openwu.evaluation.experiments.manifold import Manifold, manifold
from openwu.evaluation.experiments.methods import Budget
from openwu.evaluation.experiments.pictures import (
    draw_cells,
    draw_conflicts,
    draw_contest,
    draw_course,
    draw_ladder,
    draw_map,
    draw_scaling,
)
from openwu.evaluation.experiments.results import ResultCache, columns, fingerprint, write_findings
from openwu.evaluation.experiments.scaling import AXES, BASE_WIDTHS, GENERATOR_SIZES, Scaling, scaling
from openwu.training.embedded.model import EmbeddedModel

QUICK_PHOTOGRAPHS = ("astronaut", "coffee", "flower")
QUICK_EDITS = tuple(name for pair in CONTRADICTORY_PAIRS[:8] for name in pair)
STEPS, QUICK_STEPS = (0, 100), (0, 40)
"""After how many steps of its training the shared LoRA's gradients are compared."""
BUDGET = Budget(steps=400, wide_rank=192, factors=(0.5, 1.0, 2.0), search_steps=80)
QUICK_BUDGET = Budget(steps=60)
GROUPED = (("brighten", "warm", "blur", "add_noise"), ("fog", "age", "saturate", "vignette"))
GROUPS = tuple(
    tuple(pair[side] for pair in CONTRADICTORY_PAIRS if pair[0] in first) for side in (0, 1) for first in GROUPED
)
"""Four groups of four: opposites arrive two groups later."""
QUICK_GROUPS = tuple(tuple(pair[side] for pair in CONTRADICTORY_PAIRS[:3]) for side in (0, 1))
SCALING, QUICK_SCALING = Budget(steps=300), Budget(steps=30)
GROUP_BUDGET, QUICK_GROUP_BUDGET = Budget(steps=60), Budget(steps=25)
QUICK_OLD = 4
"""How many of the base's old tasks a quick run looks at."""


def run_audit(arguments: list[str]) -> int:
    """Entry of `openwu audit`; returns the exit code."""
    options = _parser("openwu audit", "Does the condition matter? Adapters that know less and less.").parse_args(
        arguments
    )
    _check_numbers(options)
    ladder = audit(embedded_subject(_model(options), _photographs(options), _edits(options)), options.seeds)
    write_findings(Path(options.output) / "audit.json", _settings(options), ladder.to_json())
    draw_ladder(ladder, Path(options.output) / "audit.png")
    sys.stdout.write(ladder_table(ladder))
    return 0


def run_lab(arguments: list[str]) -> int:
    """Entry of `openwu lab`; returns the exit code."""
    parser = _parser("openwu lab", "Test a claim of functional memory.")
    parser.add_argument("what", choices=sorted(EXPERIMENTS), help="the experiment")
    parser.add_argument("--photos", default="photos", metavar="FOLDER", help="training photographs (default: photos)")
    parser.add_argument("--steps", type=int, metavar="N", help="length of every training, instead of the setting's")
    parser.add_argument("--axis", choices=AXES, help="scaling: vary only this (default: both)")
    options = parser.parse_args(arguments)
    _check_numbers(options)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    sys.stdout.write(EXPERIMENTS[options.what](options))
    return 0


def _manifold(options: argparse.Namespace) -> str:
    subject = embedded_subject(_model(options), _photographs(options), _edits(options))
    found = manifold(subject, [case.photograph for case in subject.cases], options.seeds)
    output = Path(options.output)
    write_findings(output / "manifold.json", _settings(options), found.to_json())
    draw_map(found, {name: [edit.name for edit in edits] for name, edits in FAMILIES.items()}, output / "manifold.png")
    return manifold_table(found)


def _gradients(options: argparse.Namespace) -> str:
    edits = _edits(options)
    opposites = [pair for pair in CONTRADICTORY_PAIRS if set(pair) <= set(edits)]
    if not opposites:
        raise OpenwuError("--edit: expected both sides of at least one contradictory pair, such as warm and cool")
    model = EmbeddedModel.from_pretrained(_folder(options))
    photographs = load_folder(Path(options.photos))
    steps = QUICK_STEPS if options.quick else STEPS
    found = [
        *shared_conflicts(model, photographs, edits, opposites, steps, options.seeds),
        *shared_conflicts(model, photographs, edits, opposites, steps, options.seeds, told=False),
        generator_conflict(model, photographs, edits, opposites, options.seeds),
    ]
    output = Path(options.output)
    write_findings(
        output / "gradients.json",
        {**_settings(options), "steps": steps},
        {"tasks": list(edits), "opposites": opposites, "found": [each.to_json() for each in found]},
    )
    draw_conflicts(found, output / "gradients.png")
    return gradients_table(found)


def _conflict(options: argparse.Namespace) -> str:
    paired = [name for pair in CONTRADICTORY_PAIRS for name in pair]
    tasks = _edits(options) if options.edits else paired[:8] if options.quick else paired
    old = [name for name in BASE_EDITS if name not in paired and name not in tasks]
    old = old[:QUICK_OLD] if options.quick else old
    folder, budget = Path(options.photos), QUICK_BUDGET if options.quick else BUDGET
    photographs = (load_folder(folder), load_folder(folder, validation=True))
    model = EmbeddedModel.from_pretrained(_folder(options))
    budget = _shortened(budget, options)
    output = Path(options.output)
    settings = {**_settings(options), "edits": tasks, "old": old, "budget": vars(budget)}
    keep = _kept("conflict", settings, model)
    found = conflict(model, photographs, _photographs(options), tasks, old, budget, options.seeds, keep)
    write_findings(output / "conflict.json", settings, found.to_json())
    draw_contest(found, output / "conflict.png")
    draw_cells(found, output / "conflict.jpg")
    return conflict_table(found)


def _continual(options: argparse.Namespace) -> str:
    groups = [(edit,) for edit in options.edits] if options.edits else QUICK_GROUPS if options.quick else GROUPS
    budget = _shortened(QUICK_GROUP_BUDGET if options.quick else GROUP_BUDGET, options)
    _edits(options)  # refuses unknown names
    if len(groups) < 2:
        raise OpenwuError(f"--edit: expected at least two sub-tasks, to be learned one after another, got {groups}")
    model = EmbeddedModel.from_pretrained(_folder(options))
    photographs = load_folder(Path(options.photos))
    output = Path(options.output)
    settings = {**_settings(options), "edits": None, "groups": groups, "budget": vars(budget)}
    keep = _kept("continual", settings, model)
    found = continual(model, photographs, _photographs(options), groups, budget, options.seeds, keep)
    write_findings(output / "continual.json", settings, found.to_json())
    draw_course(found, output / "continual.png")
    return continual_table(found)


def _scaling(options: argparse.Namespace) -> str:
    paired = [name for pair in CONTRADICTORY_PAIRS for name in pair]
    tasks = _edits(options) if options.edits else paired[:8] if options.quick else paired
    base_tasks = [name for name in BASE_EDITS if name not in tasks]
    budget, base_steps = (QUICK_SCALING, 60) if options.quick else (SCALING, 600)
    budget = _shortened(budget, options)
    sizes = () if options.axis == "base" else GENERATOR_SIZES[:3] if options.quick else GENERATOR_SIZES
    widths = () if options.axis == "generator" else BASE_WIDTHS[:2] if options.quick else BASE_WIDTHS
    model = EmbeddedModel.from_pretrained(_folder(options))
    photographs = load_folder(Path(options.photos))
    base_steps = base_steps if options.steps is None else 2 * options.steps
    output = Path(options.output)
    settings = {**_settings(options), "edits": tasks, "budget": vars(budget), "base_steps": base_steps}
    keep, test = _kept("scaling", settings, model), _photographs(options)
    found = scaling(model, photographs, test, tasks, base_tasks, budget, base_steps, options.seeds, sizes, widths, keep)
    write_findings(output / "scaling.json", settings, found.to_json())
    draw_scaling(found, output / "scaling.png")
    return scaling_table(found)


EXPERIMENTS = {
    "conflict": _conflict,
    "continual": _continual,
    "gradients": _gradients,
    "manifold": _manifold,
    "scaling": _scaling,
}
"""Name -> what runs it and returns its table. One line adds an experiment."""


def ladder_table(ladder: Ladder) -> str:
    rungs = sorted(ladder.scores, key=lambda rung: ladder.mean(rung).value, reverse=True)
    rows = [
        (rung, str(ladder.mean(rung)), "" if rung == "matched" else str(ladder.lead(rung)))
        for rung in rungs
    ]  # fmt: skip
    return columns(("adapter", f"mean score, {ladder.unit}", "matched minus it"), rows) + f"\n{ladder.verdict}\n"


def manifold_table(found: Manifold) -> str:
    silhouette = sum(found.silhouette) / len(found.silhouette)
    rows = [
        ("nearest neighbour has the task", str(found.neighbours)),
        ("the same by chance", f"{found.chance:.2f}"),
        ("silhouette by task", f"{silhouette:.2f}"),
        (f"a - b + c minus another sample's, {found.unit}", str(found.lead("a - b + c", "another sample's"))),
        (f"a - b + c minus matched, {found.unit}", str(found.lead("a - b + c", "matched"))),
    ]
    return columns(("adapters of the test set", "mean [95% interval]"), rows)


def gradients_table(found: Sequence[Conflict]) -> str:
    rows = [(each.where, str(each.contradictory), str(each.all_pairs), str(each.same_task)) for each in found]
    return columns(("cosine of gradients", "contradictory pairs", "all pairs", "within a task"), rows)


def conflict_table(found: Contest) -> str:
    cost = {each["method"]: each for each in found.costs}
    old = any(each.old for each in found.outcomes)
    rows = [
        (
            method,
            str(found.mean(method)),
            str(found.mean(method, "gain")),
            f"{found.mean(method, 'progress').value:.2f}",
            "" if method == "generated" else str(found.lead("generated", method)),
            str(found.lead(method, "base", old=True)) if old else "",
            f"{cost[method]['parameters']:,}" if method in cost else "",
        )
        for method in sorted(found.methods, key=lambda each: found.mean(each).value, reverse=True)
    ]
    head = ("method", "new tasks, dB", "over the input", "progress", "generated minus it", "old tasks", "trained")
    return columns(head, rows)


def scaling_table(found: Scaling) -> str:
    rows = [
        (axis, size, f"{parameters:,}", str(found.mean(axis, size)))
        for axis in found.axes
        for size, parameters in found.sizes(axis).items()
    ]
    fitted = {axis: found.line(axis) for axis in found.axes}
    lines = [
        f"{axis}: {line.slope:+.2f} dB for ten times the parameters, residual {line.residual:.2f}"
        for axis, line in fitted.items()
    ]
    return columns(("what varies", "size", "parameters", "mean, dB"), rows) + "\n" + "\n".join(lines) + "\n"


def continual_table(found: Course) -> str:
    rows = [
        (
            way,
            str(found.final(way)),
            str(found.forgetting(way)),
            str(found.transfer(way)),
            f"{found.stored_bytes[way] / 1e6:.1f} MB",
        )
        for way in sorted(found.ways, key=lambda way: found.final(way).value, reverse=True)
    ]
    return columns(("way", "all tasks at the end, dB", "forgotten, dB", "gained before learning, dB", "stored"), rows)


def _folder(options: argparse.Namespace) -> Path:
    return Path(options.model) if options.model else WEIGHTS


def _model(options: argparse.Namespace) -> EmbeddedModel:
    return EmbeddedModel.from_pretrained(_folder(options), dtype=native_dtype())  # as the editor computes


def _photographs(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    found = load_test_photographs(options.side)
    return {name: found[name] for name in QUICK_PHOTOGRAPHS} if options.quick else found


def _edits(options: argparse.Namespace) -> tuple[str, ...]:
    unknown = sorted(set(options.edits or ()) - set(EDITS))
    if unknown:
        raise OpenwuError(f"--edit: expected some of {list(EDITS)}, got {unknown}")
    return tuple(options.edits) if options.edits else QUICK_EDITS if options.quick else tuple(EDITS)


def _check_numbers(options: argparse.Namespace) -> None:
    """What the arguments alone show comes first: before photographs and models are looked for, or a folder is made."""
    for name in ("steps", "side"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name}: expected a number above 0, got {value}")


def _shortened(budget: Budget, options: argparse.Namespace) -> Budget:
    if options.steps is None:
        return budget
    search_steps = min(budget.search_steps, max(1, options.steps // 5))
    return dataclasses.replace(budget, steps=options.steps, search_steps=search_steps)


def _kept(what: str, settings: Mapping[str, object], model: EmbeddedModel) -> ResultCache:
    """Where finished parts stand: whatever they depend on is in the folder's name, all but their seed."""
    # "quick" counts: it chooses the test photographs, also where --edit and --steps say all else.
    meant = {key: value for key, value in settings.items() if key not in ("seeds", "output", "axis")}
    meant["photos"] = folder_hashes(Path(str(settings["photos"])))
    digits = fingerprint(meant, model.instruction, model.backbone)
    return ResultCache(Path(str(settings["output"])) / "parts" / f"{what}-{digits}")


def _settings(options: argparse.Namespace) -> dict[str, object]:
    return {**vars(options), "model": options.model or "embedded", "edits": _edits(options)}


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--quick", action="store_true", help="fewer photographs and sub-tasks: minutes on two cores")
    parser.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    parser.add_argument("--output", default="runs/lab", metavar="FOLDER", help="where results go (default: runs/lab)")
    parser.add_argument(
        "--side", type=int, default=256, metavar="N", help="longest side of a photograph (default: 256)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--edit", action="append", dest="edits", metavar="NAME", help="only this sub-task; repeatable")
    return parser
