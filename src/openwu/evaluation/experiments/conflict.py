"""Contradictory tasks on equal terms: one shared adapter, one per task, the whole base, and a generator.

For every method and task: PSNR, progress from the input towards the target, and retention of the base's old tasks.
Every method trains on the same requests in the same order for as many steps:

- `base`: nothing is trained; the base reads the instruction, as under every other method.
- `single`: one LoRA per task, given by the true task; an upper bound for adapters that do not depend on the picture.
- `retrieval`: the same bank, but the nearest training sentences choose.
- `shared`: one LoRA of the generator's rank for all tasks; `shared, wide`: one of a larger rank.
- `sft`: all of the base's weights.
- `generated`: condition encoder and generator, from nothing; `random`: noise as large as its adapters.

Shapes: b requests, t tasks, r LoRA rank, in / out widths of a target, h and w sides of a picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.cases import Case, draw_cases, edit
from openwu.evaluation.experiments.geometry import Mean, mean_over, random_like
from openwu.evaluation.experiments.methods import (
    FIRST_FLOOR,
    METHODS,
    SIDE,
    Budget,
    Method,
    fit,
    method_loss,
    new_method,
    retrieved,
    sampler,
)
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.evaluation.metrics import as_8bit, psnr, ssim
from openwu.evaluation.pictures import middle
from openwu.training.embedded.model import EmbeddedModel
from openwu.training.embedded.picture_stages import annealed_floor

CELL = 112
"""Side in pixels of a cell of the picture grid."""
SEARCH_SEED = 1_000
"""Seed of the trainings of the learning-rate search."""


@dataclass(frozen=True)
class Outcome:
    """The quality of one test request under one method."""

    method: str
    seed: int
    task: str
    photograph: str
    old: bool
    """Whether the base was trained on this task: then the outcome measures retention."""
    psnr: float
    ssim: float
    gain: float
    """dB over copying the input"""
    progress: float
    """Position of the output along the line from input to target: 1 is the target, 0 the input."""


@dataclass
class ConflictResults:
    """Outcomes and costs of all methods, and pictures of some requests."""

    outcomes: list[Outcome] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Method, seed, trained parameters, seconds, learning rates and the search behind them."""
    cells: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """New task -> "input", method or "target" -> `[3, s, s]` of the first photograph and seed."""

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(outcome.method for outcome in self.outcomes))

    def mean(self, method: str, metric: str = "psnr", old: bool = False) -> Mean:
        found = [each for each in self.outcomes if each.method == method and each.old == old]
        return mean_over([getattr(each, metric) for each in found], [each.task for each in found])

    def lead(self, method: str, other: str, old: bool = False) -> Mean:
        """Return the mean difference in dB between two methods, request by request."""
        ours, theirs = (
            {
                (each.seed, each.task, each.photograph): each.psnr
                for each in self.outcomes
                if each.method == name and each.old == old
            }
            for name in (method, other)
        )
        keys = sorted(ours)
        return mean_over([ours[key] - theirs[key] for key in keys], [key[1] for key in keys])

    def add(self, trial: TrialResult) -> None:
        """Add the results of one method with one seed; of the pictures, those of the first seed."""
        self.outcomes += [Outcome(**each) for each in trial.values["outcomes"]]
        self.costs.append(trial.values["cost"])
        for name, picture in trial.tensors.items():
            task, _, shown = name.partition("/")
            self.cells.setdefault(task, {}).setdefault(shown, picture)

    def table(self) -> str:
        """Return every method, best first, as plain text."""
        cost = {each["method"]: each for each in self.costs}
        old = any(each.old for each in self.outcomes)
        rows = [
            (
                method,
                str(self.mean(method)),
                str(self.mean(method, "gain")),
                f"{self.mean(method, 'progress').value:.2f}",
                "" if method == "generated" else str(self.lead("generated", method)),
                str(self.lead(method, "base", old=True)) if old else "",
                f"{cost[method]['parameters']:,}" if method in cost else "",
            )
            for method in sorted(self.methods, key=lambda each: self.mean(each).value, reverse=True)
        ]
        head = ("method", "new tasks, dB", "over the input", "progress", "generated minus it", "old tasks", "trained")
        return columns(head, rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "methods": [
                {
                    "method": method,
                    **{
                        f"{name}_{metric}": self.mean(method, metric, old).to_json()
                        for metric in ("psnr", "ssim", "gain", "progress")
                        for name, old in (("new", False), ("old", True))
                        if any(each.old == old for each in self.outcomes)
                    },
                }
                for method in self.methods
            ],
            "costs": self.costs,
            "outcomes": [vars(each) for each in self.outcomes],
        }


