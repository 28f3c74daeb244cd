"""Operators: quality on unseen photographs against how many numbers a generator writes, and of which kind.

Every trial trains condition encoder and generator from nothing on the same frozen base, with the same requests in the
same order for as many steps and at the same learning rates; only the operator of the targets, or its rank, differs.
What a basis learns once for all requests is counted apart from what is written for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openwu.adapters.operators import operator_of
from openwu.config import GeneratorConfig
from openwu.data.suite.photographs import Photograph
from openwu.errors import OpenwuError
from openwu.evaluation.cases import draw_cases, score
from openwu.evaluation.experiments.geometry import Mean, mean_over
from openwu.evaluation.experiments.methods import Budget, fit, generated_on, precision, sampler
from openwu.evaluation.experiments.results import UNCACHED, ResultCache, TrialResult, columns
from openwu.generator.layout import GroupLayout
from openwu.training.embedded.model import EmbeddedModel
from openwu.types import Adapter

BASE = "base alone"
"""The frozen base without an adapter, which reads the instruction as it does in every trial."""


class Kind(NamedTuple):
    """What a generator writes for every target."""

    operator: str
    rank: int
    """Of low-rank operators; multiples of 4 fold 4 rows into one position, as the shipped generator does."""

    @property
    def name(self) -> str:
        """Operator and rank, where a rank means something."""
        return f"{self.operator}, rank {self.rank}" if self.operator.startswith(_RANKED) else self.operator


_RANKED = ("lora", "dora", "basis", "prefix")

KINDS = (
    Kind("lora", 8),
    Kind("lora", 1),
    Kind("dora", 8),
    Kind("lora+offset", 8),
    Kind("scale_offset", 8),
    Kind("scale", 8),
    Kind("offset", 8),
    Kind("rotation", 8),
    Kind("basis_diagonal", 8),
    Kind("basis_matrix", 8),
    Kind("basis_mixture", 8),
    Kind("prefix", 2),
)
"""What is compared; the order is that of the trials."""


def kinds_of(names: Sequence[str]) -> tuple[Kind, ...]:
    """Read kinds out of "OPERATOR" or "OPERATOR:RANK" (rank 8 where none is given); OpenwuError for unknown ones."""
    found = []
    for name in names:
        operator, colon, rank = name.partition(":")
        if colon and not (rank.isascii() and rank.isdigit() and int(rank) > 0):
            raise OpenwuError(f"--operator: expected OPERATOR or OPERATOR:RANK, such as lora:8, got {name!r}")
        operator_of(operator)
        found.append(Kind(operator, int(rank) if colon else 8))
    return tuple(dict.fromkeys(found))


def neutral_adapter(
    config: GeneratorConfig, kind: Kind, draws: torch.Generator, batch: int = 1
) -> tuple[Adapter, list[Tensor]]:
    """Make an adapter `[batch]` of this kind that changes nothing, and the tensors of it that can be trained.

    Its rows begin alike: A and what all requests share are drawn, the rest is zero. `config`: targets and scale.
    """
    targets = [
        target
        for group in config.groups
        for target in GroupLayout.of(group.with_operator(kind.operator), config).targets
    ]
    factors: dict[str, dict[str, Tensor]] = {target.name: {} for target in targets}
    trained = []
    for target in targets:
        for factor in target.factors(kind.rank):
            value = torch.zeros(1, *factor.shape)
            if factor.kind in ("A", "shared"):
                value.normal_(std=factor.shape[-1] ** -0.5, generator=draws)
            if factor.kind != "shared":
                value = value.repeat(batch, *[1] * len(factor.shape))
                trained.append(value.requires_grad_())
            factors[target.name][factor.name] = value
    return Adapter(tuple(targets), factors, config.scale), trained


@dataclass(frozen=True)
class Point:
    """The scores of one kind of adapter with one seed."""

    kind: str
    seed: int
    numbers: int
    """Written for each request."""
    shared: int
    """Learned once for all requests, without the generator's own weights."""
    scores: dict[str, float]
    """Task -> mean PSNR in dB over the test photographs."""


