"""Every measurement of the model card: run them, and write JSON, Markdown tables and pictures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from openwu.backbones.embedded.base import native_dtype
from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.suite import EDITS
from openwu.data.suite.photographs import load_test_photographs
from openwu.errors import OpenwuError
from openwu.evaluation import tables
from openwu.evaluation.cases import following, picture_digest
from openwu.evaluation.composition import Composed, evaluate_composition
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult
from openwu.evaluation.pictures import grid, middle
from openwu.evaluation.strength import SCALES, Graded, evaluate_strength, strength_cells
from openwu.evaluation.suite import Report, Score, evaluate_suite
from openwu.evaluation.tables import Goal, goals, repair_gains
from openwu.evaluation.wording import Wording, evaluate_wording, understanding
from openwu.files.fingerprint import fingerprint
from openwu.files.hashing import of_files
from openwu.files.markdown import filled
from openwu.files.origin import origin
from openwu.files.writing import write_json, write_text
from openwu.training.embedded.model import SHARED, EmbeddedModel
from openwu.types import Adapter

SMALL = 256
"""Longest side in pixels where many requests are compared with one another."""
CELL = 192
"""Side in pixels of a cell in the pictures of compositions."""


Record = TypeVar("Record", Wording, Graded)

SECTIONS = ("goals", "families", "wording", "strength", "composition", "suite")
"""Names of the tables; a model card has marks of these names."""


@dataclass(frozen=True)
class Findings:
    """The results of every measurement."""

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


def measure(
    model: EmbeddedModel,
    shared: Adapter | None,
    photographs: dict[str, Tensor],
    seeds: Sequence[int],
    cache: ResultCache = UNCACHED,
) -> Findings:
    """Run every measurement.

    shared: the baseline, one adapter for all requests; None leaves it out. cache: where finished parts are found again;
    of the suite every photograph is one.
    """
    edits = [label for label in model.config.instruction.labels if label in EDITS]
    small = {name: middle(picture, SMALL) for name, picture in photographs.items()}
    first = sorted(small)[0]
    wordings = _records(
        cache, "wording", Wording, lambda: evaluate_wording(model, small[first], following(first, small), edits)
    )
    graded = _records(cache, "strength", Graded, lambda: evaluate_strength(model, small, edits))
    composed, cells = _composition(cache, lambda: evaluate_composition(model, small, edits))
    gains = cache.get("repairs", lambda: TrialResult(repair_gains(model, photographs, edits))).values
    report = Report()
    for seed, name in itertools.product(seeds, photographs):
        own = partial(evaluate_suite, model, shared, photographs, (seed,), edits, only=name)
        _add_photograph(report, cache, f"suite, {name}, seed {seed}", own)
    scaled = strength_cells(model, small[first], edits)
    return Findings(report, wordings, understanding(model.instruction), dict(gains), graded, composed, cells, scaled)


def _records(cache: ResultCache, name: str, kind: type[Record], run: Callable[[], Sequence[Record]]) -> list[Record]:
    """Run a measurement whose results are records of plain values, or read them."""
    found = cache.get(name, lambda: TrialResult({"found": [vars(each) for each in run()]}))
    return [kind(**each) for each in found.values["found"]]


def _composition(
    cache: ResultCache, run: Callable[[], tuple[list[Composed], dict[str, list[Tensor]]]]
) -> tuple[list[Composed], dict[str, list[Tensor]]]:
    def trial() -> TrialResult:
        composed, cells = run()
        return TrialResult({"found": [vars(each) for each in composed]}, _named(cells))

    found = cache.get("composition", trial)
    return [Composed(**each) for each in found.values["found"]], _rows(found.tensors)


def _add_photograph(report: Report, cache: ResultCache, name: str, run: Callable[[], Report]) -> None:
    """Add a photograph's scores; of the pictures, those of the first one."""

    def trial() -> TrialResult:
        own = run()
        return TrialResult({"found": [vars(each) for each in own.scores]}, _named(own.grid))

    found = cache.get(name, trial)
    report.scores += [Score(**each) for each in found.values["found"]]
    report.grid = report.grid or _rows(found.tensors)


def _named(rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {
        f"{number:03d}/{name}/{place:03d}": cell
        for number, (name, cells) in enumerate(rows.items())
        for place, cell in enumerate(cells)
    }


def _rows(named: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The inverse of `_named`."""
    rows: dict[str, list[Tensor]] = {}
    for name in sorted(named):
        rows.setdefault(name.split("/")[1], []).append(named[name])
    return rows


def as_markdown(found: Findings, seeds: Sequence[int], photographs: Sequence[str]) -> dict[str, str]:
    """Return section -> Markdown, for each of SECTIONS."""
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
    """Return every number, with its origin."""
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


def write_findings(found: Findings, sections: dict[str, str], seeds: Sequence[int], side: int, output: Path) -> None:
    """Write `suite.json`, `suite.md` and the pictures into a folder."""
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


def load_model(folder: str | None) -> tuple[EmbeddedModel, Path]:
    """Load a model as the editor computes, and return its folder; None: the one inside the package."""
    path = Path(folder) if folder else WEIGHTS
    return EmbeddedModel.from_pretrained(path, dtype=native_dtype()), path


def load_photographs(side: int, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Load test photographs; `names`: None for all."""
    found = load_test_photographs(side)
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise OpenwuError(f"--photograph: expected some of {sorted(found)}, got {unknown}")
    return {name: found[name] for name in names} if names else found


def evaluate(
    model_folder: str | None,
    photographs: dict[str, Tensor],
    seeds: Sequence[int],
    side: int,
    output: Path,
    *,
    shared_folder: str | None = None,
    card: Path | None = None,
) -> str:
    """Measure a model, write everything to `output`, fill in the card's tables, and return all tables.

    What an interrupted call had measured is found again in `output/trials`, unless model, pictures or code are others.

    shared_folder: the baseline's; None: `shared` in the model's folder, if there is one.
    """
    if card:  # A card without the marks is refused before the long work.
        filled(card, dict.fromkeys(SECTIONS, ""), "--card")
    model, folder = load_model(model_folder)
    baseline = Path(shared_folder) if shared_folder else folder / SHARED
    shared = Adapter.from_pretrained(baseline) if shared_folder or baseline.is_dir() else None
    if shared is not None:
        model.handle.check_targets(shared)
    depends = {
        "photographs": {name: picture_digest(each) for name, each in photographs.items()},
        "shared": None if shared is None else of_files(sorted(baseline.glob("*.safetensors"))).hexdigest(),
        "dtype": str(native_dtype()),
    }
    digits = fingerprint(depends, model, code=__name__)
    found = measure(model, shared, photographs, seeds, ResultCache(output / "trials" / f"suite-{digits}"))
    sections = as_markdown(found, seeds, sorted(photographs))
    write_findings(found, sections, seeds, side, output)
    if card:
        write_text(card, filled(card, sections, "--card"))
    return "".join(sections.values())
