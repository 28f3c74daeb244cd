"""Do generated adapters of one task lie together? Nearest neighbours, silhouettes, a map, and arithmetic of adapters.

Every case has a group (say, its photograph); neighbours are sought in other groups. Arithmetic: a - b + c.

All distances are between updates scale * B A, see `geometry.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openwu.adapters.updates import inner_products
from openwu.evaluation.experiments.geometry import Mean, coordinates, mean_over, nearest_same_task
from openwu.evaluation.experiments.probes.audit import CaseT, Subject, generate
from openwu.evaluation.experiments.results import columns
from openwu.types import Adapter


@dataclass(frozen=True)
class Manifold:
    """Neighbours, silhouettes, coordinates and arithmetic of the adapters of all cases."""

    subject: str
    unit: str
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    same_neighbour: list[bool]
    """Whether the most similar adapter of another group has the same task, for every case."""
    chance: float
    """How often that would happen with tasks dealt at random."""
    silhouette: list[float]
    """Of every case, -1 to 1 (Rousseeuw 1987)."""
    points: Tensor
    """[cases, 2], principal components."""
    shares: list[float]
    """Share of the variance of either component."""
    arithmetic: dict[str, list[float]]
    """How -> score of every case's sum; see `arithmetic_scores`."""
    arithmetic_tasks: tuple[str, ...]

    @property
    def neighbours(self) -> Mean:
        return mean_over([float(same) for same in self.same_neighbour], self.tasks)

    def lead(self, how: str, over: str) -> Mean:
        pairs = zip(self.arithmetic[how], self.arithmetic[over], strict=True)
        return mean_over([one - other for one, other in pairs], self.arithmetic_tasks)

    def table(self) -> str:
        """Return the means as plain text."""
        rows = [
            ("nearest neighbour has the task", str(self.neighbours)),
            ("the same by chance", f"{self.chance:.2f}"),
            ("silhouette by task", f"{sum(self.silhouette) / len(self.silhouette):.2f}"),
            (f"a - b + c minus another sample's, {self.unit}", str(self.lead("a - b + c", "another sample's"))),
            (f"a - b + c minus matched, {self.unit}", str(self.lead("a - b + c", "matched"))),
        ]
        return columns(("adapters of the test set", "mean [95% interval]"), rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "subject": self.subject,
            "unit": self.unit,
            "nearest_neighbour": {**self.neighbours.to_json(), "chance": self.chance},
            "silhouette": sum(self.silhouette) / len(self.silhouette),
            "arithmetic": {how: sum(values) / len(values) for how, values in self.arithmetic.items()},
            "shares": self.shares,
            "cases": [
                {
                    "task": task,
                    "group": group,
                    "same_neighbour": same,
                    "silhouette": round(silhouette, 4),
                    "point": [round(float(v), 5) for v in point],
                }
                for task, group, same, silhouette, point in zip(
                    self.tasks, self.groups, self.same_neighbour, self.silhouette, self.points, strict=True
                )
            ],
            "arithmetic_scores": [
                {"task": task, **{how: round(values[i], 4) for how, values in self.arithmetic.items()}}
                for i, task in enumerate(self.arithmetic_tasks)
            ],
        }


@torch.inference_mode()
def manifold(subject: Subject[CaseT], groups: Sequence[str], seeds: Sequence[int] = (0, 1, 2)) -> Manifold:
    """Map the adapters of a subject's cases.

    groups: of every case; neighbours are sought in other groups than its own, so that equal pictures prove nothing.
    """
    adapters = generate(subject, subject.cases)
    products = inner_products(adapters)
    sizes = products.diagonal().clamp(min=1e-30).sqrt()
    alike = products / sizes[:, None] / sizes[None, :]
    points, shares = coordinates(alike, 2)
    names: list[str] = []
    scores: dict[str, list[float]] = {"another sample's": [], "a - b + c": [], "matched": []}
    for seed in tqdm(seeds, desc="a - b + c", unit="seed"):
        tasks, found = arithmetic_scores(subject, adapters, groups, seed)
        names += tasks
        for how, values in found.items():
            scores[how] += values
    return Manifold(
        subject.name,
        subject.unit,
        tuple(subject.tasks),
        tuple(groups),
        nearest_same_task(alike, subject.tasks, groups),
        _chance(subject.tasks, groups),
        silhouettes(alike, subject.tasks),
        points,
        [float(share) for share in shares],
        scores,
        tuple(names),
    )


def _chance(tasks: Sequence[str], groups: Sequence[str]) -> float:
    """Return the mean share of cases of one's own task among those of other groups."""
    shares = []
    for task, group in zip(tasks, groups, strict=True):
        others = [other for other, theirs in zip(tasks, groups, strict=True) if theirs != group]
        shares.append(others.count(task) / len(others))
    return sum(shares) / len(shares)


def silhouettes(similarity: Tensor, tasks: Sequence[str]) -> list[float]:
    """Return how much closer every point is to its own task than to the nearest other one, by distance 1 - cosine."""
    distance = (1 - similarity).clamp(min=0)
    names = list(dict.fromkeys(tasks))
    member = torch.tensor([[task == name for name in names] for task in tasks], dtype=distance.dtype)
    own = member.bool()
    sums, counts = distance @ member, member.sum(0)
    inside = sums[own] / (counts[own.long().argmax(1)] - 1).clamp(min=1)  # a point is no neighbour of itself
    outside = (sums / counts).masked_fill(own, torch.inf).amin(1)
    return [float(v) for v in (outside - inside) / torch.maximum(inside, outside).clamp(min=1e-30)]


def arithmetic_scores(
    subject: Subject[CaseT], adapters: Adapter, groups: Sequence[str], seed: int
) -> tuple[list[str], dict[str, list[float]]]:
    """Score a - b + c, one sum for each task: the tasks, and scores by method.

    Wanted: task Y in group 1. Known: a, task X in group 1; b, task X in group 2; c, task Y in group 2. If what a group
    adds is the same for every task, a - b + c does better than c ("another sample's") and about as well as what was
    generated for Y in group 1 ("matched").
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    place = {(task, group): i for i, (task, group) in enumerate(zip(subject.tasks, groups, strict=True))}
    corners = []
    for wanted in dict.fromkeys(subject.tasks):
        here = draw([group for task, group in place if task == wanted])
        there = draw([group for task, group in place if task == wanted and group != here])
        other = draw([task for task, group in place if task != wanted and group == here and (task, there) in place])
        corners.append(tuple(place[key] for key in ((other, here), (other, there), (wanted, there), (wanted, here))))
    a, b, c, matched = (adapters.select(list(index)) for index in zip(*corners, strict=True))
    cases = [subject.cases[corner[3]] for corner in corners]
    moved = Adapter.sum([a, b.scaled(-1.0), c])
    found = {"another sample's": c, "a - b + c": moved, "matched": matched}
    tasks = [subject.tasks[corner[3]] for corner in corners]
    return tasks, {how: list(subject.score(cases, adapter)) for how, adapter in found.items()}
