"""One update: the parts of a step's batch enter, one after another; their gradients add up; the weights move.

What a loop needs to know of several processes is here: the loss and the gradient's norm are those of the whole batch
on every process, so that all of them stop together.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.training.average import Average
from openwu.training.optimizer import StageOptimizer
from openwu.training.part import Part
from openwu.training.processes import Processes, spread, whole, without_reduction
from openwu.training.recipe import StageConfig
from openwu.training.schedule import part_of_peak

if TYPE_CHECKING:
    from openwu.training.loop import Stage


class Updates:
    """Makes the updates of a stage, and owns what they need: optimiser, moving average, the module as it is spread."""

    def __init__(self, stage: Stage, config: StageConfig, processes: Processes, shard: bool = False) -> None:
        self.stage, self.config, self.processes = stage, config, processes
        if shard and config.matrix_learning_rate:
            raise OpenwuError(
                "shard: Muon needs whole matrices and cannot train sharded weights; set matrix_learning_rate to 0, "
                "or train without shard"
            )
        self.around = spread(stage.trained, processes, shard)
        self.optimizer = StageOptimizer(stage.trained, config)
        self.average = Average(stage.trained, config.ema)

    def make(self, step: int) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm before clipping.

        Raises OpenwuError, before any weight is touched, when one of them is not finite.
        """
        parameters = [each for each in self.stage.trained.parameters() if each.requires_grad]
        self.optimizer.zero_grad()
        loss = self._gradients(step)
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss is {loss}")
        norm = float(whole(nn.utils.clip_grad_norm_(parameters, self.config.clip)))
        if not math.isfinite(norm):
            raise self._diverged(step, f"the loss is {loss:.4g}, but its gradient's norm is {norm}")
        self.optimizer.step(part_of_peak(self.config, step))
        self.average.update(step)
        return loss, norm

    def _parts(self) -> list[Part]:
        """Of the batch, those that this process computes."""
        each = self.config.accumulate
        return [Part(self.processes.rank * each + i, self.processes.count * each) for i in range(each)]

    def _gradients(self, step: int) -> float:
        """Add up the gradients of this process's parts; the loss of the whole batch."""
        total: Tensor | None = None
        *earlier, last = self._parts()
        for part in (*earlier, last):
            with without_reduction(self.around, part is not last), ExitStack() as scope:
                loss: Tensor = self.around(partial(self._entered, scope, step, part))
                # Gradients are averaged over processes, and are to be added up.
                torch.autograd.backward(loss * self.processes.count)
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return float(self.processes.sum(total))

    def _entered(self, scope: ExitStack, step: int, part: Part) -> Tensor:
        return scope.enter_context(self.stage.loss(step, part))

    def _diverged(self, step: int, what: str) -> OpenwuError:
        """Names the samples."""
        with torch.no_grad():
            own = [s for part in self._parts() for s in self.around(partial(self.stage.not_finite, step, part))]
        samples = self.processes.gathered(own)
        named = (
            f"Samples whose loss is not finite: {', '.join(samples)}" if samples else "Every sample's loss is finite"
        )
        return OpenwuError(
            f"{self.stage.name}: {what} at step {step}; the last checkpoint is kept. {named}. "
            "Look at them, or lower learning_rate or clip"
        )
