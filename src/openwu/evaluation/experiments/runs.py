"""Run an experiment on the embedded model and write its results: JSON with every number, a picture, and a table."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.base import native_dtype
from openwu.backbones.embedded.config import WEIGHTS
from openwu.data.suite import BASE_EDITS, CONTRADICTORY_PAIRS, EDITS, FAMILIES
from openwu.data.suite.photographs import Photograph, folder_hashes, load_folder, load_test_photographs
from openwu.editor.editor import Editor
from openwu.errors import OpenwuError
from openwu.evaluation.cases import Case, draw_cases, first_phrase, generate, score
from openwu.evaluation.experiments.comparisons.conflict import ConflictResults, conflict
from openwu.evaluation.experiments.comparisons.continual import ContinualResults, continual
from openwu.evaluation.experiments.comparisons.operators import KINDS as OPERATOR_KINDS
from openwu.evaluation.experiments.comparisons.operators import OperatorResults, kinds_of, operators
from openwu.evaluation.experiments.comparisons.own_pairs import LOOKS, WAYS, OwnPairsResults, own_pairs
from openwu.evaluation.experiments.comparisons.scaling import BASE_WIDTHS, GENERATOR_SIZES, Scaling, scaling
from openwu.evaluation.experiments.comparisons.shown import ShownConflict, shown_conflict
from openwu.evaluation.experiments.comparisons.shown_requests import draw_tasks
from openwu.evaluation.experiments.methods import NATIVE_BF16, Budget
from openwu.evaluation.experiments.pictures import (
    draw_cells,
    draw_conflict,
    draw_continual,
    draw_examples,
    draw_gradient_curves,
    draw_gradients,
    draw_ladder,
    draw_map,
    draw_methods,
    draw_operators,
    draw_scaling,
)
from openwu.evaluation.experiments.probes.audit import Subject, audit
from openwu.evaluation.experiments.probes.examples import draw_trials, example_edits
from openwu.evaluation.experiments.probes.gradients import conflicts_table, generator_conflict, shared_conflicts
from openwu.evaluation.experiments.probes.manifold import manifold
from openwu.evaluation.experiments.probes.understood import shown_json, shown_programs, threshold_table
from openwu.evaluation.experiments.probes.video import CHOSEN, make_clips, video
from openwu.evaluation.experiments.results import ResultCache, write_findings
from openwu.evaluation.pictures import middle
from openwu.files.fingerprint import fingerprint
from openwu.training.embedded.example_stage import shown_parts
from openwu.training.embedded.model import EmbeddedModel

QUICK_PHOTOGRAPHS = ("astronaut", "coffee", "flower")
QUICK_EDITS = tuple(name for pair in CONTRADICTORY_PAIRS[:8] for name in pair)
PAIRED = tuple(name for pair in CONTRADICTORY_PAIRS for name in pair)
TASKS = ("named", "examples")
"""What the conflict's tasks are."""
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
OPERATORS, QUICK_OPERATORS = Budget(steps=300), Budget(steps=40, requests=8)
GROUP_BUDGET, QUICK_GROUP_BUDGET = Budget(steps=60), Budget(steps=25)
SHOWN, QUICK_SHOWN = Budget(steps=600, requests=16), Budget(steps=80, requests=6)
UNSEEN, QUICK_UNSEEN = 40, 9
"""Programs per seed that the conflict on edits by example is measured on."""
PROGRAMS, QUICK_PROGRAMS = 40, 8
"""Programs per seed that are shown by example."""
PAIRS_STEPS, QUICK_PAIRS_STEPS = 120, 40
CLIP_FRAMES, CLIP_SIDES = 8, ((240, 426), (480, 854), (720, 1280), (1080, 1920))
"""Frames of a test clip, and the sizes (h, w) at which frames per second are measured."""
QUICK_OLD = 4
"""How many of the base's old tasks a quick run looks at."""


