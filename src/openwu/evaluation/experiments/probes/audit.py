"""Audit of a generator: does the condition matter? The same requests under adapters that know less and less of them.

The rungs of the ladder: `none`, the base alone; `random`, noise of the generated size; `average`, the mean of all
updates; `other task`; `same task`, generated for another request of the task; the subject's variants; `matched`. A
generator that reads its condition has matched > same task > other task; one that ignores it has them all alike.

A `Subject` is any generator with any base, a hypernetwork of the user's own included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

from openwu.errors import OpenwuError
from openwu.evaluation.experiments.geometry import Mean, cosines, mean_over, mean_update, random_like
from openwu.evaluation.experiments.results import columns
from openwu.types import Adapter

CaseT = TypeVar("CaseT")
"""A request with its known answer; only the subject's own functions look into it."""
BATCH = 8
"""Cases whose adapters are generated at once."""
STRONG = 0.5
"""A generator is conditional if another task's adapter loses at least this part of what the matched one gains."""


@dataclass(frozen=True)
class Subject(Generic[CaseT]):
    """A generator with its base, and requests with known answers to examine them on."""

    name: str
    """Shown in tables and stored with the numbers."""
    cases: Sequence[CaseT]
    """Requests that no training saw; at least two of each of at least two tasks."""
    tasks: Sequence[str]
    """The task of every case."""
    adapt: Callable[[Sequence[CaseT]], Adapter]
    """Adapters for some cases, one sample each."""
    score: Callable[[Sequence[CaseT], Adapter | None], Sequence[float]]
    """How good the base's answers are, higher is better: with one adapter per case, one for all, or none."""
    unit: str = "score"
    """What a score is measured in."""
    variants: Mapping[str, Callable[[CaseT, torch.Generator], CaseT]] = field(default_factory=dict)
    """Name -> a change of the generator's request, for instance random words. The base's own request and the score
    stay the case's: only the adapter is generated from the variant."""

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.cases):
            raise OpenwuError(f"tasks: expected one for each of {len(self.cases)} cases, got {len(self.tasks)}")
        alone = sorted({task for task in self.tasks if list(self.tasks).count(task) < 2})
        if alone or len(set(self.tasks)) < 2:
            raise OpenwuError(
                "cases: expected at least two of each of at least two tasks, to swap adapters within and across tasks; "
                f"got {len(set(self.tasks))} tasks, with a single case for {alone or 'none'}"
            )


@dataclass(frozen=True)
class Ladder:
    """Scores of every case on every rung, and how alike the adapters are."""

    subject: str
    unit: str
    tasks: tuple[str, ...]
    """Task of every score, seed by seed."""
    scores: dict[str, list[float]]
    """Rung -> score of every case, seed by seed."""
    within: float
    """Mean cosine between adapters of one task"""
    across: float
    """Mean cosine between adapters of different tasks"""

    def mean(self, rung: str) -> Mean:
        """Return the mean score of a rung."""
        return mean_over(self.scores[rung], self.tasks)

    def lead(self, rung: str) -> Mean:
        """Return by how much matched adapters beat those of a rung, case by case."""
        pairs = zip(self.scores["matched"], self.scores[rung], strict=True)
        return mean_over([matched - other for matched, other in pairs], self.tasks)

    @property
    def dependence(self) -> float:
        """Which part of the matched adapters' gain over the base is lost with another task's adapter."""
        gain = self.lead("none").value
        return self.lead("other task").value / gain if gain > 0 else float("nan")

    @property
    def verdict(self) -> str:
        """conditional, weakly conditional, collapsed or useless, with the numbers behind it."""
        gain, lead = self.lead("none"), self.lead("other task")
        if not gain.positive:
            word = "useless"
        elif not lead.positive:
            word = "collapsed"
        else:
            word = "conditional" if self.dependence >= STRONG else "weakly conditional"
        return (
            f"{word}: matched adapters gain {gain} {self.unit} over the base, and beat those of another task by "
            f"{lead}; cosine {self.within:.2f} within a task, {self.across:.2f} across"
        )

    def table(self) -> str:
        """Return the rungs, best first, and the verdict as plain text."""
        rungs = sorted(self.scores, key=lambda rung: self.mean(rung).value, reverse=True)
        rows = [(rung, str(self.mean(rung)), "" if rung == "matched" else str(self.lead(rung))) for rung in rungs]
        return columns(("adapter", f"mean score, {self.unit}", "matched minus it"), rows) + f"\n{self.verdict}\n"

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        rungs = [
            {"rung": rung, **self.mean(rung).named("mean"), **self.lead(rung).named("matched_minus")}
            for rung in self.scores
        ]
        return {
            "subject": self.subject,
            "unit": self.unit,
            "verdict": self.verdict,
            "cosine_within": self.within,
            "cosine_across": self.across,
            "rungs": rungs,
            "tasks": list(self.tasks),
            "scores": {rung: [float(f"{value:.6g}") for value in values] for rung, values in self.scores.items()},
        }


@torch.inference_mode()
def audit(subject: Subject[CaseT], seeds: Sequence[int] = (0, 1, 2)) -> Ladder:
    """Score every rung of the ladder. Seeds draw which cases swap adapters, random adapters and variants."""
    adapters = generate(subject, subject.cases)
    alike = cosines(adapters)
    same = torch.tensor([[one == other for other in subject.tasks] for one in subject.tasks])
    itself = torch.eye(len(subject.tasks), dtype=torch.bool)
    scores: dict[str, list[float]] = {}
    rungs = 6 + len(subject.variants)
    with tqdm(total=rungs * len(seeds), desc="audit", unit="rung") as bar:
        for seed in seeds:
            for rung, adapter in _rungs(subject, adapters, seed):
                # What no seed changes is computed once.
                fixed = rung in ("none", "average", "matched") and rung in scores
                found = scores[rung][: len(subject.cases)] if fixed else list(subject.score(subject.cases, adapter))
                scores.setdefault(rung, []).extend(found)
                bar.update()
    return Ladder(
        subject.name,
        subject.unit,
        tuple(subject.tasks) * len(seeds),
        scores,
        float(alike[same & ~itself].mean()),
        float(alike[~same].mean()),
    )


def generate(subject: Subject[CaseT], cases: Sequence[CaseT]) -> Adapter:
    """Generate the adapters of all cases, a few at a time."""
    return Adapter.stack([subject.adapt(cases[i : i + BATCH]) for i in range(0, len(cases), BATCH)])


def _rungs(subject: Subject[CaseT], adapters: Adapter, seed: int) -> Iterator[tuple[str, Adapter | None]]:
    generator = torch.Generator().manual_seed(seed)
    yield "none", None
    yield "random", random_like(adapters, generator)
    yield "average", mean_update(adapters)
    yield "other task", adapters.select(_partners(subject.tasks, generator, same=False))
    yield "same task", adapters.select(_partners(subject.tasks, generator, same=True))
    for name, vary in subject.variants.items():
        yield name, generate(subject, [vary(case, generator) for case in subject.cases])
    yield "matched", adapters


def _partners(tasks: Sequence[str], generator: torch.Generator, same: bool) -> list[int]:
    """Draw for every case another one, among those of its task or of other tasks."""
    partners = []
    for i, task in enumerate(tasks):
        choices = [j for j, other in enumerate(tasks) if (other == task) == same and j != i]
        partners.append(choices[int(torch.randint(len(choices), (), generator=generator))])
    return partners
