"""What the tests of the edit suite share: how a pair is made from pictures alone, and which edits are of which kind."""

from __future__ import annotations

import torch
from torch import Tensor

from openwu.data.suite import EDITS, NORMAL, Pair, Scene

REPAIRS = (
    "remove_vignette",
    "white_balance",
    "deblur",
    "remove_motion_blur",
    "denoise",
    "remove_jpeg",
    "remove_salt_pepper",
    "restore",
    "remove_scratches",
    "unfade",
    "dehaze",
    "remove_rain",
    "day",
)
"""Their input is a damaged photograph, their target the photograph."""

FROM_NOISE = ("add_noise", "salt_pepper", "age", "scratches", "rain", "snow", "take_grain")
"""Their target is a function of the noise that the base sees."""

REFERENCES = tuple(name for name, edit in EDITS.items() if edit.needs_reference)


def plane(height: int, width: int, seed: int = 0) -> Tensor:
    """A plane of noise `[1, h, w]`."""
    return torch.randn(1, height, width, generator=torch.Generator().manual_seed(1000 + seed))


def make(
    name: str,
    source: Tensor,
    second: Tensor | None = None,
    *,
    seed: int = 0,
    strength: float = NORMAL,
    noise: Tensor | None = None,
) -> Pair:
    """The pair of one edit; the second picture of a reference edit is the source in other colours, or the one given."""
    edit = EDITS[name]
    noise = plane(*source.shape[1:]) if noise is None else noise
    second = source.flip(0) if second is None and edit.needs_reference else second
    return edit.make_pair(Scene(source, noise, torch.Generator().manual_seed(seed), strength, second))


def apart(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference."""
    return float((one - other).abs().mean())
