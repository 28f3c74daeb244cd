"""`openwu eval`: everything that the model card says, measured by one command; `gallery` makes the page of all edits.

Enters: a model folder. Leaves: JSON with every number, Markdown tables, pictures, and tables between marks of a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from openwu.backbones.embedded.base import WEIGHTS, native_dtype
from openwu.cli.console import Parser
from openwu.data.suite import EDITS
from openwu.data.suite.photographs import load_test_photographs
from openwu.errors import OpenwuError
from openwu.evaluation import tables
from openwu.evaluation.composition import Composed, evaluate_composition
from openwu.evaluation.gallery import write_gallery
from openwu.evaluation.pictures import grid, middle
from openwu.evaluation.strength import SCALES, Graded, evaluate_strength, strength_cells
from openwu.evaluation.suite import Report, evaluate_suite, following
from openwu.evaluation.tables import Goal, goals, repair_gains
from openwu.evaluation.wording import Wording, evaluate_wording, understanding
from openwu.files.markdown import filled
from openwu.files.origin import origin
from openwu.files.writing import write_json, write_text
from openwu.training.embedded.model import SHARED, EmbeddedModel
from openwu.types import Adapter

SMALL = 256
"""Longest side in pixels where many requests are compared with one another."""
CELL = 192
"""Side in pixels of a cell in the pictures of compositions."""


SECTIONS = ("goals", "families", "wording", "strength", "composition", "suite")
"""What a run writes; a card has marks of these names."""


@dataclass(frozen=True)
class Findings:
    """All that one run of the suite measured."""

    report: Report
    wordings: list[Wording]
    shares: dict[str, float]
    gains: dict[str, float]
    graded: list[Graded]
    composed: list[Composed]
    composed_cells: dict[str, list[Tensor]]
    strength_cells: dict[str, list[Tensor]]

    @property
    def goals(self) -> list[Goal]:
        return goals(self.report, self.wordings, self.shares, self.gains)


def run(arguments: list[str]) -> int:
    """Entry of the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    output = Path(options.output)
    if options.what == "curves":
        from openwu.evaluation.curves import write_curves  # reads TensorBoard's files: needs more than the suite

        sys.stdout.write(f"{write_curves(Path(options.run), output)}\n")
        return 0
    folder = Path(options.model) if options.model else WEIGHTS
    model = EmbeddedModel.from_pretrained(folder, dtype=native_dtype())  # as the editor computes
    photographs = load_test_photographs(options.side)
    if options.photographs:
        unknown = sorted(set(options.photographs) - set(photographs))
        if unknown:
            raise OpenwuError(f"--photograph: expected some of {sorted(photographs)}, got {unknown}")
        photographs = {name: photographs[name] for name in options.photographs}
    output.mkdir(parents=True, exist_ok=True)
    if options.what == "gallery":
        page = write_gallery(model, photographs, output)
        sys.stdout.write(f"{page}\n")
        return 0
    card = Path(options.card) if options.card else None
    if card:  # A card that cannot take the tables is refused before the long work.
        filled(card, dict.fromkeys(SECTIONS, ""), "--card")
    baseline = Path(options.shared) if options.shared else folder / SHARED
    shared = Adapter.from_pretrained(baseline) if options.shared or baseline.is_dir() else None
    if shared is not None:
        model.handle.check_targets(shared)
    found = measure(model, shared, photographs, options.seeds)
    sections = as_markdown(found, options.seeds, sorted(photographs))
    _write(found, sections, options.seeds, options.side, output)
    if card:
        write_text(card, filled(card, sections, "--card"))
    sys.stdout.write("".join(sections.values()))
    return 0


