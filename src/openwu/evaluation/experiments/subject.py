"""What an experiment examines: requests with a known answer, whatever writes adapters for them, and a score.

Enters: anything that makes an `Adapter` from requests, a hypernetwork of the user's own included, and anything that
says how well the base does under an adapter. Leaves: a `Subject` that the experiments read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from openwu.errors import OpenwuError
from openwu.types import Adapter

Case = TypeVar("Case")
"""A request together with what its answer should be; only the subject's own functions look into it."""


@dataclass(frozen=True)
class Subject(Generic[Case]):
    """A generator with its base, and the requests on which both are examined."""

    name: str
    """Shown in tables and stored with the numbers."""
    cases: Sequence[Case]
    """Requests that no training saw; at least two of each of at least two tasks."""
    tasks: Sequence[str]
    """The task of every case."""
    adapt: Callable[[Sequence[Case]], Adapter]
    """Adapters for some cases, one sample each."""
    score: Callable[[Sequence[Case], Adapter | None], Sequence[float]]
    """How good the base's answers are, higher is better: with one adapter per case, one for all, or none."""
    unit: str = "score"
    """What a score is measured in."""
    variants: Mapping[str, Callable[[Case, torch.Generator], Case]] = field(default_factory=dict)
    """Name -> what else the generator could be told of a case, for instance random words. The base's own request and
    the score stay the case's: only the adapter is made from the variant."""

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.cases):
            raise OpenwuError(f"tasks: expected one for each of {len(self.cases)} cases, got {len(self.tasks)}")
        alone = sorted({task for task in self.tasks if list(self.tasks).count(task) < 2})
        if alone or len(set(self.tasks)) < 2:
            raise OpenwuError(
                "cases: expected at least two of each of at least two tasks, to swap adapters within and across tasks; "
                f"got {len(set(self.tasks))} tasks, with a single case for {alone or 'none'}"
            )