def conflict(
    model: EmbeddedModel,
    photographs: tuple[list[Photograph], list[Photograph]],
    test: dict[str, Tensor],
    tasks: Sequence[str],
    old_tasks: Sequence[str],
    budget: Budget,
    seeds: Sequence[int],
    cache: ResultCache = UNCACHED,
) -> ConflictResults:
    """Train every method with every seed and measure it on test photographs.

    photographs: (training, validation). old_tasks: what the base learned and no method trains on. cache: where results
    of finished trials are found again; a trial is one method's learning-rate search, or one method with one seed.
    """
    found = ConflictResults()

    def run(name: str, seed: int) -> TrialResult:
        search = partial(_search_rates, model, name, tasks, budget, photographs)
        rates, began = cache.get(f"rates of {name}", search).values, time.monotonic()
        method = new_method(model, name, tasks, budget, seed)
        batches = sampler(photographs[0], tasks, budget, seed)
        fit(method, batches, budget, budget.steps, rates["rates"], f"{name}, seed {seed}")
        cost = {
            "method": name,
            "seed": seed,
            "parameters": sum(p.numel() for p in method.trained.parameters() if p.requires_grad),
            "seconds": round(time.monotonic() - began, 1),
            **rates,
        }
        cases = [(case, False) for case in draw_cases(test, tasks, seed)]
        cases += [(case, True) for case in draw_cases(test, old_tasks, seed)] if old_tasks else []
        return _measure(method, cases, tasks, seed, cost)

    for seed in seeds:
        for name in METHODS:
            found.add(cache.get(f"{name}, seed {seed}", partial(run, name, seed)))
    return found


def _search_rates(
    model: EmbeddedModel,
    name: str,
    tasks: Sequence[str],
    budget: Budget,
    photographs: tuple[list[Photograph], list[Photograph]],
) -> TrialResult:
    """Search a method's learning rates: its own times the best factor, and every factor's validation loss.

    Searched with a seed of its own, once for all seeds.
    """
    plain = dict(new_method(model, name, tasks, budget, SEARCH_SEED).rates)
    tried = []
    for factor in budget.factors if len(budget.factors) > 1 else ():
        method = new_method(model, name, tasks, budget, SEARCH_SEED)
        rates = {key: value * factor for key, value in plain.items()}
        batches = sampler(photographs[0], tasks, budget, SEARCH_SEED)
        fit(method, batches, budget, budget.search_steps, rates, f"{name}, rates x {factor:g}")
        loss = _validation_loss(method, photographs[1], tasks, budget)
        tried.append({"factor": factor, "validation_loss": loss})
    best = min(tried, key=lambda each: each["validation_loss"])["factor"] if tried else budget.factors[0]
    return TrialResult({"rates": {key: value * best for key, value in plain.items()}, "search": tried})


def _validation_loss(method: Method, photographs: list[Photograph], tasks: Sequence[str], budget: Budget) -> float:
    """Average over two batches of every task, at the floor that a training ends with."""
    batches = PairSampler(photographs, tuple(tasks), ((len(tasks), budget.crop),), SIDE, 99)
    floor = annealed_floor(FIRST_FLOOR, 1.0)
    return sum(method_loss(method, batches.batch(step), floor) for step in range(2)) / 2


@torch.inference_mode()
def _measure(
    method: Method,
    cases: Sequence[tuple[Case, bool]],
    tasks: Sequence[str],
    seed: int,
    cost: dict[str, Any],
) -> TrialResult:
    """Measure the method on all requests, and the untrained methods that come with it."""
    outcomes: list[Outcome] = []
    cells: dict[str, Tensor] = {}
    for old in (False, True):
        some = [case for case, its in cases if its == old]
        if not some:
            continue
        served = method.serve(some)
        under = {method.name: served}
        if method.name == "single":
            under |= {"base": None, "retrieval": retrieved(method, some, tasks)}
        if method.name == "generated":
            assert served is not None
            under["random"] = random_like(served, torch.Generator().manual_seed(seed))
        for name, adapter in under.items():
            with torch.autocast("cpu", torch.bfloat16):
                edited = edit(method.model, some, adapter)
            for case, output in zip(some, edited, strict=True):
                outcomes.append(_outcome(name, seed, case, old, output))
                shown = {} if old else {"input": case.picture, name: output.float(), "target": case.target}
                for key, picture in shown.items():
                    cells.setdefault(f"{case.task}/{key}", middle(picture, CELL).clamp(0, 1))
    return TrialResult({"outcomes": [vars(each) for each in outcomes], "cost": cost}, cells)


def _outcome(method: str, seed: int, case: Case, old: bool, output: Tensor) -> Outcome:
    wanted, made = (case.target - case.picture).double(), (as_8bit(output) - case.picture).double()
    progress = float((made * wanted).sum() / wanted.square().sum().clamp(min=1e-12))
    quality, before = (float(psnr(each, case.target)) for each in (output, case.picture))
    similarity = ssim(output, case.target)
    return Outcome(method, seed, case.task, case.photograph, old, quality, similarity, quality - before, progress)
