"""Damage as cameras and files do it, for the training pairs of repairs; the suite's own damage is simpler.

Noise arises on the sensor, in linear light and in the sensor's own colours: its variance is `shot * light + read`
(Foi et al. 2008), and both numbers span what darktable's profiles of 374 cameras have from ISO 100 to 51200.
Demosaicing, the camera's colour matrix, the sRGB curve and, in half of the pictures, the camera's own noise reduction
make of it what a file has: strongest in shadows, shared by neighbours, coarser in colour than in brightness. Blur is
that of a lens out of focus or of a shake at any angle, with noise on it; JPEG files have quality 10 to 50, some were
saved twice, and one in three is a WebP file. All ranges begin where hardly anything is damaged, so that a repair
leaves alone what is fine.

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
from openwu.data.suite.operators import encoded_light, gaussian, jpeg, linear_light, luma, mirrored, webp

SHOT = (4e-6, 6e-3)
"""Lowest and highest variance of a sensor's noise per light, in green: darktable's profiles have 1.2e-6 to 1.5e-3; what
was underexposed by two stops and lightened has four times as much."""
READ = (5e-4, 2e-2)
"""Variance without light, as a share of that."""
BALANCE = (2.1, 1.0, 1.85)
"""How much more red and blue vary than green, as they are amplified for white to be white; medians of the profiles."""
MATRIX = ((1.7, -0.6, -0.1), (-0.2, 1.5, -0.3), (0.0, -0.5, 1.5))
"""From a sensor's red, green and blue to those of a picture; white stays white. A typical one."""


def sensor_noise(x: Tensor, scene: Scene, most: float = 1.0) -> Tensor:
    """Take a photograph `[3, h, w]` at any sensitivity; `most`: the highest variance, as a share of SHOT's."""
    low, high = SHOT
    shot = low * (most * high / low) ** scene.uniform(0, 1)
    read = shot * READ[0] * (READ[1] / READ[0]) ** scene.uniform(0, 1)
    matrix = x.new_tensor(MATRIX)
    light = _mixed(torch.linalg.inv(matrix), linear_light(x.clamp(0, 1)))
    scale = ((shot * light.clamp(min=0) + read) * x.new_tensor(BALANCE)[:, None, None]).sqrt()
    fine, coarse = scene.uniform(0.3, 0.5), scene.uniform(0.4, 0.8)  # three neighbours give red and blue, one green
    drawn = scale * scene.normal_like(x)
    noise = torch.cat([gaussian(drawn[:1], coarse), gaussian(drawn[1:2], fine), gaussian(drawn[2:], coarse)])
    change = encoded_light(_mixed(matrix, light + noise)) - encoded_light(_mixed(matrix, light))
    if scene.uniform(0, 1) < 0.5:  # the camera's own noise reduction
        grey = luma(change)
        smoothed = gaussian(change - grey, scene.uniform(0.6, 2.0))
        change = scene.uniform(0.4, 1.0) * gaussian(grey, scene.uniform(0.3, 0.7)) + smoothed
    return x + change


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", matrix, x)


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


def _coded(scene: Scene) -> Tensor:
    if scene.uniform(0, 1) < 1 / 3:
        return webp(scene.source, round(scene.uniform(2, 50)))
    return saved(scene.source, scene, 10, 50)


def _noisy(scene: Scene) -> Tensor:
    x = sensor_noise(scene.source, scene)
    return saved(x, scene, 60, 95) if scene.uniform(0, 1) < 0.5 else x


def _old(scene: Scene) -> Tensor:
    chroma, contrast, grain = scene.uniform(0.3, 0.7), scene.uniform(0.5, 0.8), scene.uniform(0.02, 0.08)
    noise = _correlated(scene.normal_like(scene.noise), scene.uniform(0.4, 1.2))
    return saved(aged(scene.source, noise, chroma, contrast, grain), scene, 30, 90)


DAMAGE: Mapping[str, Callable[[Scene], Tensor]] = {
    "denoise": _noisy,
    "deblur": lambda scene: sensor_noise(out_of_focus(scene.source, scene.uniform(0.6, 3.5)), scene, most=0.1),
    "remove_motion_blur": lambda scene: sensor_noise(
        shaken(scene.source, scene.uniform(2, 12), scene.uniform(0, math.pi)), scene, most=0.1
    ),
    "remove_jpeg": _coded,
    "restore": _old,
}
"""Repair -> the damage that it takes away."""
REPAIRS: Mapping[str, Edit] = {
    edit.name: replace(edit, make=repair(DAMAGE[edit.name]))
    for edit in (*SHARPNESS, *NOISE, *AGE)
    if edit.name in DAMAGE
}
"""The suite's repairs with this damage."""
