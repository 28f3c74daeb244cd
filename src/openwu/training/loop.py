"""The training loop: draw, forward in the adapter's scope, backward, clip, step, log; resumable at any step.

A `Stage` says what is trained and what the loss of a step is. Every random draw depends on the seed and the step alone,
so a training that was killed resumes to the same weights, and neither micro-batches nor several processes (`torchrun`,
`accelerate launch`) change what it learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openwu.errors import OpenwuError
from openwu.training.checkpoint import load_state, save_state
from openwu.training.config import Recipe, StageConfig
from openwu.training.distributed import Processes, full_tensor, no_gradient_sync, wrap_distributed
from openwu.training.micro_batch import MicroBatch
from openwu.training.optimizers import EmaWeights, StageOptimizer, learning_rate_factor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS = "seconds.txt"
"""File in a stage's folder with the seconds between checkpoints, one line each, of all processes that trained it."""


@dataclass(frozen=True)
class Evaluation:
    """What a stage reports while it trains."""

    scalars: Mapping[str, float]
    picture: Tensor | None = field(default=None, repr=False)
    """A contact sheet `[3, h, w]` in 0..1."""
    text: str = ""
    """Samples in words, in Markdown."""


class Stage(Protocol):
    """What is trained, and the loss of a step."""

    name: str

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are updated."""
        ...

    def loss(self, step: int, micro_batch: MicroBatch, /) -> AbstractContextManager[Tensor]:
        """Return a scope; entering it gives the micro-batch's share of the loss: its sum / the whole batch's size.

        Backward runs inside the scope: adapters stay applied until then, as gradient checkpointing needs. Every draw
        depends on the seed, the step and the sample's place in the batch alone, not on how the batch is cut.
        """
        ...

    def not_finite(self, step: int, micro_batch: MicroBatch, /) -> Sequence[str]:
        """Name the samples of a micro-batch whose loss is not finite, in words that let a user find them."""
        ...

    def evaluate(self) -> Evaluation:
        """Measure the module as it is now; called without gradients."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs besides the stage's own optimisation. Intervals are in steps, 0: never."""

    recipe: str = "{}"
    """JSON description that a checkpoint must match to be resumed, but for the `steps` of the stage, which may grow."""
    checkpoint_every: int = 0
    """A checkpoint is also written where the training stops."""
    evaluate_every: int = 0
    """Unless it is 0, the last step is evaluated too."""
    log_every: int = 0
    stop_after: int | None = None
    """Stop early after so many updates in this process, leaving a checkpoint; for tests and trials."""
    shard: bool = False
    """Several processes hold a shard of the weights, gradients and optimiser each (FSDP2), where all of them would not
    fit. The stage's module is cut up in place: read the result from the folder with `checkpoint.load_weights`."""

    @classmethod
    def of(cls, recipe: Recipe, description: str, stop_after: int | None = None) -> LoopConfig:
        """Take the intervals of a recipe; `description`: see `recipe` above."""
        return cls(description, recipe.checkpoint_every, recipe.evaluate_every, recipe.log_every, stop_after)


_IN_MEMORY = LoopConfig()


def train_stage(stage: Stage, config: StageConfig, loop: LoopConfig = _IN_MEMORY, folder: Path | None = None) -> bool:
    """Train a stage to the end, from the last checkpoint in `folder` if there is one. True when every step is made.

    Without a folder nothing is written: no checkpoints, no curves. A finished stage's module holds its EMA weights,
    where the stage keeps some. Every process of a training calls this alike; one of them writes.
    """
    trainer = Trainer(stage, config, loop, folder)
    trainer.run(None if loop.stop_after is None else trainer.step + loop.stop_after)
    if trainer.step < config.steps:
        return False
    trainer.ema.copy_to_module()
    return True


