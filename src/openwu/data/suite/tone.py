"""Tone and colour: light, contrast, temperature, saturation, hues, tints, white balance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from openwu.data.suite.core import Edit, Pair, Scene, forward, repair, whole
from openwu.data.suite.operators import colour, gaussian, luma, saturation


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


LIGHT = (
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


def _gains(red: float, green: float, blue: float) -> Callable[[Tensor, float], Tensor]:
    return lambda x, strength: x * (1 + strength * (colour(x, red, green, blue) - 1))


def sepia(x: Tensor) -> Tensor:
    return luma(x) * colour(x, 1.08, 0.86, 0.64) + 0.02


def rotate_hues(x: Tensor, degrees: float) -> Tensor:
    """Rotate every colour about the grey axis: red towards green towards blue."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)) / math.sqrt(3)
    keep, spread = (1 + 2 * cosine) / 3, (1 - cosine) / 3
    rotation = x.new_tensor(
        [
            [keep, spread - sine, spread + sine],
            [spread + sine, keep, spread - sine],
            [spread - sine, spread + sine, keep],
        ]
    )
    return torch.einsum("ij,jhw->ihw", rotation, x)


def _tint(red: float, green: float, blue: float) -> Callable[[Tensor, float], Tensor]:
    """Towards one colour: shadows take it up, lights stay light."""

    def change(x: Tensor, strength: float) -> Tensor:
        return x + 0.6 * strength * (luma(x) * colour(x, red, green, blue) - x)

    return change


def _cast(scene: Scene) -> Tensor:
    """A photograph under the wrong light: every channel has a gain of its own, the mean stays."""
    amount = torch.exp(torch.tensor([scene.uniform(-0.3, 0.3) for _ in range(3)]))
    return scene.source * (amount / amount.mean()).view(3, 1, 1)


def _colourise(scene: Scene) -> Pair:
    grey = luma(scene.source).expand_as(scene.source)
    return Pair(grey, grey + scene.strength * (scene.source - grey))


COLOUR = (
    Edit("warm", "colour", forward(_gains(1.16, 1.0, 0.74)), opposite="cool", exact=True),
    Edit("cool", "colour", forward(_gains(0.76, 0.98, 1.18)), opposite="warm", exact=True),
    Edit("saturate", "colour", forward(lambda x, s: saturation(x, 1 + 0.7 * s)), "desaturate", exact=True),
    Edit("desaturate", "colour", forward(lambda x, s: saturation(x, 1 - 0.65 * s)), "saturate", exact=True),
    Edit("black_and_white", "colour", forward(lambda x, s: saturation(x, 1 - s)), "colourise", limit=1.0, exact=True),
    Edit("sepia", "colour", whole(sepia), limit=1.0, exact=True),
    Edit("colourise", "colour", _colourise, opposite="black_and_white", limit=1.0, natural=True),
    Edit("invert", "colour", whole(lambda x: 1 - x), graded=False, exact=True),
    Edit("hue_shift", "colour", forward(lambda x, s: rotate_hues(x, 100 * s)), exact=True),
    Edit("tint_red", "colour", forward(_tint(1.5, 0.6, 0.6)), opposite="tint_blue", exact=True),
    Edit("tint_green", "colour", forward(_tint(0.6, 1.4, 0.6)), opposite="tint_purple", exact=True),
    Edit("tint_blue", "colour", forward(_tint(0.5, 0.8, 1.7)), opposite="tint_red", exact=True),
    Edit("tint_purple", "colour", forward(_tint(1.3, 0.6, 1.5)), opposite="tint_green", exact=True),
    Edit("white_balance", "colour", repair(_cast), limit=1.0, natural=True),
)
