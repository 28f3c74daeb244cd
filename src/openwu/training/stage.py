"""Stages of the training loop for any base: a generator through a frozen base, or a module by itself.

A stage knows neither pictures nor texts: what a batch is, how adapters are generated for it, its targets and the base's
predictions are functions of the user's. `train_stage` brings resuming, curves, schedules, micro-batches, EMA weights
and several processes. `examples/train_your_own.py` is a whole training in about 170 lines.

Adapters stay applied until the backward pass has run, so a base with gradient checkpointing (`use_reentrant=False`) is
trained like any other.

Shapes: b samples of a batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from openwu.adapters.inject import AdapterHandle
from openwu.adapters.site import Site
from openwu.adapters.updates import relative_norms, relative_std, task_variances
from openwu.errors import OpenwuError
from openwu.training.loop import Evaluation
from openwu.training.micro_batch import FULL_BATCH, MicroBatch, StepBatchCache, batch_size, take_rows
from openwu.training.objectives import NoisySample, Objective
from openwu.training.optimizers import MatrixStacks
from openwu.training.retention import Inputs, RetentionObjective, warn_of_large_updates
from openwu.types import Adapter, Target

Batch = TypeVar("Batch")
"""Requests with their answers; only the user's own functions look into it."""


class BatchPart(NamedTuple):
    """Which rows of a whole batch a micro-batch has."""

    rows: slice
    share: float
    """Fraction of the rows: the factor on their mean loss."""


