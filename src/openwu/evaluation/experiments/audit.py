"""Does the condition matter? The same requests under adapters that know less and less of them.

Enters: a `Subject`. Leaves: a ladder of scores with intervals, similarities of adapters, and a verdict in one line.

The rungs: `none`, the base alone; `random`, noise of the generated size; `average`, the mean of all updates; `other
task`; `same task`, written for another request of the task; what the subject's variants say; `matched`. A generator
that reads its condition has matched > same task > other task; one that ignores it has them all alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from openwu.evaluation.experiments.geometry import Mean, cosines, mean_over, mean_update, random_like
from openwu.evaluation.experiments.subject import Case, Subject
from openwu.types import Adapter

BATCH = 8
"""Cases whose adapters are generated at once."""
STRONG = 0.5
"""A generator is conditional if another task's adapter loses at least this part of what the matched one gains."""


@dataclass(frozen=True)
class Ladder:
    """What an audit found."""

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
        return mean_over(self.scores[rung], self.tasks)

    def lead(self, rung: str) -> Mean:
        """By how much matched adapters beat those of a rung, case by case."""
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

    def to_json(self) -> dict[str, Any]:
        rungs = [
            {"rung": rung, **_plain("mean", self.mean(rung)), **_plain("matched_minus", self.lead(rung))}
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
            "scores": {rung: [round(value, 4) for value in values] for rung, values in self.scores.items()},
        }


def _plain(name: str, mean: Mean) -> dict[str, float]:
    return {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}


@torch.inference_mode()
def audit(subject: Subject[Case], seeds: Sequence[int] = (0, 1, 2)) -> Ladder:
    """Climb the ladder. Seeds draw who swaps adapters with whom, random adapters and variants."""
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


def generate(subject: Subject[Case], cases: Sequence[Case]) -> Adapter:
    """Adapters of all cases, a few at a time."""
    return Adapter.stack([subject.adapt(cases[i : i + BATCH]) for i in range(0, len(cases), BATCH)])


def _rungs(subject: Subject[Case], adapters: Adapter, seed: int) -> Iterator[tuple[str, Adapter | None]]:
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
    """For every case another one, drawn among those of its task or of other tasks."""
    partners = []
    for i, task in enumerate(tasks):
        choices = [j for j, other in enumerate(tasks) if (other == task) == same and j != i]
        partners.append(choices[int(torch.randint(len(choices), (), generator=generator))])
    return partners
