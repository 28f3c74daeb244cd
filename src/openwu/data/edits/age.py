"""Age: what years do to a photograph, and its repair."""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.data.edits.core import Edit, Pair, Scene, blend, forward, repair
from openwu.data.edits.operators import colour, gaussian, saturation, widest

SCRATCH = 9
"""Rows of an added scratch: the pixel path of the base sees four rows up and down, and must find where one begins."""


def aged(x: Tensor, noise: Tensor, chroma: float, contrast: float, grain: float) -> Tensor:
    """Faded dyes, yellowed paper, lost contrast, a soft lens and film grain."""
    x = saturation(gaussian(x, 0.8), chroma)
    x = 0.5 + contrast * (x - 0.45) + grain * noise
    return (x * colour(x, 1.06, 0.97, 0.78)).clamp(0, 1)


def faded(x: Tensor, amount: float) -> Tensor:
    """Bleached by the sun: blacks become grey and warm, colours pale."""
    return blend(saturation(x, 1 - 0.5 * amount), colour(x, 0.85, 0.8, 0.72).expand_as(x), 0.4 * amount)


def scratched(x: Tensor, noise: Tensor, share: float, length: int, light: float) -> Tensor:
    """Upright scratches from the highest values of a plane of standard normal noise `[1, h, w]`."""
    threshold = float(torch.special.ndtri(torch.tensor(1 - share / length)))
    return blend(x, torch.full_like(x, light), 0.85 * widest((noise > threshold).float(), length, 1))


def _age(scene: Scene) -> Pair:
    old = aged(scene.source, scene.noise, chroma=0.5, contrast=0.65, grain=0.05)
    return Pair(scene.source, blend(scene.source, old, scene.strength))


def _old(scene: Scene) -> Tensor:
    chroma, contrast, grain = scene.uniform(0.4, 0.6), scene.uniform(0.55, 0.75), scene.uniform(0.03, 0.07)
    return aged(scene.source, scene.normal_like(scene.noise), chroma, contrast, grain)


def _worn(scene: Scene) -> Tensor:
    length = 2 * round(scene.uniform(8, 16)) + 1
    light = scene.uniform(0.8, 1.0)
    return scratched(scene.source, scene.normal_like(scene.noise), scene.uniform(0.01, 0.03), length, light)


EDITS = (
    Edit("age", "age", _age, opposite="restore", limit=1.0),
    Edit("restore", "age", repair(_old), opposite="age", limit=1.0),
    Edit(
        "scratches",
        "age",
        lambda scene: Pair(scene.source, scratched(scene.source, scene.noise, 0.02 * scene.strength, SCRATCH, 0.95)),
        opposite="remove_scratches",
    ),
    Edit("remove_scratches", "age", repair(_worn), opposite="scratches", limit=1.0),
    Edit("fade", "age", forward(faded), opposite="unfade", exact=True),
    Edit("unfade", "age", repair(lambda scene: faded(scene.source, scene.uniform(0.8, 1.3))), "fade", limit=1.0),
)
