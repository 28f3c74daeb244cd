"""Contradictory tasks on equal terms: one shared adapter, one per task, the whole base, and a generator.

For every method and task: PSNR, progress from the input towards the target, and retention of the base's old tasks.
Every method trains on the same requests in the same order for as many steps, or for as long (`Budget.clock`), with
rates searched for each. Tasks that the base had learned before are reported apart.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openwu.data.suite import BASE_EDITS
from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.errors import OpenwuError
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
    precision,
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
MOST_FACTORS = 8
"""Most factors that the search tries for an optimiser before a best one at an edge is taken as it is."""
PROBE_STEPS = 3
"""Updates by which a method's time is measured."""
CLOCKS = ("steps", "time")


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

    def mean(self, method: str, metric: str = "psnr", old: bool = False, among: Sequence[str] | None = None) -> Mean:
        """Average a method's outcomes; `among`: over these tasks alone."""
        found = [
            each
            for each in self.outcomes
            if each.method == method and each.old == old and (among is None or each.task in among)
        ]
        return mean_over([getattr(each, metric) for each in found], [each.task for each in found])

    def tasks(self, learned: bool) -> list[str]:
        """Return the trained tasks that the base had learned before, or those that it never had."""
        names = dict.fromkeys(each.task for each in self.outcomes if not each.old)
        return [name for name in names if (name in BASE_EDITS) == learned]

    def lead(self, method: str, other: str, old: bool = False, among: Sequence[str] | None = None) -> Mean:
        """Return the mean difference in dB between two methods, request by request."""
        ours, theirs = (
            {
                (each.seed, each.task, each.photograph): each.psnr
                for each in self.outcomes
                if each.method == name and each.old == old and (among is None or each.task in among)
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
        """Return every method, best first, as plain text; without tasks that the base never learned, over all."""
        new, again = self.tasks(learned=False) or self.tasks(learned=True), self.tasks(learned=True)
        cost: dict[str, list[dict[str, Any]]] = {}
        for each in self.costs:
            cost.setdefault(each["method"], []).append(each)
        old = any(each.old for each in self.outcomes)
        rows = [
            (
                method,
                str(self.mean(method, among=new)),
                str(self.mean(method, among=again)) if again else "",
                f"{self.mean(method, 'progress', among=new).value:.2f}",
                "" if method == "generated" else str(self.lead("generated", method, among=new)),
                str(self.lead(method, "base", old=True)) if old else "",
                *_costs(cost.get(method, [])),
            )
            for method in sorted(self.methods, key=lambda each: self.mean(each, among=new).value, reverse=True)
        ]
        head = (
            *("method", f"{len(new)} new tasks, dB", f"{len(again)} known ones, dB", "progress", "generated minus it"),
            *("old tasks", "trained", "steps", "seconds"),
        )
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
                    **{
                        f"{name}_psnr": self.mean(method, among=self.tasks(learned)).to_json()
                        for name, learned in (("never_learned", False), ("learned_before", True))
                        if self.tasks(learned)
                    },
                }
                for method in self.methods
            ],
            "costs": self.costs,
            "outcomes": [vars(each) for each in self.outcomes],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ConflictResults:
        """Read what `to_json` returned, without pictures: the table can be made again."""
        return cls([Outcome(**each) for each in stored["outcomes"]], list(stored["costs"]))


