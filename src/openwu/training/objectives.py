"""Training objectives: regression, flow matching, diffusion and next token, behind one small interface.

`sample` draws the noisy input of the base and its target from clean data; `losses` compares the base's prediction with
that target.

Shapes: b samples, `...` the target's own axes, n tokens of a sequence, V words of a vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Token that no loss counts, as everywhere in torch."""


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of every sample in float32: `[b, ...]` twice -> `[b]`."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction: expected the target's shape {list(target.shape)}, got {list(prediction.shape)}")
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


@dataclass(frozen=True)
class NoisySample:
    """The base's noisy input in one training step, and the target of its prediction."""

    target: Tensor
    """What the base should predict: [b, ...], or token numbers [b, n]."""
    x_t: Tensor | None = None
    """The noisy data [b, ...]; None where the base starts from the request alone."""
    time: Tensor | None = None
    """Its noise level [b]: 0 clean to 1 noise (flow matching), or the index of a diffusion step."""


class Objective(Protocol):
    """Draws noisy samples and computes the loss of predictions."""

    def sample(self, target: Tensor, generator: torch.Generator, /) -> NoisySample:
        """Draw the noisy sample of clean data; the draws depend on the generator alone."""
        ...

    def losses(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Return the loss of every sample `[b]`."""
        ...


@dataclass(frozen=True)
class Regression:
    """Predict the data themselves in one step, by mean squared error or its logarithm."""

    floor: float | None = None
    """None: the mean squared error. A number: log(mse + floor), which weighs easy and hard samples alike."""

    def sample(self, target: Tensor, _generator: torch.Generator, /) -> NoisySample:
        return NoisySample(target)

    def losses(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        error = squared_errors(prediction, sample.target)
        return error if self.floor is None else (error + self.floor).log()


@dataclass(frozen=True)
class FlowMatching:
    """Predict the velocity from data to noise on a straight path (Lipman et al. 2023; Liu et al. 2023).

    x(t) = (1 - t) data + t noise; the target is noise - data, the direction of FLUX and Qwen-Image, in which t = 1 is
    noise.
    """

    logit_std: float | None = 1.0
    """Times are logit-normal with this standard deviation (Esser et al. 2024, section 3.1); None: uniform."""
    shift: float = 1.0
    """Times become shift * t / (1 + (shift - 1) t): above 1 nearer to noise, as large pictures need (there, 5.3.2)."""

    def __post_init__(self) -> None:
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")

    def sample(self, target: Tensor, generator: torch.Generator) -> NoisySample:
        count = target.shape[0]
        if self.logit_std is None:
            time = torch.rand(count, generator=generator)
        else:
            time = torch.sigmoid(self.logit_std * torch.randn(count, generator=generator))
        time = (self.shift * time / (1 + (self.shift - 1) * time)).to(target.device)
        noise = _noise_like(target, generator)
        t = _expand_like(time, target)
        return NoisySample(noise - target, (1 - t) * target + t * noise, time)

    def losses(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        return squared_errors(prediction, sample.target)


@dataclass(frozen=True)
class Diffusion:
    """Predict noise or velocity at a diffusion step (Ho et al. 2020; Salimans and Ho 2022)."""

    predicts: str = "epsilon"
    """ "epsilon": the noise; "v": sqrt(alphas_cumprod) noise - sqrt(1 - alphas_cumprod) data."""
    alphas_cumprod: Tensor = field(default_factory=lambda: scaled_linear(), repr=False)
    """The scheduler's alphas_cumprod [steps]: the data's share of the variance, falling from near 1 to near 0."""

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
        alpha = _expand_like(self.alphas_cumprod[step].to(target), target)
        noise = _noise_like(target, generator)
        x_t = alpha.sqrt() * target + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * target
        return NoisySample(noise if self.predicts == "epsilon" else velocity, x_t, step.to(target.device))

    def losses(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        return squared_errors(prediction, sample.target)


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of every token given those before it; targets `[b, n]`, IGNORED where nothing counts."""

    shifted: bool = False
    """Whether target i already is the token after the one that logits i were computed at, as of
    `CausalLM.answer_logits`; else it is that token itself."""

    def sample(self, target: Tensor, _generator: torch.Generator, /) -> NoisySample:
        if target.is_floating_point() or target.ndim != 2:
            raise ValueError(f"target: expected token numbers [b, n], got {target.dtype} {list(target.shape)}")
        return NoisySample(target)

    def losses(self, prediction: Tensor, sample: NoisySample) -> Tensor:
        """Return the mean loss of every text `[b]`; `prediction`: logits `[b, n, V]`."""
        target, logits = sample.target, prediction
        if not self.shifted:  # Of the last logits the next token is unknown.
            target, logits = target[:, 1:], prediction[:, :-1]
        each = F.cross_entropy(logits.float().transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
        return each.sum(1) / (target != IGNORED).sum(1).clamp(min=1)


def scaled_linear(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Return alphas_cumprod of Stable Diffusion's schedule `[steps]`: betas linear in their square roots."""
    betas = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def _noise_like(target: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise where the generator lives: the same numbers on every device."""
    return torch.randn(target.shape, generator=generator).to(target)


def _expand_like(values: Tensor, like: Tensor) -> Tensor:
    """`[b]` -> `[b, 1, ...]`"""
    return values.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
