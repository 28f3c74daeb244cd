"""Training a generator for a base of one's own: batches enter, the loss through the frozen base leaves.

A stage for `loop.train_stage`, which brings resuming, curves, schedules, micro-batches, averages and several processes.
It knows neither pictures nor texts: what a batch is, how adapters are made for it, what it should come to and what the
base is given are functions of the user's. `examples/train_your_own.py` is a whole training in about 170 lines.

The adapters stay applied until the backward pass has run, so a base with gradient checkpointing (`use_reentrant=False`)
is trained like any other.

Shapes: b samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle
from openwu.adapters.updates import relative_std, task_variances
from openwu.errors import OpenwuError
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import WHOLE, MicroBatch, StepBatchCache, take_rows
from openwu.training.objectives import NoisySample, Objective
from openwu.types import Adapter

Batch = TypeVar("Batch")
"""Requests with their answers; only the user's own functions look into it."""


@dataclass
class GeneratorStage(Generic[Batch]):
    """One generator, end to end through one frozen base."""

    name: str
    """Names the stage's curves and folder."""
    trained: nn.Module
    """What learns: the generator, and the condition encoder if it is trained with it."""
    handle: AdapterHandle
    """`openwu.attach(base, targets)` of the frozen base."""
    batches: Callable[[int], Batch]
    """The batch of any step, by its number alone: that is what makes a training resumable to the same weights. Several
    processes draw the same batch, and each computes its own rows of it."""
    adapt: Callable[[Batch], Adapter]
    """Condition and generator: one adapter for every sample of a batch."""
    target: Callable[[Batch], Tensor]
    """The clean answers [b, ...]."""
    predict: Callable[[Batch, NoisySample], Tensor]
    """What the base says; called while the batch's adapters are applied."""
    objective: Objective
    seed: int = 0
    """Of the objective's draws, together with the step."""
    validation: Batch | None = None
    """Requests that are not trained on; their loss is logged, and how much their adapters differ."""
    rows: Callable[[Batch, slice], Batch] = take_rows
    """Some samples of a batch, for micro-batches and several processes. By default rows of a tensor or list, or of
    every field of a dataclass, mapping or tuple."""
    bf16: bool = False
    """Compute in bfloat16 where autocast does. Weights, their gradients and losses keep their dtype; so does the
    generator's residual stream (`ParameterGenerator.residual_dtype`); a base's has the dtype of what it is given."""
    tasks: Callable[[Batch], Sequence[str]] | None = None
    """The task of every sample: then `adapter/within`, `adapter/across` and their ratio are logged, from the
    validation batch, which needs two samples of a task and two tasks for them."""
    sheet: Callable[[Batch], Tensor] | None = None
    """A contact sheet `[3, h, w]` in 0..1 of the validation batch for TensorBoard; called while its adapters are
    applied and without gradients, so it may run the base, a sampler included."""

    names: Callable[[int], Sequence[str]] | None = None
    """What a step's samples are called where their loss is not finite; None: by their numbers in the batch."""

    def __post_init__(self) -> None:
        if not any(parameter.requires_grad for parameter in self.trained.parameters()):
            raise OpenwuError("trained: expected a module with parameters that require gradients, got none")
        self._drawn = StepBatchCache(lambda step: self.batches(step))

    @contextmanager
    def loss(self, step: int, part: MicroBatch = WHOLE) -> Iterator[Tensor]:
        """The part's share of the step's loss; the adapters are applied until the scope ends."""
        batch, question, share = self._asked(step, part)
        with self.answered(batch, question) as (losses, _):
            yield losses.mean() * share

    def not_finite(self, step: int, part: MicroBatch = WHOLE) -> list[str]:
        batch, question, share = self._asked(step, part)
        with self.answered(batch, question) as (losses, _):
            finite = losses.isfinite().tolist()
        first = part.rows(round(len(finite) / share)).start
        broken = [first + i for i, fine in enumerate(finite) if not fine]
        if self.names is None:
            return [f"number {number} of the batch" for number in broken]
        names = self.names(step)
        return [names[number] for number in broken]

    @contextmanager
    def answered(self, batch: Batch, question: NoisySample) -> Iterator[tuple[Tensor, Adapter]]:
        """The loss of every sample `[b]` and the adapters, which are applied inside the scope."""
        with self._precision():
            adapter = self.adapt(batch)
        with self.handle.applied(adapter):
            with self._precision():
                prediction = self.predict(batch, question)
            yield self.objective.losses(prediction, question), adapter

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        if self.validation is None:
            return Evaluation({})
        question = self.objective.sample(self.target(self.validation), torch.Generator().manual_seed(self.seed))
        with self.answered(self.validation, question) as (losses, adapter), self._precision():
            sheet = None if self.sheet is None else self.sheet(self.validation)
        scalars = {"validation": float(losses.mean())}
        if adapter.batch > 1:
            scalars |= adapter_scalars(adapter, None if self.tasks is None else self.tasks(self.validation))
        return Evaluation(scalars, sheet)

    def _asked(self, step: int, part: MicroBatch) -> tuple[Batch, NoisySample, float]:
        """A part of a step's batch, its question, and its share of the batch. The draws are those of the whole."""
        whole = self._drawn.at(step, part)
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        question = self.objective.sample(self.target(whole), draws)
        if part.count == 1:
            return whole, question, 1.0
        size = len(question.target)
        own = part.rows(size)
        return self.rows(whole, own), take_rows(question, own), part.share(size)

    def _precision(self) -> torch.autocast:
        device = next(self.trained.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)


def adapter_scalars(adapter: Adapter, tasks: Sequence[str] | None) -> dict[str, float]:
    """What is logged of generated adapters: `adapter/spread`, and with tasks what `task_variances` says."""
    variances = {} if tasks is None else task_variances(adapter, tasks)
    return {f"adapter/{name}": value for name, value in {"spread": relative_std(adapter), **variances}.items()}
