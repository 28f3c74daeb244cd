"""Measures of edited clips: flicker on still pixels, warping error along the source's optical flow, PSNR over time.

Each compares an edited clip with its source, whose own noise is the floor of both errors. Frames are read one after
another, so that a clip of any length can be measured.

Shapes: frames `[3, h, w]` in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from openwu.errors import OpenwuError
from openwu.evaluation.metrics import as_8bit, psnr

STILL = 1.5 / 255
"""Pixels count as still where, after a small blur against noise, no channel changes by more."""
TRACKED = 12 / 255
"""Pixels count as tracked where the source's frame before, moved along the flow, is as near as this."""
RADIUS = 7
"""Radius of the optical flow's window in pixels."""


@dataclass(frozen=True)
class Motion:
    """What moves from a frame of the source to the next."""

    still: Tensor
    """`[h, w]` bool."""
    tracked: Tensor
    """`[h, w]` bool."""
    grid: Tensor
    """Where each pixel was in the frame before, `[1, h, w, 2]` from -1 to 1."""


@dataclass(frozen=True)
class ClipScores:
    """Measures of a clip; the errors are of 255 values."""

    flicker: float
    """Mean absolute change from frame to frame where the source stands still."""
    warping: float
    """Root mean square change along the motion of the source, where it can be followed."""
    psnr: float | None
    """dB of the frames to their targets; None without targets."""
    change_psnr: float | None
    """dB of the changes from frame to frame to those of the targets."""


def motions(source: Iterable[Tensor]) -> Iterator[Motion]:
    """Yield the motion of every frame after the first. Needs `pip install 'openwu[evaluate]'`."""
    from skimage.registration import optical_flow_ilk  # slow to import

    for before, after in pairwise(source):
        _, height, width = after.shape
        flow: NDArray[np.float32] = optical_flow_ilk(_grey(after), _grey(before), radius=RADIUS)
        rows, columns = (torch.arange(side, dtype=torch.float32) for side in (height, width))
        y = (rows[:, None] + torch.from_numpy(flow[0])) * 2 / max(height - 1, 1) - 1
        x = (columns[None] + torch.from_numpy(flow[1])) * 2 / max(width - 1, 1) - 1
        grid = torch.stack([x, y], dim=-1)[None].float()
        inside = (grid.abs() <= 1).all(-1)[0]
        near = (_blurred(warped(before, grid)) - _blurred(after)).abs().amax(0) <= TRACKED
        still = (_blurred(before) - _blurred(after)).abs().amax(0) <= STILL
        yield Motion(still, inside & near, grid)


def warped(before: Tensor, grid: Tensor) -> Tensor:
    """Return a frame moved to where its pixels are in the next."""
    return F.grid_sample(before[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=True)[0]


def measure(moved: Iterable[Motion], edited: Iterable[Tensor], targets: Iterable[Tensor] | None = None) -> ClipScores:
    """Measure an edited clip of at least two frames. `moved`: of its source. `targets`: the wanted frames.

    Raises OpenwuError for clips of different lengths or sizes, and where the source has no still or no tracked pixel.
    """
    flickers, warps, frames_psnr, changes_psnr = Sum(), Sum(), Sum(), Sum()
    wanted = None if targets is None else pairwise(as_8bit(each) for each in targets)
    pairs = pairwise(as_8bit(each) for each in edited)
    for count, motion in enumerate(moved):
        before, after = _next(pairs, count, motion)
        flickers.add((after - before).abs()[:, motion.still])
        warps.add((after - warped(before, motion.grid)).square()[:, motion.tracked])
        if wanted is not None:
            target_before, target = _next(wanted, count, motion)
            if not count:
                frames_psnr.add(psnr(before, target_before)[None])
            frames_psnr.add(psnr(after, target)[None])
            error = ((after - before) - (target - target_before)).square().mean()
            changes_psnr.add(-10 * torch.log10(error.clamp(min=1e-10))[None])
    if not flickers.count or not warps.count:
        raise OpenwuError("clip: expected still and tracked pixels between frames, found none; measure another clip")
    return ClipScores(
        255 * flickers.mean,
        255 * warps.mean**0.5,
        frames_psnr.mean if wanted is not None else None,
        changes_psnr.mean if wanted is not None else None,
    )


@dataclass
class Sum:
    """A mean that is added to."""

    total: float = 0.0
    count: int = 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def mean(self) -> float:
        return self.total / self.count


def _next(pairs: Iterator[tuple[Tensor, Tensor]], number: int, motion: Motion) -> tuple[Tensor, Tensor]:
    found = next(pairs, None)
    if found is None:
        raise OpenwuError(f"clip: expected as many frames as the source, got {number + 1}; pass whole clips")
    if found[1].shape[1:] != motion.still.shape:
        raise OpenwuError(
            f"clip: expected frames of {tuple(motion.still.shape)} as the source's, got {tuple(found[1].shape[1:])}"
        )
    return found


def _grey(frame: Tensor) -> NDArray[np.float32]:
    grey: NDArray[np.float32] = frame.float().mean(0).numpy()
    return grey


def _blurred(frame: Tensor) -> Tensor:
    return F.avg_pool2d(frame.float(), 5, stride=1, padding=2, count_include_pad=False)