@dataclass
class GeneratorStage(Generic[Batch]):
    """Train one generator end to end through one frozen base."""

    name: str
    """Names the stage's curves and folder."""
    trained: nn.Module
    """The generator, and the condition encoder if it is trained with it."""
    handle: AdapterHandle
    """`openwu.attach(base, targets)` of the frozen base."""
    batches: Callable[[int], Batch]
    """The batch of any step, by its number alone: that is what makes a training resumable to the same weights. Several
    processes draw the same batch, and each computes its own rows of it."""
    adapt: Callable[[Batch], Adapter]
    """Condition and generator: one adapter for every sample of a batch."""
    target: Callable[[Batch], Tensor]
    """The clean data [b, ...]."""
    predict: Callable[[Batch, NoisySample], Tensor]
    """The base's prediction; called while the batch's adapters are applied."""
    objective: Objective
    seed: int = 0
    """Of the objective's draws, together with the step."""
    validation: Batch | None = None
    """Requests that are not trained on; their loss is logged, and how much their adapters differ."""
    rows: Callable[[Batch, slice], Batch] = take_rows
    """Select samples of a batch, for micro-batches and several processes. By default rows of a tensor or list, or of
    every field of a dataclass, mapping or tuple."""
    bf16: bool = False
    """Compute in bfloat16 where autocast does. Weights, their gradients and losses keep their dtype; so does the
    generator's residual stream (`ParameterGenerator.residual_dtype`); a base's has the dtype of its input."""
    tasks: Callable[[Batch], Sequence[str]] | None = None
    """The task of every sample: then `adapter/within`, `adapter/across` and their ratio are logged, from the
    validation batch, which needs two samples of a task and two tasks for them."""
    sheet: Callable[[Batch], Tensor] | None = None
    """A contact sheet `[3, h, w]` in 0..1 of the validation batch for TensorBoard; called while its adapters are
    applied and without gradients, so it may run the base, a sampler included."""
    samples: Callable[[Batch], tuple[str, Mapping[str, float]]] | None = None
    """Samples of the validation batch in words for TensorBoard, and curves of them; called like `sheet`."""
    names: Callable[[int], Sequence[str]] | None = None
    """Names of a step's samples for errors about their loss; None: their numbers in the batch."""
    contexts: Callable[[Batch], Sequence[int]] | None = None
    """Number of the adapter for every row of the target, rising from 0, where a context has several questions; `rows`
    then cuts a batch by contexts, each with its questions. None: every row has an adapter of its own."""
    retention: RetentionObjective[Any] | None = None
    """Keep the base's answers on unrelated inputs, under the adapters of the batch."""

    def __post_init__(self) -> None:
        if not any(parameter.requires_grad for parameter in self.trained.parameters()):
            raise OpenwuError("trained: expected a module with parameters that require gradients, got none")
        self._cache = StepBatchCache(lambda step: self.batches(step))

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Enter the adapters' scope with the micro-batch's share of the step's loss."""
        batch, sample, part = self._draw(step, micro_batch)
        unrelated = None if self.retention is None else self._unrelated(self.retention, step, part)
        with self.forward(batch, sample) as (losses, _):
            loss = losses.mean()
            if self.retention is not None and unrelated is not None:
                inputs, own = unrelated
                with self._precision():
                    prediction = self.retention.predict(inputs)
                loss = loss + self.retention.weight * self.retention.losses(inputs, prediction, own).mean()
            yield loss * part.share

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the samples of a micro-batch whose loss is not finite."""
        batch, sample, part = self._draw(step, micro_batch)
        with self.forward(batch, sample) as (losses, _):
            finite = losses.isfinite().tolist()
        broken = [part.rows.start + i for i, fine in enumerate(finite) if not fine]
        if self.names is None:
            return [f"number {number} of the batch" for number in broken]
        names = self.names(step)
        return [names[number] for number in broken]

    @contextmanager
    def forward(self, batch: Batch, sample: NoisySample) -> Iterator[tuple[Tensor, Adapter]]:
        """Generate the adapters, apply them for the scope, and compute the loss of every sample `[b]` under them."""
        with self._precision():
            adapter = self.adapt(batch)
        with self.handle.applied(adapter, self._rows_of(batch)):
            with self._precision():
                prediction = self.predict(batch, sample)
            yield self.objective.losses(prediction, sample), adapter

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Compute the validation batch's loss and its controls, how its adapters differ, and its contact sheet.

        Controls: `control/none`, the base alone; `control/other`, every adapter goes to another sample, of another
        task where there is one; `control/average`, the mean of all updates. Warns where updates outweigh the weights.
        """
        batch = self.validation
        if batch is None:
            return Evaluation({})
        sample = self.objective.sample(self.target(batch), torch.Generator().manual_seed(self.seed))
        tasks = None if self.tasks is None else self.tasks(batch)
        with self.forward(batch, sample) as (losses, adapter), self._precision():
            sheet = None if self.sheet is None else self.sheet(batch)
            text, worth = ("", {}) if self.samples is None else self.samples(batch)
        scalars = {"validation": float(losses.mean()), **worth}
        if adapter.batch > 1:
            scalars |= adapter_scalars(adapter, tasks)
        scalars |= self._controls(batch, sample, adapter, tasks)
        scalars |= size_scalars(adapter, self.handle.sites)
        if self.retention is not None:
            scalars["retention"] = self._kept(self.retention, adapter)
        return Evaluation(scalars, sheet, text)

    def _controls(
        self, batch: Batch, sample: NoisySample, adapter: Adapter, tasks: Sequence[str] | None
    ) -> dict[str, float]:
        """The loss of a batch under adapters that know less of it."""
        given: dict[str, Adapter | None] = {"none": None}
        if adapter.batch > 1:
            given["other"] = adapter.select(_partners(adapter.batch, tasks))
            given["average"] = average(adapter)
        found = {}
        for name, other in given.items():
            rows = self._rows_of(batch) if other is None or other.batch > 1 else None
            scope = nullcontext() if other is None else self.handle.applied(other, rows)
            with scope, self._precision():
                prediction = self.predict(batch, sample)
            found[f"control/{name}"] = float(self.objective.losses(prediction, sample).mean())
        return found

    def _unrelated(self, retention: RetentionObjective[Inputs], step: int, part: BatchPart) -> tuple[Inputs, Tensor]:
        """The unrelated inputs of a micro-batch, and the base's own answers to them."""
        inputs = retention.inputs(step)
        if part.share < 1:
            inputs = retention.rows(inputs, part.rows)
        with torch.no_grad(), self._precision():
            own = retention.predict(inputs)
        if len(own) != part.rows.stop - part.rows.start:
            raise OpenwuError(
                f"retention: expected as many unrelated inputs as the batch has rows "
                f"({part.rows.stop - part.rows.start}), got {len(own)}"
            )
        return inputs, own

    def _kept(self, retention: RetentionObjective[Inputs], adapter: Adapter) -> float:
        """The retention loss under a batch's adapters, on the inputs of the first step."""
        inputs = retention.inputs(0)
        with self._precision():
            own = retention.predict(inputs)
            with self.handle.applied(adapter, [i % adapter.batch for i in range(len(own))]):
                prediction = retention.predict(inputs)
        return float(retention.losses(inputs, prediction, own).mean())

    def _rows_of(self, batch: Batch) -> Sequence[int] | None:
        return None if self.contexts is None else self.contexts(batch)

    def _draw(self, step: int, micro_batch: MicroBatch) -> tuple[Batch, NoisySample, BatchPart]:
        """A micro-batch, its noisy sample, and its part of the batch. The random draws are those of the whole."""
        whole = self._cache.at(step, micro_batch)
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        sample = self.objective.sample(self.target(whole), draws)
        size = len(sample.target)
        if micro_batch.count == 1:
            return whole, sample, BatchPart(slice(0, size), 1.0)
        if self.contexts is None:
            own = micro_batch.rows(size)
            return self.rows(whole, own), take_rows(sample, own), BatchPart(own, micro_batch.share(size))
        numbers = list(self.contexts(whole))
        chosen = micro_batch.rows(numbers[-1] + 1)
        asked = slice(bisect_left(numbers, chosen.start), bisect_left(numbers, chosen.stop))
        part = BatchPart(asked, (asked.stop - asked.start) / size)
        return self.rows(whole, chosen), take_rows(sample, asked), part

    def _precision(self) -> torch.autocast:
        device = next(self.trained.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)


