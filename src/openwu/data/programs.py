"""Edits that are on no list: programs of one to three parametric operations, drawn at random, to be shown by example.

A program does the same to every picture. As in the edit suite, classical operations only make training and test pairs.
Two families are held out of every training: what a model does with them, it did not learn from their like.

Shapes: h and w the sides of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.backbones.embedded.network import place_planes
from openwu.data.suite.operators import gaussian, luma, saturation

Operation = Callable[[Tensor, Tensor], Tensor]
"""(picture `[3, h, w]` in 0..1, standard normal noise `[1, h, w]`) -> changed picture, in 0..1 after clamping."""


@dataclass(frozen=True)
class Draws:
    """Random parameters of a program."""

    generator: torch.Generator

    def uniform(self, low: float, high: float, count: int | None = None) -> Tensor:
        """Draw a number, or `[count]` of them."""
        return low + (high - low) * torch.rand(() if count is None else (count,), generator=self.generator)

    def signed(self, low: float, high: float) -> float:
        """Draw a size with either sign."""
        return float(self.uniform(low, high)) * (1 if float(self.uniform(0, 1)) < 0.5 else -1)

    def index(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))


@dataclass(frozen=True)
class Program:
    """Operations in order."""

    families: tuple[str, ...]
    operations: tuple[Operation, ...]

    def __call__(self, picture: Tensor, noise: Tensor) -> Tensor:
        """Change a picture `[3, h, w]` in 0..1; `noise` `[1, h, w]`, standard normal, is what grain is made of."""
        for operation in self.operations:
            picture = operation(picture, noise).clamp(0, 1)
        return picture

    @property
    def colour_only(self) -> bool:
        """Whether every pixel's new colour depends on its colour alone."""
        return set(self.families) <= set(COLOUR_FAMILIES)


def draw_program(generator: torch.Generator, families: Sequence[str] | None = None, longest: int = 3) -> Program:
    """Draw one to `longest` different operations of some families (None: those of training), colours first."""
    draws = Draws(generator)
    known = TRAINED_FAMILIES if families is None else tuple(families)
    count = 1 + draws.index(min(longest, len(known)))
    order = torch.randperm(len(known), generator=generator)[:count].tolist()
    names = sorted((known[i] for i in order), key=list(FAMILIES).index)
    return Program(tuple(names), tuple(FAMILIES[name](draws) for name in names))


def _curve(knots: Tensor) -> Callable[[Tensor], Tensor]:
    """A piecewise linear function of numbers in 0..1 through equidistant knots `[k]`."""

    def apply(x: Tensor) -> Tensor:
        at = x.clamp(0, 1) * (len(knots) - 1)
        low = at.floor().clamp(max=len(knots) - 2).long()
        return torch.lerp(knots[low], knots[low + 1], at - low)

    return apply


def _smooth_curve(draws: Draws, size: float) -> Callable[[Tensor], Tensor]:
    """A random smooth, mostly rising curve."""
    line = torch.linspace(0, 1, 33)
    waves = sum(float(draws.uniform(-1, 1)) / k * torch.sin(k * math.pi * line) for k in (1, 2, 3))
    ends = draws.uniform(-0.5, 0.5, 2) * size
    return _curve(line + size * waves + torch.lerp(ends[0], ends[1], line))


def _exposure(draws: Draws) -> Operation:
    gain = 2 ** draws.signed(0.25, 1.1)
    return lambda x, _: x * gain


def _gamma(draws: Draws) -> Operation:
    power = math.exp(draws.signed(0.15, 0.7))
    return lambda x, _: x.clamp(min=1e-5) ** power


def _contrast(draws: Draws) -> Operation:
    amount, middle = draws.signed(0.2, 0.6), float(draws.uniform(0.35, 0.65))
    return lambda x, _: middle + (1 + amount) * (x - middle)


def _curves(draws: Draws) -> Operation:
    size = float(draws.uniform(0.06, 0.2))
    curves = [_smooth_curve(draws, size) for _ in range(3)]
    return lambda x, _: torch.stack([curve(plane) for curve, plane in zip(curves, x, strict=True)])


def _tone(draws: Draws) -> Operation:
    curve = _smooth_curve(draws, float(draws.uniform(0.1, 0.25)))
    return lambda x, _: curve(x)


def _matrix(draws: Draws) -> Operation:
    change = draws.uniform(-1, 1, 9).view(3, 3) * float(draws.uniform(0.1, 0.35))
    change = change - change.mean(1, keepdim=True) * float(draws.uniform(0, 1))
    return lambda x, _: x + torch.einsum("ij,jhw->ihw", change, x)


def _saturation(draws: Draws) -> Operation:
    factor = 1 + draws.signed(0.25, 0.85)
    return lambda x, _: saturation(x, factor)


def _white(draws: Draws) -> Operation:
    gains = torch.exp(draws.uniform(-0.3, 0.3, 3)).view(3, 1, 1)
    return lambda x, _: x * gains


def _hues(draws: Draws) -> Operation:
    """Saturation and lightness depend on the hue: six bands about the circle."""
    keep, lift = draws.uniform(0.4, 1.6, 6), draws.uniform(-0.25, 0.25, 6)

    def apply(x: Tensor, _: Tensor) -> Tensor:
        grey = luma(x)
        away = x - grey
        a, b = away[0] - 0.5 * (away[1] + away[2]), math.sqrt(0.75) * (away[1] - away[2])
        angle = (torch.atan2(b, a) / (2 * math.pi)) % 1 * 6
        low = angle.floor().long() % 6
        part = angle - angle.floor()
        factor, added = (torch.lerp(each[low], each[(low + 1) % 6], part) for each in (keep, lift))
        strength = (a.square() + b.square()).sqrt()
        return grey + away * factor + added * strength

    return apply


