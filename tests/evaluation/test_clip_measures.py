"""Flicker and warping error know a steady edit from one that flickers, and motion from change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from openwu.errors import OpenwuError
from openwu.evaluation.experiments.probes.video import make_clips
from openwu.evaluation.judges.clips import measure, motions

Scene = Callable[..., NDArray[np.uint8]]


@pytest.fixture
def crossing(scene: Scene) -> list[Tensor]:
    photographs = {str(i): torch.from_numpy(scene(72, 56, i)).permute(2, 0, 1) / 255 for i in range(3)}
    return make_clips(photographs, 3, 0)["crossing"]


def test_a_steady_edit_does_not_flicker_and_one_that_changes_does(crossing: list[Tensor]) -> None:
    moved = list(motions(crossing))
    assert 0.2 < moved[0].still.float().mean() < 0.95
    source = measure(moved, crossing)
    steady = measure(moved, [1 - frame for frame in crossing], [1 - frame for frame in crossing])
    unsteady = measure(moved, [(frame + 0.05 * (i % 2)).clamp(0, 1) for i, frame in enumerate(crossing)])
    assert source.flicker < 3
    assert steady.flicker == pytest.approx(source.flicker, abs=0.05)
    assert steady.warping == pytest.approx(source.warping, rel=0.05)
    assert unsteady.flicker > source.flicker + 8
    assert unsteady.warping > source.warping + 8
    assert steady.psnr == pytest.approx(100, abs=1)
    assert unsteady.psnr is None


def test_motion_is_followed(scene: Scene) -> None:
    """A picture that moves by two pixels has no warping error worth the name, and a large one without the flow."""
    wide = torch.from_numpy(scene(80, 56)).permute(2, 0, 1).float() / 255
    wide = torch.nn.functional.avg_pool2d(wide[None], 5, 1, 2)[0]
    frames = [wide[:, :, i : i + 64] for i in (0, 2, 4)]
    scores = measure(motions(frames), frames)
    still = 255 * float((frames[1] - frames[0]).square().mean()) ** 0.5
    assert scores.warping < 0.5 * still


def test_clips_that_do_not_belong_together_are_refused(crossing: list[Tensor]) -> None:
    with pytest.raises(OpenwuError, match="as many frames"):
        measure(motions(crossing), crossing[:2])
    with pytest.raises(OpenwuError, match="expected frames of"):
        measure(motions(crossing), [frame[:, :-2] for frame in crossing])
    with pytest.raises(OpenwuError, match="found none"):
        measure(motions(crossing[:1]), crossing[:1])
