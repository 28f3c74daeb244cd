"""The training loop: a stage's loss goes in, an updated module and its curves come out.

A stage says what is trained and what the loss of a step is; the loop knows nothing of pictures. Every random draw of a
step depends on the seed and the step alone, so a training that was killed continues to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from openwu.errors import OpenwuError
from openwu.training.checkpoint import load_state, save_state
from openwu.training.optimizer import StageOptimizer
from openwu.training.recipe import StageConfig

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

    def loss(self, step: int) -> Tensor: ...

    def not_finite(self, step: int) -> Sequence[str]:
        """The samples of a step whose loss is not finite, in words that let a user find them."""
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


def part_of_peak(config: StageConfig, step: int) -> float:
    """The learning rates of a step as part of their peaks: linear warm-up, constant, linear decay to 0."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(rise, fall, 1.0)


def train_stage(stage: Stage, config: StageConfig, loop: LoopConfig, folder: Path) -> bool:
    """Train to the end, from the last checkpoint in `folder` if there is one. True when every step has been made."""
    module = stage.trained
    optimizer = StageOptimizer(module, config)
    step = load_state(folder, module, optimizer, loop.recipe)
    if step >= config.steps:
        return True
    stop = config.steps if loop.stop_after is None else min(config.steps, step + loop.stop_after)
    with (
        SummaryWriter(str(folder), purge_step=step) as curves,
        tqdm(total=config.steps, initial=step, desc=stage.name, unit="step") as bar,
    ):
        began = time.monotonic()
        while step < stop:
            loss, norm = _update(stage, module, optimizer, config, step)
            step += 1
            bar.update()
            if step % loop.log_every == 0:
                bar.set_postfix(loss=f"{loss:.3f}")
                curves.add_scalar("loss", loss, step)
                curves.add_scalar("gradient_norm", norm, step)
                curves.add_scalar("learning_rate", config.learning_rate * part_of_peak(config, step - 1), step)
            if step % loop.evaluate_every == 0 or step == config.steps:
                _log_evaluation(curves, stage.evaluate(), step)
            if step % loop.checkpoint_every == 0 or step == stop:
                save_state(folder, module, optimizer, step, loop.recipe)
                began = _note_seconds(folder, began)
    return step >= config.steps


def _update(
    stage: Stage, module: nn.Module, optimizer: StageOptimizer, config: StageConfig, step: int
) -> tuple[float, float]:
    """One update; returns the loss and the gradient's norm before clipping."""
    loss = stage.loss(step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise _diverged(stage, step, f"the loss is {value}")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), config.clip))
    if not math.isfinite(norm):
        raise _diverged(stage, step, f"the loss is {value:.4g}, but its gradient's norm is {norm}")
    optimizer.step(part_of_peak(config, step))
    return value, norm


def _diverged(stage: Stage, step: int, what: str) -> OpenwuError:
    """Before any weight was touched; names the samples."""
    with torch.no_grad():
        samples = list(stage.not_finite(step))
    named = f"Samples whose loss is not finite: {', '.join(samples)}" if samples else "Every sample's loss is finite"
    return OpenwuError(
        f"{stage.name}: {what} at step {step}; the last checkpoint is kept. {named}. "
        "Look at them, or lower learning_rate or clip"
    )


def _note_seconds(folder: Path, began: float) -> float:
    """Add the seconds since `began` to the stage's record, a line for each checkpoint; returns the time now."""
    now = time.monotonic()
    with (folder / SECONDS).open("a", encoding="utf-8") as file:
        file.write(f"{now - began:.1f}\n")
    return now


def _log_evaluation(curves: SummaryWriter, evaluation: Evaluation, step: int) -> None:
    for name, value in evaluation.scalars.items():
        curves.add_scalar(name, value, step)
    if evaluation.picture is not None:
        curves.add_image("validation", evaluation.picture, step)