def _split(draws: Draws) -> Operation:
    """Shadows take one colour, lights another."""
    dark, light = (draws.uniform(-0.18, 0.18, 3).view(3, 1, 1) for _ in range(2))

    def apply(x: Tensor, _: Tensor) -> Tensor:
        grey = luma(x)
        return x + (1 - grey) ** 2 * dark + grey**2 * light

    return apply


def _table(draws: Draws) -> Operation:
    """A smooth random table of colours, read by interpolation."""
    size = float(draws.uniform(0.06, 0.16))
    shift = size * torch.randn(1, 3, 4, 4, 4, generator=draws.generator)

    def apply(x: Tensor, _: Tensor) -> Tensor:
        at = (2 * x - 1).permute(1, 2, 0)[None, None]  # grid_sample wants the last axis first: blue, green, red
        return x + F.grid_sample(shift, at, align_corners=True, padding_mode="border")[0, :, 0]

    return apply


def _fade(draws: Draws) -> Operation:
    black, white = float(draws.uniform(0.04, 0.22)), float(draws.uniform(0.82, 1.0))
    return lambda x, _: black + (white - black) * x


def _tint(draws: Draws) -> Operation:
    amount, colour = float(draws.uniform(0.2, 0.6)), draws.uniform(0.4, 1.6, 3).view(3, 1, 1)
    return lambda x, _: x + amount * (luma(x) * colour - x)


def _posterise(draws: Draws) -> Operation:
    levels = 3 + draws.index(6)
    return lambda x, _: (x * (levels - 1)).round() / (levels - 1)


def _duotone(draws: Draws) -> Operation:
    """Grey values become colours between two: held out."""
    dark, light = draws.uniform(0.0, 0.4, 3).view(3, 1, 1), draws.uniform(0.6, 1.0, 3).view(3, 1, 1)
    return lambda x, _: torch.lerp(dark, light, luma(x))


def _vignette(draws: Draws) -> Operation:
    amount, start = draws.signed(0.25, 0.75), float(draws.uniform(0.1, 0.5))

    def apply(x: Tensor, _: Tensor) -> Tensor:
        radius = (place_planes(*x.shape[-2:]).square().sum(0, keepdim=True) / 2).sqrt()
        return x * (1 - amount * ((radius - start) / (1 - start)).clamp(min=0) ** 1.5)

    return apply


def _slope(draws: Draws) -> Operation:
    """Light that falls off in one direction."""
    angle, amount = float(draws.uniform(0, 2 * math.pi)), float(draws.uniform(0.2, 0.6))

    def apply(x: Tensor, _: Tensor) -> Tensor:
        y, across = place_planes(*x.shape[-2:])
        light: Tensor = 1 + amount * (math.sin(angle) * y + math.cos(angle) * across)
        return x * light

    return apply


def _blur(draws: Draws) -> Operation:
    sigma = float(draws.uniform(0.6, 2.5))
    return lambda x, _: gaussian(x, sigma)


def _sharpen(draws: Draws) -> Operation:
    amount, sigma = float(draws.uniform(0.4, 1.8)), float(draws.uniform(0.8, 2.0))
    return lambda x, _: x + amount * (x - gaussian(x, sigma))


def _local(draws: Draws) -> Operation:
    amount, sigma = draws.signed(0.25, 0.7), float(draws.uniform(4, 10))
    return lambda x, _: x + amount * (x - gaussian(x, sigma))


def _glow(draws: Draws) -> Operation:
    """Lights spread softly over their surroundings: held out."""
    amount, sigma = float(draws.uniform(0.3, 0.8)), float(draws.uniform(3, 8))
    return lambda x, _: x + amount * (1 - (1 - x) * (1 - gaussian(x, sigma)) - x)


def _grain(draws: Draws) -> Operation:
    size = float(draws.uniform(0.02, 0.1))
    return lambda x, noise: x + size * noise


COLOUR_OPERATIONS: Mapping[str, Callable[[Draws], Operation]] = {
    "exposure": _exposure,
    "gamma": _gamma,
    "contrast": _contrast,
    "curves": _curves,
    "tone": _tone,
    "matrix": _matrix,
    "saturation": _saturation,
    "white": _white,
    "hues": _hues,
    "table": _table,
    "split": _split,
    "fade": _fade,
    "tint": _tint,
    "duotone": _duotone,
    "posterise": _posterise,
}
PLACE_OPERATIONS: Mapping[str, Callable[[Draws], Operation]] = {
    "local": _local,
    "blur": _blur,
    "sharpen": _sharpen,
    "glow": _glow,
    "vignette": _vignette,
    "slope": _slope,
    "grain": _grain,
}
FAMILIES: Mapping[str, Callable[[Draws], Operation]] = {**COLOUR_OPERATIONS, **PLACE_OPERATIONS}
"""Every family by name, in the order in which a program applies them."""
COLOUR_FAMILIES = tuple(COLOUR_OPERATIONS)
"""Families that change colours pixel by pixel."""
HELD_OUT_FAMILIES = ("duotone", "glow")
"""One of colour and one of space that no training sees."""
TRAINED_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT_FAMILIES)