class Trainer:
    """One stage in training, at some step: its optimiser, its EMA weights, and its checkpoints if it has a folder."""

    def __init__(
        self, stage: Stage, config: StageConfig, loop: LoopConfig = _IN_MEMORY, folder: Path | None = None
    ) -> None:
        """Resume from the checkpoint in `folder`, if there is one."""
        if loop.shard and (config.matrix_learning_rate or config.stack_learning_rate):
            raise OpenwuError(
                "shard: Muon needs whole matrices and cannot train sharded weights; set matrix_learning_rate to 0, "
                "and stack_learning_rate, or train without shard"
            )
        self.stage, self.config, self.loop, self.folder = stage, config, loop, folder
        self.processes = Processes.join(next(stage.trained.parameters()).device)
        self.wrapper = wrap_distributed(stage.trained, self.processes, loop.shard)
        self.optimizer = StageOptimizer(stage.trained, config)
        self.ema = EmaWeights(stage.trained, config.ema)
        self.step = 0
        """Updates made so far."""
        if folder is not None:
            self.step = load_state(folder, stage.trained, self.optimizer, loop.recipe, self.ema, stage=stage.name)
            self.processes.check_same_step(self.step, folder)

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """The parts of every batch that this process computes, one after another."""
        first, count = self.processes.rank * self.config.accumulate, self.processes.count * self.config.accumulate
        return [MicroBatch(first + i, count) for i in range(self.config.accumulate)]

    def run(self, until: int | None = None) -> None:
        """Train until this many updates are made in all; None: to the end."""
        config, loop = self.config, self.loop
        stop = config.steps if until is None else min(config.steps, until)
        if self.step >= stop:
            return
        with self._curves() as curves, self._progress() as bar:
            began = time.monotonic()
            while self.step < stop:
                loss, gradient_norm = self.update()
                bar.update()
                if _is_due(loop.log_every, self.step) and curves is not None:
                    bar.set_postfix(loss=f"{loss:.3f}")
                    curves.add_scalar("loss", loss, self.step)
                    curves.add_scalar("gradient_norm", gradient_norm, self.step)
                    rate = config.learning_rate * learning_rate_factor(config, self.step - 1)
                    curves.add_scalar("learning_rate", rate, self.step)
                if loop.evaluate_every and (_is_due(loop.evaluate_every, self.step) or self.step == config.steps):
                    self._evaluate(curves)
                if self.folder is not None and (_is_due(loop.checkpoint_every, self.step) or self.step == stop):
                    self._save(self.folder, began)
                    began = time.monotonic()
        self.processes.barrier()

    def update(self) -> tuple[float, float]:
        """Make one update; return the batch's loss and the gradient's norm before clipping.

        Raises OpenwuError, before any weight changes, where one of them is not finite.
        """
        parameters = [each for each in self.stage.trained.parameters() if each.requires_grad]
        self.optimizer.zero_grad()
        total = torch.zeros((), device=parameters[0].device)
        micro_batches = self.micro_batches
        for micro_batch in micro_batches:
            more_follow = micro_batch is not micro_batches[-1]
            with no_gradient_sync(self.wrapper, enabled=more_follow), ExitStack() as scope:
                loss: Tensor = self.wrapper(partial(scope.enter_context, self.stage.loss(self.step, micro_batch)))
                # Processes' gradients are averaged when they are synchronised; their sum is wanted.
                torch.autograd.backward(loss * self.processes.count)
                total = total + loss.detach()
        batch_loss = float(self.processes.all_reduce_sum(total))
        if not math.isfinite(batch_loss):
            raise self._diverged(f"the loss is {batch_loss}")
        norm = float(full_tensor(nn.utils.clip_grad_norm_(parameters, self.config.clip)))
        if not math.isfinite(norm):
            raise self._diverged(f"the loss is {batch_loss:.4g}, but its gradient's norm is {norm}")
        self.optimizer.step(learning_rate_factor(self.config, self.step))
        self.ema.update(self.step)
        self.step += 1
        return batch_loss, norm

    def _evaluate(self, curves: SummaryWriter | None) -> None:
        """Every process evaluates, since each may hold a shard of the weights; the main one logs."""
        with torch.no_grad(), self.ema.applied():
            evaluation: Evaluation = self.wrapper(self.stage.evaluate)
        if curves is None:
            return
        for name, value in evaluation.scalars.items():
            curves.add_scalar(name, value, self.step)
        if evaluation.picture is not None:
            curves.add_image("validation", evaluation.picture, self.step)
        if evaluation.text:
            curves.add_text("samples", evaluation.text, self.step)

    def _save(self, folder: Path, began: float) -> None:
        """Write a checkpoint, and the seconds since `began` as a line of the stage's record."""
        main = self.processes.main
        save_state(folder, self.stage.trained, self.optimizer, self.step, self.loop.recipe, self.ema, main)
        if main:
            with (folder / SECONDS).open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - began:.1f}\n")

    def _diverged(self, what: str) -> OpenwuError:
        """The error that names the samples whose loss is not finite."""
        with torch.no_grad():
            own = [
                sample
                for micro_batch in self.micro_batches
                for sample in self.wrapper(partial(self.stage.not_finite, self.step, micro_batch))
            ]
        samples = self.processes.all_gather(own)
        named = (
            f"Samples whose loss is not finite: {', '.join(samples)}" if samples else "Every sample's loss is finite"
        )
        return OpenwuError(
            f"{self.stage.name}: {what} at step {self.step}; the last checkpoint is kept. {named}. "
            "Look at them, or lower learning_rate or clip"
        )

    @contextmanager
    def _curves(self) -> Iterator[SummaryWriter | None]:
        """TensorBoard's writer in the main process of a training that has a folder."""
        if self.folder is None or not self.processes.main:
            yield None
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder), purge_step=self.step + 1) as curves:
            yield curves

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.stage.name,
            unit="step",
            disable=not self.processes.main,
        )


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
