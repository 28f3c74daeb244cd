"""Do tasks pull shared parameters apart? Cosines between the gradients of tasks.

Enters: gradients of one set of parameters, several independent ones per task. Leaves: the matrix of cosines between
tasks, its mean over contradictory and over all pairs, and how alike two gradients of one task are: where even those are
unlike, a small cosine between tasks says nothing.

Shapes: t tasks, s independent samples of a task's gradient, n parameters, e seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.evaluation.experiments.geometry import Mean, mean_over


@dataclass(frozen=True)
class Conflict:
    """What was found about one set of parameters."""

    where: str
    """Which parameters, when in their training."""
    tasks: tuple[str, ...]
    cosine: Tensor
    """[e, t, t] between different samples of the tasks; on the diagonal, within a task."""
    opposites: tuple[tuple[str, str], ...]

    @property
    def contradictory(self) -> Mean:
        """Mean cosine over contradictory pairs."""
        index = {task: i for i, task in enumerate(self.tasks)}
        values, pairs = [], []
        for one, other in self.opposites:
            values += self.cosine[:, index[one], index[other]].tolist()
            pairs += [f"{one}/{other}"] * len(self.cosine)
        return mean_over(values, pairs)

    @property
    def all_pairs(self) -> Mean:
        """Mean cosine over all pairs of different tasks."""
        values, groups = [], []
        for i, task in enumerate(self.tasks):
            others = [j for j in range(len(self.tasks)) if j != i]
            values += self.cosine[:, i, others].flatten().tolist()
            groups += [task] * (len(others) * len(self.cosine))
        return mean_over(values, groups)

    @property
    def same_task(self) -> Mean:
        """Mean cosine between independent gradients of one task."""
        own = self.cosine.diagonal(dim1=1, dim2=2)  # [e, t]
        return mean_over(own.t().flatten().tolist(), [task for task in self.tasks for _ in range(len(own))])

    def to_json(self) -> dict[str, Any]:
        return {
            "where": self.where,
            **{
                name: {"value": mean.value, "low": mean.low, "high": mean.high}
                for name, mean in (
                    ("contradictory", self.contradictory),
                    ("all_pairs", self.all_pairs),
                    ("same_task", self.same_task),
                )
            },
            "cosine": [[round(float(value), 4) for value in row] for row in self.cosine.mean(0)],
        }


def gradient(module: nn.Module, loss: Callable[[], Tensor], keep: Callable[[str], bool] = lambda _: True) -> Tensor:
    """The gradient `[n]` of a loss with respect to a module's parameters whose names `keep` accepts."""
    module.zero_grad(set_to_none=True)
    torch.autograd.backward(loss())
    parts = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for name, p in module.named_parameters()
        if p.requires_grad and keep(name)
    ]
    module.zero_grad(set_to_none=True)
    return torch.cat(parts).float()


def task_cosines(where: str, tasks: Sequence[str], sample: Callable[[str, int], Tensor], samples: int) -> Tensor:
    """Cosines `[t, t]`. `sample(task, s)`: gradient `[n]` of the task on data that no other s sees; `samples` >= 2."""
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, to compare a task with itself, got {samples}")
    rows = []
    for task in tqdm(tasks, desc=where, unit="task"):
        drawn = [sample(task, s) for s in range(samples)]
        rows.append(torch.stack([each / each.norm().clamp(min=1e-30) for each in drawn]))
    unit = torch.stack(rows)  # [t, s, n]
    flat = unit.flatten(0, 1)
    alike = (flat @ flat.t()).view(len(tasks), samples, len(tasks), samples)
    # A sample is compared with other samples only, between tasks too: equal pictures would make tasks look alike.
    different = ~torch.eye(samples, dtype=torch.bool)
    return alike.permute(0, 2, 1, 3)[:, :, different].mean(-1)