@dataclass
class ModuleStage(Generic[Batch]):
    """Train any module by a loss of every sample, without adapters; a base before it is frozen, for example."""

    name: str
    trained: nn.Module
    batches: Callable[[int], Batch]
    """The batch of any step, by its number alone; its samples are the rows of its tensors and sequences."""
    losses: Callable[[Batch], Tensor]
    """The loss of every sample [b]."""

    @contextmanager
    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Iterator[Tensor]:
        """Compute the micro-batch's share of the step's loss."""
        batch = self.batches(step)
        if micro_batch.count == 1:
            yield self.losses(batch).mean()
            return
        size = batch_size(batch)
        yield self.losses(take_rows(batch, micro_batch.rows(size))).mean() * micro_batch.share(size)

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> list[str]:
        """Name the samples whose loss is not finite by their numbers in the whole batch."""
        finite = self.losses(self.batches(step)).isfinite().tolist()
        own = micro_batch.rows(len(finite))
        return [f"number {i} of the batch" for i, fine in enumerate(finite) if not fine and own.start <= i < own.stop]

    def evaluate(self) -> Evaluation:
        """Report nothing."""
        return Evaluation({})


class TrainableLora(MatrixStacks):
    """LoRA adapters as plain parameters, `count` of them side by side: A random, B zero (Hu et al. 2021, section 4.1).

    The baselines that a generator is compared with: one adapter for all requests, or one for each task.
    """

    def __init__(
        self, targets: Sequence[Target], rank: int, generator: torch.Generator, *, count: int = 1, scale: float = 1.0
    ) -> None:
        """`generator`: draws A."""
        super().__init__()
        self.targets, self.scale = tuple(targets), scale
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for target in self.targets:
            shape_a, shape_b = target.shapes(count, rank).values()
            self.a.append(nn.Parameter(torch.randn(shape_a, generator=generator) * target.in_dim**-0.5))
            self.b.append(nn.Parameter(torch.zeros(shape_b)))

    def forward(self, index: Sequence[int] = (0,)) -> Adapter:
        """Return the adapters of these numbers, one sample each."""
        rows = list(index)
        weights = {target.name: (self.a[i][rows], self.b[i][rows]) for i, target in enumerate(self.targets)}
        return Adapter.from_pairs(self.targets, weights, self.scale)


def adapter_scalars(adapter: Adapter, tasks: Sequence[str] | None) -> dict[str, float]:
    """Return what is logged of generated adapters: `adapter/relative_std`, and with tasks their `task_variances`."""
    variances = {} if tasks is None else task_variances(adapter, tasks)
    return {f"adapter/{name}": value for name, value in {"relative_std": relative_std(adapter), **variances}.items()}


def size_scalars(adapter: Adapter, sites: Sequence[Site]) -> dict[str, float]:
    """Return the mean and the largest relative norm of updates for the log; warn where they outweigh the weights."""
    norms = relative_norms(adapter, sites)
    if not len(norms):
        return {}
    warn_of_large_updates(float(norms.mean()))
    return {"adapter/relative_norm": float(norms.mean()), "adapter/relative_norm_max": float(norms.max())}


def average(adapter: Adapter) -> Adapter:
    """Return one adapter (b = 1) whose change of every output is the mean of all samples' changes; ranks add up."""
    return Adapter.sum([adapter.select([i]).scaled(1 / adapter.batch) for i in range(adapter.batch)])


def _partners(count: int, tasks: Sequence[str] | None) -> list[int]:
    """For every sample another one: the next of another task, or the next where there is no other task."""
    partners = []
    for i in range(count):
        after = [(i + step) % count for step in range(1, count)]
        others = after if tasks is None else [j for j in after if tasks[j] != tasks[i]]
        partners.append((others or after)[0])
    return partners
