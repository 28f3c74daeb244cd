"""Weather and time of day."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.data.suite.core import Edit, Pair, Scene, blend, forward, repair
from openwu.data.suite.operators import colour, gaussian, saturation, widest

RAIN_LENGTH = 11
"""Rows that a streak of rain covers; it moves a third of that to the left."""


def fogged(x: Tensor, density: float) -> Tensor:
    return blend(x, colour(x, 0.84, 0.86, 0.88).expand_as(x), density)


def rained(x: Tensor, noise: Tensor, share: float, light: float, dimmed: float = 0.1) -> Tensor:
    """Slanted streaks that start at the highest values of a plane of standard normal noise `[1, h, w]`."""
    threshold = float(torch.special.ndtri(torch.tensor(1 - share / RAIN_LENGTH)))
    kernel = torch.zeros(1, 1, RAIN_LENGTH, RAIN_LENGTH)
    rows = torch.arange(RAIN_LENGTH)
    kernel[0, 0, rows, RAIN_LENGTH - 4 - rows // 3] = torch.linspace(0.4, 1.0, RAIN_LENGTH)
    drops = (noise > threshold).float()
    streaks = F.conv2d(drops[None], kernel, padding=RAIN_LENGTH // 2)[0].clamp(max=1)
    return blend((1 - dimmed) * x, torch.full_like(x, light), 0.6 * streaks)


def snowed(x: Tensor, noise: Tensor, amount: float) -> Tensor:
    """White flakes around the highest values of a plane of standard normal noise `[1, h, w]`, in cold light."""
    threshold = float(torch.special.ndtri(torch.tensor(1 - 0.08 * amount / 9)))
    flakes = gaussian(widest((noise > threshold).float(), 3, 3), 0.7)
    cold = saturation(x, 0.75) * colour(x, 0.95, 1.0, 1.06)
    return blend(blend(x, cold, amount), torch.ones_like(x), 0.95 * flakes)


def _sunset(scene: Scene) -> Pair:
    """Low orange light, strongest at the top of the picture, over darker ground."""
    height = 0.5 - 0.5 * scene.place[:1]  # 1 at the top
    glow = colour(scene.source, 1.0, 0.5, 0.25)
    warm = scene.source * colour(scene.source, 1.12, 0.84, 0.66) * (0.75 + 0.25 * height)
    return Pair(scene.source, blend(scene.source, blend(warm, glow.expand_as(warm), 0.45 * height), scene.strength))


def night(x: Tensor, amount: float) -> Tensor:
    """Little light, less colour, and the light is blue."""
    dark = saturation(x, 0.6) ** 1.5 * colour(x, 0.3, 0.38, 0.62)
    return blend(x, dark, amount)


def _dark(scene: Scene) -> Tensor:
    return night(scene.source, scene.uniform(0.85, 1.0))


def _wet(scene: Scene) -> Tensor:
    light = scene.uniform(0.75, 0.95)
    return rained(scene.source, scene.normal_like(scene.noise), scene.uniform(0.04, 0.1), light)


WEATHER = (
    Edit("fog", "weather", forward(lambda x, s: fogged(x, 0.5 * s)), opposite="dehaze", exact=True),
    Edit("dehaze", "weather", repair(lambda scene: fogged(scene.source, scene.uniform(0.35, 0.6))), "fog", limit=1.0),
    Edit(
        "rain",
        "weather",
        lambda scene: Pair(
            scene.source, rained(scene.source, scene.noise, 0.08 * scene.strength, 0.85, 0.1 * scene.strength)
        ),
        opposite="remove_rain",
    ),
    Edit("remove_rain", "weather", repair(_wet), opposite="rain", limit=1.0),
    Edit("snow", "weather", lambda scene: Pair(scene.source, snowed(scene.source, scene.noise, scene.strength))),
    Edit("sunset", "weather", _sunset, limit=1.2),
    Edit("night", "weather", forward(night), opposite="day", limit=1.2),
    Edit("day", "weather", repair(_dark), opposite="night", limit=1.0),
)
