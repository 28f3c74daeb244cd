"""Detail: sharpness, noise and their repair, and the ageing of photographs."""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.data.suite.core import Edit, Pair, Scene, blend, forward, repair
from openwu.data.suite.operators import box, colour, gaussian, jpeg, saturation, widest


def _moved(x: Tensor, strength: float) -> Tensor:
    return box(x, 1, 2 * round(6 * strength) + 1)


def _tilt_shift(scene: Scene) -> Pair:
    """A sharp band across the middle, the rest out of focus: the picture of a miniature."""
    away = ((scene.place[:1].abs() - 0.2) / 0.5).clamp(0, 1)
    return Pair(scene.source, blend(scene.source, gaussian(scene.source, 3.5), scene.strength * away))


SHARPNESS = (
    Edit("blur", "sharpness", forward(lambda x, s: gaussian(x, 2.5 * s)), opposite="deblur"),
    Edit(
        "deblur",
        "sharpness",
        repair(lambda scene: gaussian(scene.source, scene.uniform(1.0, 2.0))),
        opposite="blur",
        limit=1.0,
    ),
    Edit("motion_blur", "sharpness", forward(_moved), opposite="remove_motion_blur"),
    Edit(
        "remove_motion_blur",
        "sharpness",
        repair(lambda scene: box(scene.source, 1, 2 * round(scene.uniform(2, 5)) + 1)),
        opposite="motion_blur",
        limit=1.0,
    ),
    Edit("sharpen", "sharpness", forward(lambda x, s: x + 1.2 * s * (x - gaussian(x, 1.2))), opposite="soften"),
    Edit("soften", "sharpness", forward(lambda x, s: blend(x, gaussian(x, 1.6), 0.65 * s)), opposite="sharpen"),
    Edit("tilt_shift", "sharpness", _tilt_shift, limit=1.0),
)


STRONG_QUALITY = 5


def _grain(scene: Scene) -> Pair:
    return Pair(scene.source, scene.source + 0.1 * scene.strength * scene.noise)


def _noisy(scene: Scene) -> Tensor:
    return scene.source + scene.uniform(0.05, 0.15) * scene.normal_like(scene.source)


def _add_jpeg(scene: Scene) -> Pair:
    quality = max(STRONG_QUALITY, round(10 / scene.strength**1.5))
    return Pair(scene.source, jpeg(scene.source, quality))


def specks(x: Tensor, noise: Tensor, share: float) -> Tensor:
    """This share of the pixels white or black, by a plane of standard normal noise `[1, h, w]`."""
    threshold = float(torch.special.ndtri(torch.tensor(1 - share / 2)))
    return torch.where(noise > threshold, 1.0, torch.where(noise < -threshold, 0.0, x))


def _speckled(scene: Scene) -> Tensor:
    return specks(scene.source, scene.normal_like(scene.noise), scene.uniform(0.02, 0.08))


NOISE = (
    Edit("add_noise", "noise", _grain, opposite="denoise"),
    Edit("denoise", "noise", repair(_noisy), opposite="add_noise", limit=1.0),
    Edit("add_jpeg", "noise", _add_jpeg, opposite="remove_jpeg"),
    Edit(
        "remove_jpeg",
        "noise",
        repair(lambda scene: jpeg(scene.source, round(scene.uniform(8, 30)))),
        opposite="add_jpeg",
        limit=1.0,
    ),
    Edit(
        "salt_pepper",
        "noise",
        lambda scene: Pair(scene.source, specks(scene.source, scene.noise, 0.05 * scene.strength)),
        opposite="remove_salt_pepper",
    ),
    Edit("remove_salt_pepper", "noise", repair(_speckled), opposite="salt_pepper", limit=1.0),
)


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


AGE = (
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