@dataclass(frozen=True)
class LabSettings:
    """The settings of an experiment; they are written with its results."""

    quick: bool = False
    """Fewer photographs and sub-tasks, shorter trainings."""
    model: str | None = None
    """Folder of a model; None: the one inside the package."""
    output: str = "runs/lab"
    side: int = 256
    """Longest side of a test photograph."""
    seeds: tuple[int, ...] = (0, 1, 2)
    edits: tuple[str, ...] | None = None
    """Sub-tasks; None: the experiment's own choice."""
    photos: str = "photos"
    """Folder of training photographs."""
    steps: int | None = None
    """Length of every training; None: the budget's."""
    axis: str | None = None
    """Scaling: vary only this; None: both."""
    along: tuple[int, ...] | None = None
    """Gradients: numbers of steps after which they are compared, for a curve; None: the first and the last."""
    tasks: str = "named"
    """Conflict: edits that have names, or "examples", programs that are shown by pairs."""
    clock: str = "steps"
    """Conflict: what is equal for all methods, see `Budget.clock`; of examples both are measured."""
    batch: tuple[int, int] | None = None
    """Requests of every training step, and the side of their crops; None: the budget's."""
    search: int | None = None
    """Conflict: search learning rates by trainings of so many steps; None: as the budget says."""
    methods: tuple[str, ...] | None = None
    """Conflict of examples: only these methods."""
    ways: tuple[str, ...] | None = None
    """Own pairs: only these ways of teaching."""
    looks: tuple[str, ...] | None = None
    """Own pairs: only these looks."""
    operators: tuple[str, ...] | None = None
    """Operators: only these, "OPERATOR" or "OPERATOR:RANK"; None: all that the experiment compares."""

    def __post_init__(self) -> None:
        for name, known in (("way", WAYS), ("look", LOOKS)):
            other = sorted(set(getattr(self, f"{name}s") or ()) - set(known))
            if other:
                raise OpenwuError(f"--{name}: expected some of {list(known)}, got {other}")
        unknown = sorted(set(self.edits or ()) - set(EDITS))
        if unknown:
            raise OpenwuError(f"--edit: expected some of {list(EDITS)}, got {unknown}")
        if self.along is not None and (min(self.along) < 0 or len(set(self.along)) < len(self.along)):
            raise OpenwuError(f"--along: expected different numbers of steps, none below 0, got {list(self.along)}")

    @property
    def chosen_edits(self) -> tuple[str, ...]:
        """The given sub-tasks, or those of quick and of full runs."""
        return self.edits or (QUICK_EDITS if self.quick else tuple(EDITS))

    @property
    def paired_edits(self) -> tuple[str, ...]:
        """The given sub-tasks, or those of contradictory pairs."""
        return self.edits or (PAIRED[:8] if self.quick else PAIRED)

    def load_model(self, **options: Any) -> EmbeddedModel:
        """Load the model; options are those of `from_pretrained`."""
        return EmbeddedModel.from_pretrained(Path(self.model) if self.model else WEIGHTS, **options)

    def test_photographs(self) -> dict[str, Tensor]:
        """Load the test photographs."""
        found = load_test_photographs(self.side)
        return {name: found[name] for name in QUICK_PHOTOGRAPHS} if self.quick else found

    def squares(self) -> dict[str, Tensor]:
        """Load squares of the trainings' proportions `[3, side, side]`, out of photographs half as large again."""
        found = load_test_photographs(self.side * 3 // 2)
        return {name: middle(each, self.side) for name, each in found.items() if min(each.shape[1:]) >= self.side}

    def training_photographs(self) -> list[Photograph]:
        """Load the training photographs."""
        return load_folder(Path(self.photos))

    def shortened(self, budget: Budget) -> Budget:
        """Return the budget with the given `steps`, `batch` and `search`."""
        if self.steps is not None:
            search_steps = min(budget.search_steps, max(1, self.steps // 5))
            budget = dataclasses.replace(budget, steps=self.steps, search_steps=search_steps)
        if self.batch is not None:
            budget = dataclasses.replace(budget, requests=self.batch[0], crop=self.batch[1])
        if self.search is not None:
            budget = dataclasses.replace(budget, factors=BUDGET.factors, search_steps=self.search)
        return budget

    def to_json(self, **more: object) -> dict[str, object]:
        """Return the settings as they are written with results."""
        return {**dataclasses.asdict(self), "model": self.model or "embedded", "edits": self.chosen_edits, **more}

    def write(self, name: str, found: Mapping[str, Any], **more: object) -> Path:
        """Write results with the settings to `NAME.json`; return the path without its suffix."""
        path = Path(self.output) / name
        write_findings(path.with_suffix(".json"), self.to_json(what=name, **more), found)
        return path

    def cache(self, name: str, model: EmbeddedModel, **more: object) -> ResultCache:
        """Return the cache of an experiment's trials; its name depends on everything that they do but their seed."""
        # "quick" counts: it chooses the test photographs, also where --edit and --steps determine all else.
        ignored = ("seeds", "output", "axis", "along", "methods", "ways", "looks", "operators")
        relevant = {key: value for key, value in self.to_json(**more).items() if key not in ignored}
        relevant["bf16"] = NATIVE_BF16
        relevant["photos"] = folder_hashes(Path(self.photos))
        code = f"openwu.evaluation.experiments.comparisons.{name}"
        digits = fingerprint(relevant, model, code=code)
        return ResultCache(Path(self.output) / "trials" / f"{name}-{digits}")


def run_audit(settings: LabSettings) -> str:
    """Audit the model; return the table."""
    # In the editor's dtype: an audit is of the model as it edits.
    model = settings.load_model(dtype=native_dtype())
    found = audit(embedded_subject(model, settings.test_photographs(), settings.chosen_edits), settings.seeds)
    draw_ladder(found, settings.write("audit", found.to_json()).with_suffix(".png"))
    return found.table()


def run_manifold(settings: LabSettings) -> str:
    """Map the model's adapters; return the table."""
    model = settings.load_model(dtype=native_dtype())
    subject = embedded_subject(model, settings.test_photographs(), settings.chosen_edits)
    found = manifold(subject, [case.photograph for case in subject.cases], settings.seeds)
    families = {name: [edit.name for edit in edits] for name, edits in FAMILIES.items()}
    draw_map(found, families, settings.write("manifold", found.to_json()).with_suffix(".png"))
    return found.table()


def run_gradients(settings: LabSettings) -> str:
    """Compare the tasks' gradients in a shared LoRA and in the generator; return the table."""
    tasks = settings.chosen_edits
    opposites = [pair for pair in CONTRADICTORY_PAIRS if set(pair) <= set(tasks)]
    if not opposites:
        raise OpenwuError("--edit: expected both sides of at least one contradictory pair, such as warm and cool")
    model, photographs = settings.load_model(), settings.training_photographs()
    steps = tuple(sorted(settings.along or (QUICK_STEPS if settings.quick else STEPS)))
    found = [
        *shared_conflicts(model, photographs, tasks, opposites, steps, settings.seeds),
        *shared_conflicts(model, photographs, tasks, opposites, steps, settings.seeds, base_reads_instruction=False),
        generator_conflict(model, photographs, tasks, opposites, settings.seeds),
    ]
    numbers = {"tasks": list(tasks), "opposites": opposites, "found": [each.to_json() for each in found]}
    name, draw = ("gradients", draw_gradients) if settings.along is None else ("gradients-along", draw_gradient_curves)
    draw(found, settings.write(name, numbers, steps=steps).with_suffix(".png"))
    return conflicts_table(found)


def run_conflict(settings: LabSettings) -> str:
    """Train and compare all methods on contradictory tasks, or on edits that are on no list; return the table."""
    if settings.tasks == "examples":
        return _run_shown_conflict(settings)
    if settings.methods:
        raise OpenwuError("--method: it is read with --tasks examples alone; leave it out")
    tasks = settings.paired_edits
    old = [name for name in BASE_EDITS if name not in PAIRED and name not in tasks]
    old = old[:QUICK_OLD] if settings.quick else old
    budget = settings.shortened(QUICK_BUDGET if settings.quick else BUDGET)
    budget = dataclasses.replace(budget, clock=settings.clock)
    photographs = (settings.training_photographs(), load_folder(Path(settings.photos), validation=True))
    model, test = settings.load_model(), settings.test_photographs()
    more = {"edits": tasks, "old": old, "budget": vars(budget)}
    cache = settings.cache("conflict", model, **more)
    found = conflict(model, photographs, test, tasks, old, budget, settings.seeds, cache)
    path = settings.write("conflict", found.to_json(), **more)
    draw_conflict(found, path.with_suffix(".png"))
    draw_cells(found, path.with_suffix(".jpg"))
    return found.table()


def _run_shown_conflict(settings: LabSettings) -> str:
    if settings.edits or settings.search or settings.clock != "steps":
        raise OpenwuError("--tasks examples: it does not read --edit, --search and --clock; leave them out")
    budget = settings.shortened(QUICK_SHOWN if settings.quick else SHOWN)
    model = settings.load_model()
    shown_parts(model)  # A model without examples is refused before the long reading of photographs.
    photographs = settings.squares()
    if settings.quick:
        photographs = {name: photographs[name] for name in QUICK_PHOTOGRAPHS}
    count = QUICK_UNSEEN if settings.quick else UNSEEN
    more: dict[str, Any] = {"edits": None, "programs": count, "budget": vars(budget)}
    cache, training = settings.cache("shown", model, **more), settings.training_photographs
    tasks = partial(draw_tasks, photographs, count)
    found = shown_conflict(model, training, tasks, budget, settings.seeds, cache, settings.methods)
    path = settings.write("conflict_examples", found.to_json(), **more)
    draw_methods(found, path.with_suffix(".png"))
    draw_cells(found, path.with_suffix(".jpg"))
    return found.table()


def run_continual(settings: LabSettings) -> str:
    """Train all strategies on one group of tasks after another; return the table."""
    groups = QUICK_GROUPS if settings.quick else GROUPS
    if settings.edits:
        groups = tuple((edit,) for edit in settings.edits)
    if len(groups) < 2:
        raise OpenwuError(f"--edit: expected at least two sub-tasks, to be learned one after another, got {groups}")
    budget = settings.shortened(QUICK_GROUP_BUDGET if settings.quick else GROUP_BUDGET)
    model, photographs = settings.load_model(), settings.training_photographs()
    more = {"edits": None, "groups": groups, "budget": vars(budget)}
    cache = settings.cache("continual", model, **more)
    found = continual(model, photographs, settings.test_photographs(), groups, budget, settings.seeds, cache)
    draw_continual(found, settings.write("continual", found.to_json(), **more).with_suffix(".png"))
    return found.table()


def run_scaling(settings: LabSettings) -> str:
    """Train generators and bases of several sizes; return the table."""
    tasks = settings.paired_edits
    base_tasks = [name for name in BASE_EDITS if name not in tasks]
    budget, base_steps = (QUICK_SCALING, 60) if settings.quick else (SCALING, 600)
    budget, base_steps = settings.shortened(budget), base_steps if settings.steps is None else 2 * settings.steps
    sizes = () if settings.axis == "base" else GENERATOR_SIZES[: 3 if settings.quick else None]
    widths = () if settings.axis == "generator" else BASE_WIDTHS[: 2 if settings.quick else None]
    model, photographs = settings.load_model(), settings.training_photographs()
    more = {"edits": tasks, "budget": vars(budget), "base_steps": base_steps}
    cache, test = settings.cache("scaling", model, **more), settings.test_photographs()
    found = scaling(
        model, photographs, test, tasks, base_tasks, budget, base_steps, settings.seeds, sizes, widths, cache
    )
    draw_scaling(found, settings.write("scaling", found.to_json(), **more).with_suffix(".png"))
    return found.table()


def run_examples(settings: LabSettings) -> str:
    """Show edits by pairs of pictures; return the table."""
    model = settings.load_model(dtype=native_dtype())
    photographs = settings.squares()
    count = QUICK_PROGRAMS if settings.quick else PROGRAMS
    trials = [trial for seed in settings.seeds for trial in draw_trials(list(photographs), count, settings.side, seed)]
    found = example_edits(model, photographs, trials)
    path = settings.write("examples", found.to_json(), programs=count)
    draw_examples(found, path.with_suffix(".jpg"))
    return found.table()


def run_understood(settings: LabSettings) -> str:
    """Measure what the editor's check of examples accepts, on photographs kept back; return the table."""
    model = settings.load_model(dtype=native_dtype())
    photographs = load_folder(Path(settings.photos), validation=True)
    count = QUICK_PROGRAMS if settings.quick else 3 * PROGRAMS
    shown = [each for seed in settings.seeds for each in shown_programs(model, photographs, count, settings.side, seed)]
    settings.write("understood", {"understood": shown_json(shown)}, programs=count)
    return threshold_table(shown)


def run_operators(settings: LabSettings) -> str:
    """Train a generator for every operator on edits that the base does not know; return the table."""
    tasks = settings.edits or tuple(name for name in PAIRED if name not in BASE_EDITS)[: 8 if settings.quick else None]
    budget = settings.shortened(QUICK_OPERATORS if settings.quick else OPERATORS)
    kinds = OPERATOR_KINDS if settings.operators is None else kinds_of(settings.operators)
    model, photographs = settings.load_model(), settings.training_photographs()
    more = {"edits": tasks, "budget": vars(budget)}
    cache, test = settings.cache("operators", model, **more), settings.test_photographs()
    found = operators(model, photographs, test, tasks, budget, settings.seeds, kinds, cache=cache)
    draw_operators(found, settings.write("operators", found.to_json(), **more).with_suffix(".png"))
    return found.table()


def run_own_pairs(settings: LabSettings) -> str:
    """Teach a look of one's own with and without guards for the known edits; return the table."""
    steps = settings.steps or (QUICK_PAIRS_STEPS if settings.quick else PAIRS_STEPS)
    model, photographs = settings.load_model(), settings.training_photographs()
    cache, test = settings.cache("own_pairs", model, steps=steps), settings.test_photographs()
    ways, looks = settings.ways or tuple(WAYS), settings.looks or tuple(LOOKS)
    found = own_pairs(model, photographs, test, steps, settings.seeds, ways, looks, cache)
    settings.write("own_pairs", found.to_json(), steps=steps, ways=ways, looks=looks)
    return found.table()


def run_video(settings: LabSettings) -> str:
    """Edit clips by one adapter, by one for each frame and with new noise for each; return the table."""
    edits = settings.edits or (CHOSEN[:2] if settings.quick else CHOSEN)
    chosen = {name: photo for name, photo in load_test_photographs(settings.side).items() if name in QUICK_PHOTOGRAPHS}
    clips = make_clips(chosen, 4 if settings.quick else CLIP_FRAMES, settings.seeds[0])
    sides = () if settings.quick else CLIP_SIDES
    sizes = [F.interpolate(chosen["flower"][None], size, mode="bicubic")[0].clamp(0, 1) for size in sides]
    editor = Editor.from_pretrained(settings.model)
    found = video(editor, clips, edits, settings.seeds[0], sizes)
    settings.write("video", found.to_json(), edits=edits, seeds=settings.seeds[:1])
    return found.table()


EXPERIMENTS: dict[str, Callable[[LabSettings], str]] = {
    "conflict": run_conflict,
    "continual": run_continual,
    "examples": run_examples,
    "understood": run_understood,
    "gradients": run_gradients,
    "manifold": run_manifold,
    "operators": run_operators,
    "own-pairs": run_own_pairs,
    "scaling": run_scaling,
    "video": run_video,
}
"""Name -> the function that runs it and returns its table. One line adds an experiment."""


STORED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "conflict": lambda stored: (ShownConflict if "tasks" in stored else ConflictResults).from_json(stored).table(),
    "continual": lambda stored: ContinualResults.from_json(stored).table(),
    "operators": lambda stored: OperatorResults.from_json(stored).table(),
    "own-pairs": lambda stored: OwnPairsResults.from_json(stored).table(),
    "scaling": lambda stored: Scaling.from_json(stored).table(),
}
"""Experiment -> its table out of a result file that holds every number of it."""


def stored_table(name: str, path: Path) -> str:
    """Return an experiment's table out of a file that it wrote. Raises OpenwuError for another file."""
    if name not in STORED:
        raise OpenwuError(f"--from: expected one of {list(STORED)}, whose files hold every number, got {name}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return STORED[name](stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpenwuError(f"--from: expected a result file of openwu lab {name} at {path}: {error!r}") from error


def embedded_subject(
    model: EmbeddedModel, photographs: dict[str, Tensor], tasks: Sequence[str], seed: int = 0
) -> Subject[Case]:
    """Make a subject of every task on every photograph; languages and phrasings alternate as in the edit suite."""
    cases = draw_cases(photographs, tasks, seed)
    return Subject(
        name="embedded",
        cases=cases,
        tasks=[case.task for case in cases],
        adapt=lambda some: generate(model, some),
        score=lambda some, adapter: score(model, some, adapter),
        unit="dB",
        variants=variants(cases),
    )


def variants(cases: Sequence[Case]) -> dict[str, Callable[[Case, torch.Generator], Case]]:
    """Return changes of the generator's request: random letters, another task's words, another photograph."""

    def random_words(case: Case, generator: torch.Generator) -> Case:
        letters = torch.randint(26, (24,), generator=generator).tolist()
        return dataclasses.replace(
            case, instruction="".join(string.ascii_lowercase[i] + " " * (i % 5 == 0) for i in letters)
        )

    def other_words(case: Case, generator: torch.Generator) -> Case:
        others = sorted({each.task for each in cases} - {case.task})
        task = others[int(torch.randint(len(others), (), generator=generator))]
        return dataclasses.replace(case, instruction=first_phrase(task, case.language))

    def other_picture(case: Case, generator: torch.Generator) -> Case:
        others = [each for each in cases if each.task == case.task and each.photograph != case.photograph]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        return dataclasses.replace(case, pictures=other.pictures)

    found: dict[str, Callable[[Case, torch.Generator], Case]]
    found = {"random words": random_words, "other words": other_words}
    if len({case.photograph for case in cases}) > 1:
        found["other picture"] = other_picture
    return found
