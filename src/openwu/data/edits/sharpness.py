"""Sharpness: blur of several kinds and its removal."""

from __future__ import annotations

from torch import Tensor

from openwu.data.edits.core import Edit, Pair, Scene, blend, forward, repair
from openwu.data.edits.operators import box, gaussian


def _moved(x: Tensor, strength: float) -> Tensor:
    return box(x, 1, 2 * round(6 * strength) + 1)


def _tilt_shift(scene: Scene) -> Pair:
    """A sharp band across the middle, the rest out of focus: the picture of a miniature."""
    away = ((scene.place[:1].abs() - 0.2) / 0.5).clamp(0, 1)
    return Pair(scene.source, blend(scene.source, gaussian(scene.source, 3.5), scene.strength * away))


EDITS = (
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
