"""Noise: grain, compression artefacts, single bad pixels, and their removal."""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.data.edits.core import Edit, Pair, Scene, repair
from openwu.data.edits.operators import jpeg

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


EDITS = (
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
