"""Contradictory tasks on equal terms: what one shared adapter, one per task, the whole base, and a generator learn.

Enters: a model whose base is frozen, photographs, contradictory tasks. Leaves: for every method and task how close it
comes, how far it goes towards what was asked, and what is left of the base's old tasks.

Every method sees the same requests in the same order for as many steps:

- `base`: nothing is trained; the base reads the instruction, as under every other method.
- `single`: one LoRA per task, given by the true task; an upper bound for adapters that are not told the picture.
- `retrieval`: the same bank, but the nearest training sentences choose.
- `shared`: one LoRA of the generator's rank for all tasks; `shared, wide`: one of a larger rank.
- `sft`: all of the base's weights.
- `generated`: condition encoder and generator, from nothing; `random`: noise as large as what they write.

Shapes: b requests, t tasks, r LoRA rank, in / out widths of a target, h and w sides of a picture.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from openwu.data.suite.batches import PairSampler
from openwu.data.suite.photographs import Photograph
from openwu.evaluation.experiments.embedded import EmbeddedCase, answers, draw
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
)
from openwu.evaluation.experiments.results import Keep, Part, keep_nothing
from openwu.evaluation.pictures import middle
from openwu.evaluation.suite import psnr_of
from openwu.training.embedded.losses import falling_floor
from openwu.training.embedded.model import EmbeddedModel

CELL = 112
"""Side in pixels of a cell of the picture grid."""
SEARCH_SEED = 1_000
"""Seed of the trainings that learning rates are searched with."""


@dataclass(frozen=True)
class Outcome:
    """One test request under one method."""

    method: str
    seed: int
    task: str
    photograph: str
    old: bool
    """Whether the base was trained on this task: then it is about retention."""
    psnr: float
    ssim: float
    gain: float
    """dB over copying the input"""
    progress: float
    """How far along the line from input to target the answer lies: 1 is there, 0 nothing done."""


@dataclass
class Contest:
    """All that was found."""

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
        """Mean difference in dB between two methods, request by request."""
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

    def add(self, part: Part) -> None:
        """Take over what one method found with one seed; of the pictures, those of the first seed."""
        self.outcomes += [Outcome(**each) for each in part.values["outcomes"]]
        self.costs.append(part.values["cost"])
        for name, picture in part.tensors.items():
            task, _, shown = name.partition("/")
            self.cells.setdefault(task, {}).setdefault(shown, picture)

    def to_json(self) -> dict[str, Any]:
        return {
            "methods": [
                {
                    "method": method,
                    **{
                        f"{name}_{metric}": _plain(self.mean(method, metric, old))
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


def _plain(mean: Mean) -> dict[str, float]:
    return {"value": mean.value, "low": mean.low, "high": mean.high}


def conflict(
    model: EmbeddedModel,
    photographs: tuple[list[Photograph], list[Photograph]],
    test: dict[str, Tensor],
    tasks: Sequence[str],
    old_tasks: Sequence[str],
    budget: Budget,
    seeds: Sequence[int],
    keep: Keep = keep_nothing,
) -> Contest:
    """`photographs`: (training, validation). `old_tasks`: what the base learned and no method trains on.

    `keep`: where finished parts are found again; a part is one method's search, or one method with one seed.
    """
    found = Contest()

    def trained(name: str, seed: int) -> Part:
        search = partial(_searched, model, name, tasks, budget, photographs)
        rates, began = keep(f"rates of {name}", search).values, time.monotonic()
        method = new_method(model, name, tasks, budget, seed)
        fit(method, photographs[0], tasks, budget, budget.steps, rates["rates"], seed)
        cost = {
            "method": name,
            "seed": seed,
            "parameters": sum(p.numel() for p in method.trained.parameters() if p.requires_grad),
            "seconds": round(time.monotonic() - began, 1),
            **rates,
        }
        cases = [(case, False) for case in draw(test, tasks, seed)]
        cases += [(case, True) for case in draw(test, old_tasks, seed)] if old_tasks else []
        return _judged(method, cases, tasks, seed, cost)

    for seed in seeds:
        for name in METHODS:
            found.add(keep(f"{name}, seed {seed}", partial(trained, name, seed)))
    return found


def _searched(
    model: EmbeddedModel,
    name: str,
    tasks: Sequence[str],
    budget: Budget,
    photographs: tuple[list[Photograph], list[Photograph]],
) -> Part:
    """Learning rates for a method: its own times the best factor; and what every factor reached on validation.

    Searched with a seed of its own, once for all seeds.
    """
    plain = dict(new_method(model, name, tasks, budget, SEARCH_SEED).rates)
    tried = []
    for factor in budget.factors if len(budget.factors) > 1 else ():
        method = new_method(model, name, tasks, budget, SEARCH_SEED)
        rates = {key: value * factor for key, value in plain.items()}
        fit(method, photographs[0], tasks, budget, budget.search_steps, rates, SEARCH_SEED)
        loss = _validation_loss(method, photographs[1], tasks, budget)
        tried.append({"factor": factor, "validation_loss": loss})
    best = min(tried, key=lambda each: each["validation_loss"])["factor"] if tried else budget.factors[0]
    return Part({"rates": {key: value * best for key, value in plain.items()}, "search": tried})


@torch.no_grad()
def _validation_loss(method: Method, photographs: list[Photograph], tasks: Sequence[str], budget: Budget) -> float:
    """Over two batches of every task, at the floor that a training ends with."""
    batches = PairSampler(photographs, tuple(tasks), ((len(tasks), budget.crop),), SIDE, 99)
    return (
        sum(float(method_loss(method, batches.batch(step), falling_floor(FIRST_FLOOR, 1.0))) for step in range(2)) / 2
    )


@torch.inference_mode()
def _judged(
    method: Method,
    cases: Sequence[tuple[EmbeddedCase, bool]],
    tasks: Sequence[str],
    seed: int,
    cost: dict[str, Any],
) -> Part:
    """The method on all requests, and the untrained methods that come with it."""
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
                edited = answers(method.model, some, adapter)
            outcomes += [_outcome(name, seed, case, old, said) for case, said in zip(some, edited, strict=True)]
            for case, said in zip(some, edited, strict=True):
                shown = {} if old else {"input": case.picture, name: said.float(), "target": case.target}
                for key, picture in shown.items():
                    cells.setdefault(f"{case.edit}/{key}", middle(picture, CELL).clamp(0, 1))
    return Part({"outcomes": [vars(each) for each in outcomes], "cost": cost}, cells)


def _outcome(method: str, seed: int, case: EmbeddedCase, old: bool, edited: Tensor) -> Outcome:
    shown = (edited.float().clamp(0, 1) * 255).round() / 255
    wanted, made = (case.target - case.picture).double(), (shown - case.picture).double()
    psnr = psnr_of(edited, case.target)
    ssim = structural_similarity(shown.numpy(), case.target.numpy(), channel_axis=0, data_range=1.0)
    progress = float((made * wanted).sum() / wanted.square().sum().clamp(min=1e-12))
    gain = psnr - psnr_of(case.picture, case.target)
    return Outcome(method, seed, case.edit, case.photograph, old, psnr, float(ssim), gain, progress)
