"""What a base is trained to answer: regression, flow matching, diffusion, next token, behind one small interface.

Enters: the clean target of a batch and a generator of randomness. Leaves: a `Question`, that is what the base is given
and what it should say; and later, from what it said, the loss of every sample.

Shapes: b samples, `...` the target's own axes, n tokens of a sequence, V words of a vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.training.embedded.losses import squared_errors

IGNORED = -100
"""Token that no loss counts, as everywhere in torch."""


@dataclass(frozen=True)
class NoisySample:
    """What a base is asked in one step of training."""

    target: Tensor
    """What it should say: [b, ...], or token numbers [b, n]."""
    x_t: Tensor | None = None
    """The noisy target [b, ...]; None where the base starts from the request alone."""
    time: Tensor | None = None
    """How noisy it is [b]: 0 clean to 1 noise (flow matching), or the number of a diffusion step."""


class Objective(Protocol):
    """One kind of training."""

    def sample(self, target: Tensor, generator: torch.Generator, /) -> NoisySample:
        """A question about clean targets; the draws depend on the generator alone."""
        ...

    def losses(self, prediction: Tensor, question: NoisySample) -> Tensor:
        """The loss of every sample `[b]`."""
        ...


@dataclass(frozen=True)
class Regression:
    """The target itself in one step, by mean squared error or its logarithm."""

    floor: float | None = None
    """None: the mean squared error. A number: log(mse + floor), which weighs easy and hard samples alike."""

    def sample(self, target: Tensor, _generator: torch.Generator, /) -> NoisySample:
        return NoisySample(target)

    def losses(self, prediction: Tensor, question: NoisySample) -> Tensor:
        error = squared_errors(prediction, question.target)
        return error if self.floor is None else (error + self.floor).log()


@dataclass(frozen=True)
class FlowMatching:
    """The velocity from target to noise on a straight path (Lipman et al. 2023; Liu et al. 2023).

    x(t) = (1 - t) target + t noise, and noise - target is wanted: the direction of FLUX and Qwen-Image, in which t = 1
    is noise.
    """

    spread: float | None = 1.0
    """Times are logistic functions of normal numbers of this spread (Esser et al. 2024, section 3.1); None: uniform."""
    shift: float = 1.0
    """Times become shift * t / (1 + (shift - 1) t): above 1 nearer to noise, as large pictures need (there, 5.3.2)."""

    def __post_init__(self) -> None:
        for name in ("spread", "shift"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")

    def sample(self, target: Tensor, generator: torch.Generator) -> NoisySample:
        count = target.shape[0]
        if self.spread is None:
            time = torch.rand(count, generator=generator)
        else:
            time = torch.sigmoid(self.spread * torch.randn(count, generator=generator))
        time = (self.shift * time / (1 + (self.shift - 1) * time)).to(target.device)
        noise = _noise_like(target, generator)
        along = _spread_out(time, target)
        return NoisySample(noise - target, (1 - along) * target + along * noise, time)

    def losses(self, prediction: Tensor, question: NoisySample) -> Tensor:
        return squared_errors(prediction, question.target)


@dataclass(frozen=True)
class Diffusion:
    """Noise or velocity at a step of a diffusion (Ho et al. 2020; Salimans and Ho 2022)."""

    predicts: str = "epsilon"
    """ "epsilon": the noise; "v": sqrt(signal) noise - sqrt(1 - signal) target."""
    alphas_cumprod: Tensor = field(default_factory=lambda: scaled_linear(), repr=False)
    """How much of the target's variance is left at every step [steps], falling from near 1 to near 0: the scheduler's
    alphas_cumprod."""

    def __post_init__(self) -> None:
        if self.predicts not in ("epsilon", "v"):
            raise ValueError(f"predicts: expected 'epsilon' or 'v', got {self.predicts!r}")
        falls = bool((self.alphas_cumprod.diff() <= 0).all())
        if (
            self.alphas_cumprod.ndim != 1
            or not len(self.alphas_cumprod)
            or not falls
            or not bool((self.alphas_cumprod >= 0).all())
        ):
            raise ValueError(
                "alphas_cumprod: expected [steps] numbers from near 1 falling to near 0, "
                f"got shape {tuple(self.alphas_cumprod.shape)}"
            )

    def sample(self, target: Tensor, generator: torch.Generator) -> NoisySample:
        step = torch.randint(len(self.alphas_cumprod), (target.shape[0],), generator=generator)
        kept = _spread_out(self.alphas_cumprod[step].to(target), target)
        noise = _noise_like(target, generator)
        x_t = kept.sqrt() * target + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * target
        return NoisySample(noise if self.predicts == "epsilon" else velocity, x_t, step.to(target.device))

    def losses(self, prediction: Tensor, question: NoisySample) -> Tensor:
        return squared_errors(prediction, question.target)


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of every token of a text given those before it; targets `[b, n]`, IGNORED where nothing counts."""

    def sample(self, target: Tensor, _generator: torch.Generator, /) -> NoisySample:
        if target.is_floating_point() or target.ndim != 2:
            raise ValueError(f"target: expected token numbers [b, n], got {target.dtype} {list(target.shape)}")
        return NoisySample(target)

    def losses(self, prediction: Tensor, question: NoisySample) -> Tensor:
        """`said`: logits `[b, n, V]` at every token; those at the last one say nothing about the text."""
        target = question.target[:, 1:]
        each = F.cross_entropy(
            prediction[:, :-1].float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none"
        )
        return each.sum(1) / (target != IGNORED).sum(1).clamp(min=1)


def scaled_linear(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """The signal of Stable Diffusion's schedule `[steps]`: betas linear in their square roots."""
    betas = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def _noise_like(target: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, drawn where the generator lives: the same numbers on every device."""
    return torch.randn(target.shape, generator=generator).to(target)


def _spread_out(values: Tensor, like: Tensor) -> Tensor:
    """`[b]` -> `[b, 1, ...]`"""
    return values.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