def _costs(costs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Format a method's trained parameters, steps and seconds, the means over seeds."""
    if not costs:
        return "", "", ""
    steps = [each["steps"] for each in costs if "steps" in each]
    seconds = sum(each.get("processor_seconds", each["seconds"]) for each in costs) / len(costs)
    mean_steps = f"{sum(steps) / len(steps):.0f}" if steps else ""
    return f"{costs[0]['parameters']:,}", mean_steps, f"{seconds:.0f}"


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
    if budget.clock not in CLOCKS:
        raise OpenwuError(f"clock: expected one of {list(CLOCKS)}, got {budget.clock!r}")
    found = ConflictResults()

    def timed(name: str) -> TrialResult:
        own, generated = (_step_seconds(model, each, tasks, budget, photographs[0]) for each in (name, "generated"))
        return TrialResult({"steps": max(1, round(budget.steps * generated / own))})

    def run(name: str, seed: int) -> TrialResult:
        search = partial(_search_rates, model, name, tasks, budget, photographs)
        rates, began = cache.get(f"rates of {name}", search).values, time.monotonic()
        steps = (
            budget.steps
            if budget.clock == "steps"
            else cache.get(f"steps of {name}", partial(timed, name)).values["steps"]
        )
        method = new_method(model, name, tasks, budget, seed)
        batches = sampler(photographs[0], tasks, budget, seed)
        processor = time.process_time()
        fit(method, batches, budget, steps, rates["rates"], f"{name}, seed {seed}")
        cost = {
            "method": name,
            "seed": seed,
            "parameters": sum(p.numel() for p in method.trained.parameters() if p.requires_grad),
            "steps": steps,
            "seconds": round(time.monotonic() - began, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
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
    fresh = new_method(model, name, tasks, budget, SEARCH_SEED)
    if len(budget.factors) == 1:
        return TrialResult(
            {"rates": {key: value * budget.factors[0] for key, value in fresh.rates.items()}, "search": []}
        )

    def loss(optimiser: str, plain: Mapping[str, float], factor: float) -> float:
        method = new_method(model, name, tasks, budget, SEARCH_SEED)
        rates = {key: value * factor for key, value in plain.items()}
        batches = sampler(photographs[0], tasks, budget, SEARCH_SEED)
        fit(method, batches, budget, budget.search_steps, rates, f"{name}, {optimiser}, rates x {factor:g}")
        return _validation_loss(method, photographs[1], tasks, budget)

    tried: list[dict[str, Any]] = []
    for optimiser, plain in fresh.choices.items():
        losses = searched(partial(loss, optimiser, plain), budget.factors)
        tried += [
            {
                "optimiser": optimiser,
                "factor": factor,
                "validation_loss": found,
                "rates": {key: value * factor for key, value in plain.items()},
            }
            for factor, found in losses.items()
        ]
    best = min(tried, key=lambda each: each["validation_loss"])
    return TrialResult({"rates": best["rates"], "optimiser": best["optimiser"], "search": tried})


def searched(loss: Callable[[float], float], factors: Sequence[float]) -> dict[float, float]:
    """Try factors, and go on beyond an edge, doubling or halving, as long as the best one lies there.

    Returns factor -> loss in rising order; after MOST_FACTORS the best one may still be at an edge.
    """
    tried = {factor: loss(factor) for factor in factors}
    while len(tried) < MOST_FACTORS:
        best = min(tried, key=lambda factor: tried[factor])
        if best == max(tried):
            following = 2 * best
        elif best == min(tried):
            following = best / 2
        else:
            break
        tried[following] = loss(following)
    return dict(sorted(tried.items()))


def _step_seconds(
    model: EmbeddedModel, name: str, tasks: Sequence[str], budget: Budget, photographs: list[Photograph]
) -> float:
    """Measure the processor seconds of a method's update."""
    batches = sampler(photographs, tasks, budget, SEARCH_SEED)
    began = 0.0
    for steps in (1, PROBE_STEPS):  # The first one warms up.
        method = new_method(model, name, tasks, budget, SEARCH_SEED)
        began = time.process_time()
        fit(method, batches, budget, steps, method.rates, f"{name}, timed")
    return (time.process_time() - began) / PROBE_STEPS


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
            with precision():
                edited = edit(method.model, some, adapter)
            for case, output in zip(some, edited, strict=True):
                outcomes.append(outcome(name, seed, case, old, output))
                shown = {} if old else {"input": case.picture, name: output.float(), "target": case.target}
                for key, picture in shown.items():
                    cells.setdefault(f"{case.task}/{key}", middle(picture, CELL).clamp(0, 1))
    return TrialResult({"outcomes": [vars(each) for each in outcomes], "cost": cost}, cells)


def outcome(method: str, seed: int, case: Case, old: bool, output: Tensor) -> Outcome:
    wanted, made = (case.target - case.picture).double(), (as_8bit(output) - case.picture).double()
    progress = float((made * wanted).sum() / wanted.square().sum().clamp(min=1e-12))
    quality, before = (float(psnr(each, case.target)) for each in (output, case.picture))
    similarity = ssim(output, case.target)
    return Outcome(method, seed, case.task, case.photograph, old, quality, similarity, quality - before, progress)
