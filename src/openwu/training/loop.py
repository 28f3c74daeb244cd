"""The training loop: a stage's loss goes in, an updated module and its curves come out.

A stage says what is trained and what the loss of a step is; the loop knows nothing of pictures. Every random draw of a
step depends on the seed and the step alone, so a training that was killed continues to the same weights, and neither
micro-batches nor several processes (`torchrun`, `accelerate launch`) change what it learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from openwu.errors import OpenwuError
from openwu.training.checkpoint import load_state, save_state
from openwu.training.config import StageConfig
from openwu.training.distributed import Processes, spread, whole, without_reduction
from openwu.training.micro_batch import MicroBatch
from openwu.training.optimizers import Average, StageOptimizer

FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
    "constant": lambda _: 1.0,
}
"""Name of a schedule -> what is left of the peak when this part (1 to 0) of the fall's steps is left."""


def part_of_peak(config: StageConfig, step: int) -> float:
    """The learning rates of a step as part of their peaks: linear warm-up, constant, then the fall of the schedule."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(rise, FALLS[config.schedule](min(1.0, left)))


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

    def _parts(self) -> list[MicroBatch]:
        """Of the batch, those that this process computes."""
        each = self.config.accumulate
        return [MicroBatch(self.processes.rank * each + i, self.processes.count * each) for i in range(each)]

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

    def _entered(self, scope: ExitStack, step: int, part: MicroBatch) -> Tensor:
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


SECONDS = "seconds.txt"
"""File in a stage's folder: seconds between checkpoints, whatever process they passed in."""


@dataclass(frozen=True)
class Evaluation:
    """What a stage reports while it trains."""

    scalars: Mapping[str, float]
    picture: Tensor | None = field(default=None, repr=False)
    """A contact sheet `[3, h, w]` in 0..1."""


class Stage(Protocol):
    """One training: what changes, and how wrong it is."""

    name: str

    @property
    def trained(self) -> nn.Module: ...

    def loss(self, step: int, part: MicroBatch, /) -> AbstractContextManager[Tensor]:
        """A scope with the part's share of the step's loss: the sum over its samples / the samples of the whole batch.

        Backward runs inside the scope: adapters stay applied until then, as gradient checkpointing needs. Every draw
        depends on the seed, the step and the sample's place in the batch alone, not on how the batch is cut.
        """
        ...

    def not_finite(self, step: int, part: MicroBatch, /) -> Sequence[str]:
        """The samples of a part whose loss is not finite, in words that let a user find them."""
        ...

    def evaluate(self) -> Evaluation: ...


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs besides the stage's own optimisation."""

    recipe: str
    """JSON description that a checkpoint must match to be continued."""
    checkpoint_every: int
    evaluate_every: int
    log_every: int
    stop_after: int | None = None
    """Stop early after so many updates in this process, leaving a checkpoint; for tests and trials."""
    shard: bool = False
    """Several processes hold a shard of the weights, gradients and optimiser each (FSDP2), where all of them would not
    fit. The stage's module is cut up in place: read the result from the folder with `checkpoint.load_weights`."""


def train_stage(stage: Stage, config: StageConfig, loop: LoopConfig, folder: Path) -> bool:
    """Train to the end, from the last checkpoint in `folder` if there is one. True when every step has been made.

    A finished stage's module has its moving averages, where the stage keeps some. Every process of a training calls
    this alike; one of them writes.
    """
    processes = Processes.joined(next(stage.trained.parameters()).device)
    updates = Updates(stage, config, processes, loop.shard)
    kept = (folder, stage.trained, updates.optimizer)
    step = load_state(*kept, loop.recipe, updates.average)
    processes.agree(step, folder)
    if step < config.steps:
        stop = config.steps if loop.stop_after is None else min(config.steps, step + loop.stop_after)
        with (
            _curves(folder, step, processes.main) as curves,
            tqdm(total=config.steps, initial=step, desc=stage.name, unit="step", disable=not processes.main) as bar,
        ):
            began = time.monotonic()
            while step < stop:
                loss, norm = updates.make(step)
                step += 1
                bar.update()
                if step % loop.log_every == 0 and curves is not None:
                    bar.set_postfix(loss=f"{loss:.3f}")
                    curves.add_scalar("loss", loss, step)
                    curves.add_scalar("gradient_norm", norm, step)
                    curves.add_scalar("learning_rate", config.learning_rate * part_of_peak(config, step - 1), step)
                if step % loop.evaluate_every == 0 or step == config.steps:
                    # Every process evaluates, since each may hold a shard of the weights.
                    with torch.no_grad(), updates.average.applied():
                        evaluation: Evaluation = updates.around(stage.evaluate)
                    _log_evaluation(curves, evaluation, step)
                if step % loop.checkpoint_every == 0 or step == stop:
                    save_state(*kept, step, loop.recipe, updates.average, processes.main)
                    began = _note_seconds(folder, began, processes.main)
        processes.wait()
    if step < config.steps:
        return False
    updates.average.keep()
    return True


@contextmanager
def _curves(folder: Path, step: int, main: bool) -> Iterator[SummaryWriter | None]:
    """What the main process writes curves with."""
    if not main:
        yield None
        return
    with SummaryWriter(str(folder), purge_step=step + 1) as curves:
        yield curves


def _note_seconds(folder: Path, began: float, main: bool) -> float:
    """Add the seconds since `began` to the stage's record, a line for each checkpoint; returns the time now."""
    now = time.monotonic()
    if main:
        with (folder / SECONDS).open("a", encoding="utf-8") as file:
            file.write(f"{now - began:.1f}\n")
    return now


def _log_evaluation(curves: SummaryWriter | None, evaluation: Evaluation, step: int) -> None:
    if curves is None:
        return
    for name, value in evaluation.scalars.items():
        curves.add_scalar(name, value, step)
    if evaluation.picture is not None:
        curves.add_image("validation", evaluation.picture, step)
