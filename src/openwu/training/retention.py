"""Retention: keep what finished weights, or a frozen base, could do before, and measure what is lost of it.

`RetentionObjective` is a loss beside a generator's own: under the batch's adapters the base shall answer unrelated
inputs as it does without any. `Retention` scores a starting model once and again whenever a training that goes on from
it is evaluated; `WatchedStage` adds that to any stage. Scores are higher for better, for example PSNR in dB.

Shapes: b rows of a batch, n tokens, V vocabulary size, `...` axes of the base's prediction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openwu.errors import OpenwuError
from openwu.training.distributed import is_main
from openwu.training.loop import Evaluation, Stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch, take_rows
from openwu.training.objectives import squared_errors

Inputs = TypeVar("Inputs")
"""Rows of unrelated inputs; only the user's own functions look into them."""

LARGE = 2.0
"""Mean relative norm of generated updates from which a warning is given: they outweigh the weights."""


DRAWN_BACK = 5
"""Most trials of drawing weights back towards their start."""
DRAWN_BACK_MARGIN = 0.95
"""Factor on the share at which just as much would be lost as is allowed, were the loss exactly quadratic."""


class RetentionWarning(UserWarning):
    """Warn that a training loses what its start, or its frozen base, could do."""


@dataclass(frozen=True)
class RetentionObjective(Generic[Inputs]):
    """Keep the base's own answers on inputs that have nothing to do with the request (Li and Hoiem 2016).

    A step costs one more pass of the base without gradients and one with them.
    """

    inputs: Callable[[int], Inputs]
    """Unrelated inputs of a step, by its number alone; as many rows as the step's batch has."""
    predict: Callable[[Inputs], Tensor]
    """The base's prediction `[b, ...]`; called without an adapter for its own answer, then under the adapters."""
    losses: Callable[[Inputs, Tensor, Tensor], Tensor] = lambda _, prediction, own: squared_errors(prediction, own)
    """Loss of every row `[b]` from (inputs, prediction under the adapters, the base's own): by default the mean squared
    error; `token_divergence` for logits."""
    weight: float = 1.0
    """Factor on the mean loss beside the training's own."""
    rows: Callable[[Inputs, slice], Inputs] = take_rows
    """Select rows of the inputs, for micro-batches and several processes."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise OpenwuError(f"weight: expected a number above 0, got {self.weight}; leave retention out instead")


def token_divergence(prediction: Tensor, own: Tensor, mask: Tensor) -> Tensor:
    """Return KL(own || prediction) in nats per token, the mean over the tokens of every text `[b]`.

    prediction, own: logits `[b, n, V]`. mask: 1 for tokens that count, `[b, n]`.
    """
    each = F.kl_div(
        F.log_softmax(prediction.float(), -1), F.log_softmax(own.float(), -1), reduction="none", log_target=True
    ).sum(-1)
    return (each * mask).sum(1) / mask.sum(1).clamp(min=1)


def warn_of_large_updates(norm: float) -> None:
    """Warn where the mean relative norm of generated updates is above LARGE."""
    if norm > LARGE and is_main():
        warnings.warn(
            f"generated updates are {norm:.1f} times as large as the weights that they are added to; the base may lose "
            "what it could do. Add a RetentionObjective to the stage, or lower alpha or the learning rates",
            RetentionWarning,
            stacklevel=2,
        )


class Retention:
    """Scores of known tasks before a training and now."""

    def __init__(
        self,
        measure: Callable[[], Mapping[str, float]],
        allowed: float,
        unit: str,
        advice: str,
        allowed_each: float = math.inf,
    ) -> None:
        """Measure the start.

        `allowed`, `allowed_each`: mean loss, and loss of one task, from which a warning is given; `advice`: what to do
        then.
        """
        self._measure, self.unit, self.advice = measure, unit, advice
        self.allowed, self.allowed_each = allowed, allowed_each
        self.before = dict(self._scores())
        """Task -> score of the starting model."""

    def follow(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """Score another module from now on, such as a copy with further labels; `before` stays the start's."""
        self._measure = measure

    @property
    def mean(self) -> float:
        """The starting model's mean score."""
        return sum(self.before.values()) / len(self.before)

    def lost(self) -> dict[str, float]:
        """Return how much of every known task's score is lost now."""
        now = self._scores()
        return {name: score - now[name] for name, score in self.before.items()}

    def draw_back(self, trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
        """Move weights towards where they started until no more than is allowed is lost; return the share that stays.

        trained, start: parameters by name, changed in place, and what they were. What is lost grows with the square of
        the distance from the start, what was learned in proportion to it: a small step back keeps most of a new task
        (Wortsman et al. 2022). Each trial costs one measurement; after DRAWN_BACK of them the last share stands, and a
        warning is given where it still loses too much.
        """
        if math.isinf(self.allowed) and math.isinf(self.allowed_each):
            return 1.0
        end = {name: value.detach().clone() for name, value in trained.items()}
        share, lost = 1.0, self.lost()
        for _ in range(DRAWN_BACK):
            excess = self._excess(lost)
            if excess <= 1 or not end:
                break
            share *= min(0.9, DRAWN_BACK_MARGIN * excess**-0.5)
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(torch.lerp(start[name], end[name], share))
            lost = self.lost()
        self._warn(lost, f", although the weights were drawn back to {share:.0%} of their way")
        return share

    def scalars(self) -> dict[str, float]:
        """Score the model as it is now: `known/mean`, `known/lost` and `known/worst`; warn where too much is lost."""
        lost = self.lost()
        self._warn(lost)
        mean = _mean(lost)
        return {"known/mean": self.mean - mean, "known/lost": mean, "known/worst": max(lost.values())}

    def _excess(self, lost: Mapping[str, float]) -> float:
        """How many times too much is lost, on average or of one task."""
        return max(_mean(lost) / self.allowed, max(lost.values()) / self.allowed_each)

    def _warn(self, lost: Mapping[str, float], how: str = "") -> None:
        if self._excess(lost) > 1 and is_main():
            worst = max(lost, key=lambda name: lost[name])
            warnings.warn(
                f"{_mean(lost):.2f} {self.unit} are lost on average over {len(lost)} known tasks (most on {worst!r}: "
                f"{lost[worst]:.2f}){how}; {self.advice}",
                RetentionWarning,
                stacklevel=3,
            )

    def record(self) -> dict[str, object]:
        """Return the scores before and now of every known task for a provenance."""
        now = self._scores()
        each = {name: [round(score, 4), round(now[name], 4)] for name, score in self.before.items()}
        after = sum(now.values()) / len(now)
        return {"unit": self.unit, "before": round(self.mean, 4), "after": round(after, 4), "each": each}

    def _scores(self) -> Mapping[str, float]:
        with torch.no_grad():
            found = self._measure()
        if not found:
            raise OpenwuError("retention: expected scores of at least one known task, got none")
        return found


def _mean(lost: Mapping[str, float]) -> float:
    return sum(lost.values()) / len(lost)


class WatchedStage:
    """A stage whose evaluations also report what is lost of known tasks."""

    def __init__(self, stage: Stage, retention: Retention) -> None:
        self.stage, self.retention, self.name = stage, retention, stage.name

    @property
    def trained(self) -> nn.Module:
        """The stage's module."""
        return self.stage.trained

    def loss(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> AbstractContextManager[Tensor]:
        """Return the stage's loss."""
        return self.stage.loss(step, micro_batch)

    def not_finite(self, step: int, micro_batch: MicroBatch = FULL_BATCH) -> Sequence[str]:
        """Name the stage's samples whose loss is not finite."""
        return self.stage.not_finite(step, micro_batch)

    def evaluate(self) -> Evaluation:
        """Evaluate the stage, then the known tasks."""
        found = self.stage.evaluate()
        return replace(found, scalars={**found.scalars, **self.retention.scalars()})
