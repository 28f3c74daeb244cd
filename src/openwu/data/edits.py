"""The edit suite: each sub-task is one function source -> (input, target), used only to make training and test pairs.

Enters: a clean photograph `[3, h, w]` in 0..1, a plane of standard normal noise `[1, h, w]`, and a random generator for
whatever varies from sample to sample. Leaves: the pair (input, target), both `[3, h, w]` in 0..1. The model that learns
from the pairs sees the same noise plane, so that added grain is a function of its inputs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
LUMA = (0.299, 0.587, 0.114)
"""Rec. 601 weights of red, green and blue."""


@dataclass(frozen=True)
class Edit:
    """One sub-task of the suite."""

    name: str
    family: str
    make_pair: Callable[[Tensor, Tensor, torch.Generator], Pair]
    opposite: str | None = None
    """The sub-task that asks for the contrary."""


def _forward(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, torch.Generator], Pair]:
    """A sub-task whose input is the photograph and whose target is a fixed change of it."""
    return lambda source, _noise, _generator: (source, change(source).clamp(0, 1))


def luma(x: Tensor) -> Tensor:
    """`[3, h, w]` -> `[1, h, w]`"""
    return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(0, keepdim=True)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of `[c, h, w]`, mirrored at the borders."""
    radius = min(max(1, round(3 * sigma)), x.shape[-1] - 1, x.shape[-2] - 1)
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    padded = F.pad(x[:, None], (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[..., None, :]), kernel[..., :, None])[:, 0]


def saturation(x: Tensor, factor: float) -> Tensor:
    grey = luma(x)
    return grey + factor * (x - grey)


def gains(red: float, green: float, blue: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * x.new_tensor((red, green, blue)).view(3, 1, 1)


def sharpened(x: Tensor) -> Tensor:
    return x + 1.2 * (x - gaussian(x, 1.2))


def softened(x: Tensor) -> Tensor:
    return 0.3 * x + 0.7 * gaussian(x, 1.6)


def sepia(x: Tensor) -> Tensor:
    return luma(x) * x.new_tensor((1.08, 0.86, 0.64)).view(3, 1, 1) + 0.02


def pencil(x: Tensor) -> Tensor:
    """Colour-dodge of the grey picture with its own blurred negative: outlines on white paper."""
    grey = luma(x)
    return (grey / (gaussian(grey, 2.0) + 0.05)).clamp(0, 1).square().expand_as(x)


def aged(x: Tensor, noise: Tensor, chroma: float, contrast: float, grain: float) -> Tensor:
    """Faded dyes, yellowed paper, lost contrast, a soft lens and film grain."""
    x = saturation(gaussian(x, 0.8), chroma)
    x = 0.5 + contrast * (x - 0.45) + grain * noise
    return (x * x.new_tensor((1.06, 0.97, 0.78)).view(3, 1, 1)).clamp(0, 1)


def fogged(x: Tensor, density: float) -> Tensor:
    return (1 - density) * x + density * x.new_tensor((0.84, 0.86, 0.88)).view(3, 1, 1)


def jpeg(x: Tensor, quality: int) -> Tensor:
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return torch.from_numpy(np.array(decoded)).permute(2, 0, 1).to(x) / 255


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _grain(source: Tensor, noise: Tensor, _generator: torch.Generator) -> Pair:
    return source, (source + 0.1 * noise).clamp(0, 1)


def _denoise(source: Tensor, _noise: Tensor, generator: torch.Generator) -> Pair:
    sigma = uniform(generator, 0.05, 0.15)
    return (source + sigma * torch.randn(source.shape, generator=generator)).clamp(0, 1), source


def _deblur(source: Tensor, _noise: Tensor, generator: torch.Generator) -> Pair:
    return gaussian(source, uniform(generator, 1.0, 2.0)), source


def _age(source: Tensor, noise: Tensor, _generator: torch.Generator) -> Pair:
    return source, aged(source, noise, chroma=0.5, contrast=0.65, grain=0.05)


def _restore(source: Tensor, _noise: Tensor, generator: torch.Generator) -> Pair:
    scratch = torch.randn(source[:1].shape, generator=generator)
    chroma, contrast = uniform(generator, 0.4, 0.6), uniform(generator, 0.55, 0.75)
    return aged(source, scratch, chroma, contrast, uniform(generator, 0.03, 0.07)), source


def _dehaze(source: Tensor, _noise: Tensor, generator: torch.Generator) -> Pair:
    return fogged(source, uniform(generator, 0.35, 0.6)), source


def _remove_jpeg(source: Tensor, _noise: Tensor, generator: torch.Generator) -> Pair:
    return jpeg(source, round(uniform(generator, 10, 30))), source


EDITS: dict[str, Edit] = {
    edit.name: edit
    for edit in (
        Edit("brighten", "light", _forward(lambda x: x ** (1 / 1.7)), opposite="darken"),
        Edit("darken", "light", _forward(lambda x: x**1.7), opposite="brighten"),
        Edit("contrast_up", "light", _forward(lambda x: 0.5 + 1.5 * (x - 0.5)), opposite="contrast_down"),
        Edit("contrast_down", "light", _forward(lambda x: 0.5 + 0.55 * (x - 0.5)), opposite="contrast_up"),
        Edit("warm", "colour", _forward(gains(1.16, 1.0, 0.74)), opposite="cool"),
        Edit("cool", "colour", _forward(gains(0.76, 0.98, 1.18)), opposite="warm"),
        Edit("saturate", "colour", _forward(lambda x: saturation(x, 1.7)), opposite="black_and_white"),
        Edit("black_and_white", "colour", _forward(lambda x: luma(x).expand_as(x)), opposite="saturate"),
        Edit("sepia", "colour", _forward(sepia)),
        Edit("invert", "colour", _forward(lambda x: 1 - x)),
        Edit("blur", "sharpness", _forward(lambda x: gaussian(x, 2.5)), opposite="deblur"),
        Edit("deblur", "sharpness", _deblur, opposite="blur"),
        Edit("sharpen", "sharpness", _forward(sharpened), opposite="soften"),
        Edit("soften", "sharpness", _forward(softened), opposite="sharpen"),
        Edit("add_noise", "noise", _grain, opposite="denoise"),
        Edit("denoise", "noise", _denoise, opposite="add_noise"),
        Edit("remove_jpeg", "noise", _remove_jpeg),
        Edit("age", "age", _age, opposite="restore"),
        Edit("restore", "age", _restore, opposite="age"),
        Edit("fog", "weather", _forward(lambda x: fogged(x, 0.5)), opposite="dehaze"),
        Edit("dehaze", "weather", _dehaze, opposite="fog"),
        Edit("pencil", "style", _forward(pencil)),
    )
}
"""Every sub-task by name. One entry here and its phrasings in phrases.json add an edit."""

BASE_EDITS = ("brighten", "contrast_up", "warm", "saturate", "sharpen", "deblur", "denoise", "remove_jpeg")
"""What the frozen base learns before any adapter exists: one side of some pairs, so that retention can be measured."""

CONTRADICTORY_PAIRS: tuple[tuple[str, str], ...] = tuple(
    (edit.name, edit.opposite)
    for edit in EDITS.values()
    if edit.opposite is not None and list(EDITS).index(edit.name) < list(EDITS).index(edit.opposite)
)
