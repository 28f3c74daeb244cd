"""What the tests of the lab share: adapters whose updates are known, and a subject whose scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openwu.evaluation.experiments.probes.audit import Subject
from openwu.types import Adapter, Target

TARGETS = (Target("one", 5, 4), Target("two", 3, 6))


def adapter(samples: int, seed: int = 0, rank: int = 2, scale: float = 0.5) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for target in TARGETS:
        shapes = list(target.shapes(samples, rank).values())
        weights[target.name] = (
            torch.randn(shapes[0], generator=generator),
            torch.randn(shapes[1], generator=generator),
        )
    return Adapter.from_pairs(TARGETS, weights, scale)


def updates(adapters: Adapter) -> Tensor:
    """All of scale * B A in one row per sample."""
    parts = [(b @ a).flatten(1) for a, b in adapters.pairs.values()]
    return adapters.scale * torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Case:
    """A request that wants the update `wanted`."""

    task: str
    wanted: Tensor
    told: Tensor


def subject(reads: bool, tasks: int = 3, each: int = 4, spread: float = 0.1) -> Subject[Case]:
    """An ideal generator, or one that writes the same whatever it is told; the score is minus the distance."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(tasks, 4, generator=generator)
    cases = []
    for i in range(tasks * each):
        wanted = directions[i % tasks] + spread * torch.randn(4, generator=generator)
        cases.append(Case(f"task {i % tasks}", wanted, wanted))
    target = Target("only", 1, 4)

    def adapt(some: Sequence[Case]) -> Adapter:
        b = torch.stack([case.told if reads else torch.ones(4) for case in some])[:, :, None]
        return Adapter.from_pairs((target,), {"only": (torch.ones(len(some), 1, 1), b)}, 1.0)

    def score(some: Sequence[Case], own: Adapter | None) -> list[float]:
        made = torch.zeros(len(some), 4) if own is None else updates(own).expand(len(some), -1)
        wanted = torch.stack([case.wanted for case in some])
        return (-(made - wanted).norm(dim=1)).tolist()

    return Subject(
        "reading" if reads else "blind",
        cases,
        [case.task for case in cases],
        adapt,
        score,
        variants={"noise": lambda case, g: replace(case, told=torch.randn(4, generator=g))},
    )
