"""Training a generator for a base of one's own: batches enter, the loss through the frozen base leaves.

A stage for `loop.train_stage`, which brings resuming, curves and schedules. It knows neither pictures nor texts: what a
batch is, how adapters are made for it, what it should come to and what the base is given are functions of the user's.
`examples/train_your_own.py` is a whole training in a hundred lines.

The adapters are gone when the backward pass begins: a base with gradient checkpointing cannot be trained through this
stage (the hooks say so).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from openwu.adapter.inject import AdapterHandle
from openwu.errors import OpenwuError
from openwu.training.loop import Evaluation
from openwu.training.objective import Objective, Question
from openwu.training.stages import adapter_spread
from openwu.types import Adapter

Batch = TypeVar("Batch")
"""Requests with their answers; only the user's own functions look into it."""


@dataclass
class OwnStage(Generic[Batch]):
    """One generator, end to end through one frozen base."""

    name: str
    """Names the stage's curves and folder."""
    trained: nn.Module
    """What learns: the generator, and the condition encoder if it is trained with it."""
    handle: AdapterHandle
    """`openwu.attach(base, targets)` of the frozen base."""
    batches: Callable[[int], Batch]
    """The batch of any step, by its number alone: that is what makes a training resumable to the same weights."""
    adapt: Callable[[Batch], Adapter]
    """Condition and generator: one adapter for every sample of a batch."""
    target: Callable[[Batch], Tensor]
    """The clean answers [b, ...]."""
    predict: Callable[[Batch, Question], Tensor]
    """What the base says; called while the batch's adapters are applied."""
    objective: Objective
    seed: int = 0
    """Of the objective's draws, together with the step."""
    validation: Batch | None = None
    """Requests that are not trained on; their loss is logged, and how much their adapters differ."""

    def __post_init__(self) -> None:
        if not any(parameter.requires_grad for parameter in self.trained.parameters()):
            raise OpenwuError("trained: expected a module with parameters that require gradients, got none")

    def loss(self, step: int) -> Tensor:
        return self.losses(self.batches(step), self._draws(step))[0].mean()

    def not_finite(self, step: int) -> list[str]:
        losses, _ = self.losses(self.batches(step), self._draws(step))
        return [f"number {i} of the batch" for i, fine in enumerate(losses.isfinite().tolist()) if not fine]

    def _draws(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def losses(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Adapter]:
        """The loss of every sample `[b]`, and the adapters."""
        question = self.objective.ask(self.target(batch), generator)
        adapter = self.adapt(batch)
        with self.handle.applied(adapter):
            said = self.predict(batch, question)
        return self.objective.losses(said, question), adapter

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        if self.validation is None:
            return Evaluation({})
        losses, adapter = self.losses(self.validation, torch.Generator().manual_seed(self.seed))
        scalars = {"validation": float(losses.mean())}
        if adapter.batch > 1:
            scalars["adapter/spread"] = adapter_spread(adapter)
        return Evaluation(scalars)