@dataclass
class OperatorResults:
    """The scores of all kinds and seeds."""

    points: list[Point]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(point.kind for point in self.points))

    def numbers(self, kind: str) -> tuple[int, int]:
        """Return how many numbers are written for each request, and how many are learned once for all."""
        first = next(point for point in self.points if point.kind == kind)
        return first.numbers, first.shared

    def mean(self, kind: str) -> Mean:
        """Average a kind over tasks and seeds."""
        found = [point.scores for point in self.points if point.kind == kind]
        return mean_over([s for each in found for s in each.values()], [task for each in found for task in each])

    def lead(self, kind: str, other: str) -> Mean:
        """Return the mean difference in dB between two kinds, task by task and seed by seed."""
        scores = {(p.kind, p.seed, task): value for p in self.points for task, value in p.scores.items()}
        keys = [(seed, task) for which, seed, task in scores if which == kind and (other, seed, task) in scores]
        return mean_over([scores[kind, *key] - scores[other, *key] for key in keys], [task for _, task in keys])

    def table(self) -> str:
        """Return every kind, best first, as plain text."""
        rows = []
        for kind in sorted(self.kinds, key=lambda each: self.mean(each).value, reverse=True):
            numbers, shared = self.numbers(kind)
            lead = "" if kind == BASE else str(self.lead(kind, BASE))
            rows.append((kind, f"{numbers:,}", f"{shared:,}" if shared else "", str(self.mean(kind)), lead))
        return columns(("operator", "numbers a request", "learned once", "mean, dB", "over the base alone, dB"), rows)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        kinds = [
            {
                "kind": kind,
                "numbers": self.numbers(kind)[0],
                "shared": self.numbers(kind)[1],
                **self.mean(kind).to_json(),
            }
            for kind in self.kinds
        ]
        return {"kinds": kinds, "points": [dataclasses.asdict(point) for point in self.points]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> OperatorResults:
        """Read what `to_json` returned: the table can be made again."""
        return cls([Point(**each) for each in stored["points"]])


def operators(
    model: EmbeddedModel,
    photographs: list[Photograph],
    test: dict[str, Tensor],
    tasks: Sequence[str],
    budget: Budget,
    seeds: Sequence[int],
    kinds: Sequence[Kind] = KINDS,
    width: int = 128,
    cache: ResultCache = UNCACHED,
) -> OperatorResults:
    """Train a generator of one block of `width` for every kind and seed, and score it on test photographs.

    cache: where results of finished trials are found again; a trial is one kind with one seed.
    """
    found = OperatorResults([])

    def alone(seed: int) -> TrialResult:
        with torch.inference_mode(), precision():
            cases = draw_cases(test, tasks, seed)
            values = score(model, cases, None)
        return TrialResult(vars(Point(BASE, seed, 0, 0, _by_task(tasks, [c.task for c in cases], values))))

    def run(kind: Kind, seed: int) -> TrialResult:
        changed = with_kind(model, kind, width)
        method, cases = generated_on(changed, seed), draw_cases(test, tasks, seed)
        batches = sampler(photographs, tasks, budget, seed)
        fit(method, batches, budget, budget.steps, method.rates, f"{kind.name}, seed {seed}")
        with torch.inference_mode(), precision():
            values = score(changed, cases, method.serve(cases))
        shared = sum(p.numel() for name, p in changed.generator.named_parameters() if ".shared." in name)
        numbers = changed.generator.layout.adapter_size
        return TrialResult(
            vars(Point(kind.name, seed, numbers, shared, _by_task(tasks, [c.task for c in cases], values)))
        )

    for seed in seeds:
        found.points.append(Point(**cache.get(f"{BASE}, seed {seed}", partial(alone, seed)).values))
        for kind in kinds:
            trial = cache.get(f"{kind.name}, seed {seed}", partial(run, kind, seed))
            found.points.append(Point(**trial.values))
    return found


def with_kind(model: EmbeddedModel, kind: Kind, width: int) -> EmbeddedModel:
    """Put an untrained generator of one block, which writes this kind of adapter, on the model's base."""
    sizes = model.config.without_examples()  # a branch of the generator would have to have its rank
    config = sizes.generator
    generator = dataclasses.replace(
        config,
        rank=kind.rank,
        alpha=config.scale * kind.rank,
        dim_accumulation=config.dim_accumulation if kind.rank % config.dim_accumulation == 0 else 1,
        d_model=width,
        num_pg_layers=1,
        groups=tuple(group.with_operator(kind.operator) for group in config.groups),
    )
    changed = EmbeddedModel(dataclasses.replace(sizes, generator=generator)).requires_grad_(False)
    words = model.instruction.state_dict()
    changed.instruction.load_state_dict({name: words[name] for name in changed.instruction.state_dict()})
    changed.backbone.load_state_dict(model.backbone.state_dict())
    return changed


def _by_task(tasks: Sequence[str], names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {
        task: float(np.mean([value for name, value in zip(names, values, strict=True) if name == task]))
        for task in tasks
    }
