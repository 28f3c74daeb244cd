"""Damage as cameras and files do it, for the training pairs of repairs; the suite's own damage is simpler.

Noise depends on the light (Foi et al. 2008), is correlated by demosaicing, coarser in colour than in brightness, and up
to what high ISO leaves; blur is that of a lens out of focus or of a shake at any angle, with noise on it; JPEG files
have quality 10 to 30, some were saved twice. The ranges are after such models, not measured on one camera.

Shapes: h and w the sides of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from openwu.data.suite.core import Edit, Scene, repair
from openwu.data.suite.detail import AGE, NOISE, SHARPNESS, aged
from openwu.data.suite.operators import gaussian, jpeg, mirrored

SHOT, READ = (4e-4, 2e-2), (1e-5, 2e-3)
"""Lowest and highest variance of noise per light, and of noise without light, of 1."""


def sensor_noise(x: Tensor, scene: Scene, most: float = 1.0) -> Tensor:
    """Add the noise of a sensor to `[3, h, w]`; `most`: its highest variances, as shares of SHOT's and READ's."""
    shot, read = (low * (most * high / low) ** scene.uniform(0, 1) for low, high in (SHOT, READ))
    scale = (shot * x.clamp(0, 1) + read).sqrt()
    grey = _correlated(scene.normal_like(x[:1]), scene.uniform(0.35, 0.8))
    colours = _correlated(scene.normal_like(x), scene.uniform(0.6, 2.0))
    noisy: Tensor = x + scale * (0.8 * grey + scene.uniform(0.2, 0.9) * (colours - colours.mean(0, keepdim=True)))
    return noisy


def _correlated(noise: Tensor, sigma: float) -> Tensor:
    """Noise `[c, h, w]` that neighbours share, of the variance that it had."""
    blurred = gaussian(noise, sigma)
    return blurred / blurred.std().clamp(min=1e-6)


def out_of_focus(x: Tensor, radius: float) -> Tensor:
    """Blur `[3, h, w]` by the disc of a lens, with a soft edge."""
    reach = math.ceil(radius)
    line = torch.arange(-reach, reach + 1, dtype=x.dtype)
    away = (line[:, None].square() + line.square()).sqrt()
    return _convolved(x, (radius + 0.5 - away).clamp(0, 1))


def shaken(x: Tensor, length: float, angle: float) -> Tensor:
    """Blur `[3, h, w]` along a line at an angle."""
    reach = math.ceil(length / 2)
    line = torch.arange(-reach, reach + 1, dtype=x.dtype)
    y, across = line[:, None].expand(len(line), -1), line.expand(len(line), -1)
    along = across * math.cos(angle) + y * math.sin(angle)
    beside = y * math.cos(angle) - across * math.sin(angle)
    return _convolved(x, (length / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - beside.abs()).clamp(0, 1))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel with an odd square, mirrored at the borders."""
    reach = len(kernel) // 2
    return F.conv2d(mirrored(x, reach, reach)[:, None], (kernel / kernel.sum())[None, None])[:, 0]


def saved(x: Tensor, scene: Scene, low: float, high: float) -> Tensor:
    """Save as a JPEG of a quality in this range; one in three was saved before, on another grid of blocks."""
    if scene.uniform(0, 1) < 1 / 3:
        x = jpeg(x.roll((-4, -4), (1, 2)), round(scene.uniform(low, 90))).roll((4, 4), (1, 2))
    return jpeg(x, round(scene.uniform(low, high)))


def _noisy(scene: Scene) -> Tensor:
    x = sensor_noise(scene.source, scene)
    return saved(x, scene, 60, 95) if scene.uniform(0, 1) < 0.5 else x


def _old(scene: Scene) -> Tensor:
    chroma, contrast, grain = scene.uniform(0.3, 0.7), scene.uniform(0.5, 0.8), scene.uniform(0.02, 0.08)
    noise = _correlated(scene.normal_like(scene.noise), scene.uniform(0.4, 1.2))
    return saved(aged(scene.source, noise, chroma, contrast, grain), scene, 30, 90)


DAMAGE: Mapping[str, Callable[[Scene], Tensor]] = {
    "denoise": _noisy,
    "deblur": lambda scene: sensor_noise(out_of_focus(scene.source, scene.uniform(1.0, 3.5)), scene, most=0.02),
    "remove_motion_blur": lambda scene: sensor_noise(
        shaken(scene.source, scene.uniform(3, 12), scene.uniform(0, math.pi)), scene, most=0.02
    ),
    "remove_jpeg": lambda scene: saved(scene.source, scene, 10, 30),
    "restore": _old,
}
"""Repair -> the damage that it takes away."""
REPAIRS: Mapping[str, Edit] = {
    edit.name: replace(edit, make=repair(DAMAGE[edit.name]))
    for edit in (*SHARPNESS, *NOISE, *AGE)
    if edit.name in DAMAGE
}
"""The suite's repairs with this damage."""