def measure(
    model: EmbeddedModel, shared: Adapter | None, photographs: dict[str, Tensor], seeds: Sequence[int]
) -> Findings:
    """Run every part of the suite."""
    edits = [label for label in model.config.instruction.labels if label in EDITS]
    small = {name: middle(picture, SMALL) for name, picture in photographs.items()}
    first = sorted(small)[0]
    wordings = evaluate_wording(model, small[first], following(first, small), edits)
    graded = evaluate_strength(model, small, edits)
    composed, cells = evaluate_composition(model, small, edits)
    gains = repair_gains(model, photographs, edits)
    report = evaluate_suite(model, shared, photographs, seeds, edits)
    scaled = strength_cells(model, small[first], edits)
    return Findings(report, wordings, understanding(model.instruction), gains, graded, composed, cells, scaled)


def as_markdown(found: Findings, seeds: Sequence[int], photographs: Sequence[str]) -> dict[str, str]:
    """Section -> text, for each of SECTIONS."""
    texts = (
        tables.goals_table(found.goals) + tables.missed_list(found.report),
        tables.families_table(found.report),
        tables.wording_table(found.wordings, found.shares),
        tables.strength_table(found.graded),
        tables.composition_table(found.composed),
        tables.suite_table(found.report, seeds, photographs),
    )
    return dict(zip(SECTIONS, texts, strict=True))


def as_json(found: Findings, seeds: Sequence[int], side: int) -> dict[str, object]:
    """Every number, with what made it."""
    return {
        **origin(),
        "seeds": list(seeds),
        "side": side,
        "dtype": str(native_dtype()),
        "goals": [{**dataclasses.asdict(goal), "met": goal.met} for goal in found.goals],
        "missed": found.report.missed(),
        "summary": found.report.summary(),
        "understanding": found.shares,
        "repairs": found.gains,
        "composition": [dataclasses.asdict(each) for each in found.composed],
        "strength": [dataclasses.asdict(each) for each in found.graded],
        "wording": [dataclasses.asdict(each) for each in found.wordings],
        "scores": [dataclasses.asdict(score) for score in found.report.scores],
    }


def _write(found: Findings, sections: dict[str, str], seeds: Sequence[int], side: int, output: Path) -> None:
    numbers = as_json(found, seeds, side)
    write_json(output / "suite.json", numbers)
    text = "".join(f"## {name.capitalize()}\n\n{section}" for name, section in sections.items())
    write_text(output / "suite.md", text)
    titles = [*found.report.methods, "target"]
    grid(found.report.grid, titles).save(output / "suite.jpg", quality=85)
    cells = {name: [middle(cell, CELL) for cell in row] for name, row in found.composed_cells.items()}
    if cells:
        grid(cells, ["input", "one pass", "two passes", "target"]).save(output / "composition.jpg", quality=85)
    if found.strength_cells:
        scaled = {name: [middle(cell, CELL) for cell in row] for name, row in found.strength_cells.items()}
        grid(scaled, [f"strength {scale:g}" for scale in SCALES]).save(output / "strength.jpg", quality=85)
    worst = sorted(found.report.edits, key=lambda edit: found.report.mean("psnr", "generated", [edit]))[:8]
    shown = {name: found.report.grid[name] for name in dict.fromkeys([*found.report.missed(), *worst])}
    grid(shown, titles).save(output / "worst.jpg", quality=85)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="openwu eval", description="Measure a model on photographs never seen.")
    parser.add_argument(
        "what",
        choices=["suite", "gallery", "curves"],
        help="suite: every number of the model card; gallery: a page of all edits; curves: of a training run",
    )
    parser.add_argument("--model", metavar="FOLDER", help="folder of a model (default: the one inside the package)")
    parser.add_argument(
        "--shared",
        metavar="FOLDER",
        help="suite: the baseline, one LoRA for all requests (default: shared in the model's folder, if there)",
    )
    parser.add_argument("--output", default="runs/eval", metavar="FOLDER", help="where results go (default: runs/eval)")
    parser.add_argument("--run", default="runs/embedded", metavar="FOLDER", help="training run whose curves are drawn")
    parser.add_argument("--card", metavar="FILE", help="model card whose tables are replaced")
    parser.add_argument(
        "--side", type=int, default=512, metavar="N", help="longest side of a photograph (default: 512)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--photograph", action="append", dest="photographs", metavar="NAME", help="only this one")
    return parser
