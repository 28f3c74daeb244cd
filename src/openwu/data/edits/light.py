"""Light: exposure, contrast, shadows and highlights, vignettes."""

from __future__ import annotations

from torch import Tensor

from openwu.data.edits.core import Edit, Pair, Scene, forward, repair
from openwu.data.edits.operators import gaussian, luma


def _hdr(x: Tensor, strength: float) -> Tensor:
    """Local contrast up, large light and dark areas towards the middle."""
    wide = gaussian(x, 6.0)
    return x + strength * (0.6 * (x - wide) + 0.3 * (0.5 - luma(wide)))


def _lift_shadows(x: Tensor, strength: float) -> Tensor:
    return x + 1.5 * strength * x * (1 - x) ** 3


def _recover_highlights(x: Tensor, strength: float) -> Tensor:
    return x - 0.22 * strength * x**3


def corners(scene: Scene) -> Tensor:
    """How far towards the corners a pixel lies `[1, h, w]`: 0 in the middle, 1 in the corners."""
    radius = (scene.place.square().sum(0, keepdim=True) / 2).sqrt()
    return ((radius - 0.25) / 0.75).clamp(min=0) ** 1.5


def _vignette(scene: Scene) -> Pair:
    return Pair(scene.source, scene.source * (1 - 0.6 * scene.strength * corners(scene)))


def _remove_vignette(scene: Scene) -> Tensor:
    return scene.source * (1 - scene.uniform(0.45, 0.75) * corners(scene))


EDITS = (
    Edit("brighten", "light", forward(lambda x, s: x ** (1 / (1 + 0.7 * s))), opposite="darken", exact=True),
    Edit("darken", "light", forward(lambda x, s: x ** (1 + 0.7 * s)), opposite="brighten", exact=True),
    Edit("contrast_up", "light", forward(lambda x, s: 0.5 + (1 + 0.5 * s) * (x - 0.5)), "contrast_down", exact=True),
    Edit("contrast_down", "light", forward(lambda x, s: 0.5 + (1 - 0.45 * s) * (x - 0.5)), "contrast_up", exact=True),
    Edit("hdr", "light", forward(_hdr)),
    Edit("lift_shadows", "light", forward(_lift_shadows), opposite="recover_highlights", exact=True),
    Edit("recover_highlights", "light", forward(_recover_highlights), opposite="lift_shadows", exact=True),
    Edit("vignette", "light", _vignette, opposite="remove_vignette"),
    Edit("remove_vignette", "light", repair(_remove_vignette), opposite="vignette", limit=1.0),
)
