"""Retention: what a training that goes on from finished weights loses of what those weights could do.

`Retention` scores the starting model once and again whenever the training is evaluated; `WatchedStage` adds that to any
stage. Scores are higher for better, for example the PSNR of every known edit in dB.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from openwu.errors import OpenwuError
from openwu.training.distributed import is_main
from openwu.training.loop import Evaluation, Stage
from openwu.training.micro_batch import FULL_BATCH, MicroBatch


class RetentionWarning(UserWarning):
    """Warn that a training loses what its start could do."""


class Retention:
    """Scores of known tasks before a training and now."""

    def __init__(self, measure: Callable[[], Mapping[str, float]], allowed: float, unit: str, advice: str) -> None:
        """Measure the start. `allowed`: mean loss from which a warning is given; `advice`: what to do then."""
        self._measure, self.allowed, self.unit, self.advice = measure, allowed, unit, advice
        self.before = dict(self._scores())
        """Task -> score of the starting model."""

    @property
    def mean(self) -> float:
        """The starting model's mean score."""
        return sum(self.before.values()) / len(self.before)

    def scalars(self) -> dict[str, float]:
        """Score the model as it is now: `known/mean`, `known/lost` and `known/worst`; warn where too much is lost."""
        now = self._scores()
        lost = {name: score - now[name] for name, score in self.before.items()}
        mean, worst = sum(lost.values()) / len(lost), max(lost, key=lambda name: lost[name])
        if mean > self.allowed and is_main():
            warnings.warn(
                f"{mean:.2f} {self.unit} are lost on average over {len(lost)} known tasks (most on {worst!r}: "
                f"{lost[worst]:.2f}); {self.advice}",
                RetentionWarning,
                stacklevel=2,
            )
        return {"known/mean": sum(now.values()) / len(now), "known/lost": mean, "known/worst": lost[worst]}

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
        return Evaluation({**found.scalars, **self.retention.scalars()}, found.picture)
