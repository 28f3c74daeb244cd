"""The lab edits clips by one adapter, by one for each frame and with new noise, and tells them apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from openwu.editor.editor import Editor
from openwu.evaluation.experiments.probes.video import CHOSEN, EACH, NOISE, ONE, SOURCE, TARGET, make_clips, video
from openwu.training.embedded.model import EmbeddedModel


def test_every_method_is_measured_on_every_clip(editor: Editor, scene: Callable[..., NDArray[np.uint8]]) -> None:
    photographs = {str(i): torch.from_numpy(scene(48, 40, i)).permute(2, 0, 1) / 255 for i in range(3)}
    clips = make_clips(photographs, 3, 0)
    assert {name: [tuple(frame.shape) for frame in frames] for name, frames in clips.items()} == {
        "crossing": [(3, 40, 48)] * 3,
        "panning": [(3, 40, 48)] * 3,
    }
    found = video(editor, {"crossing": clips["crossing"]}, ("brighten",), 0)
    assert set(found.scores["brighten"]) == {SOURCE, TARGET, ONE, EACH, NOISE}
    assert found.mean("brighten", SOURCE, "psnr") is None
    assert found.mean("brighten", TARGET, "psnr") is None
    one, noise = (found.mean("brighten", method, "flicker") for method in (ONE, NOISE))
    assert one is not None
    assert noise is not None
    assert one < noise  # the untrained base reads its noise plane
    assert "brighten" in found.table()
    assert found.to_json()["scores"]["brighten"][ONE][0]["flicker"] == one


def test_the_package_offers_every_edit_of_the_experiment() -> None:
    config = EmbeddedModel.from_pretrained().config.instruction
    assert set(CHOSEN) <= set(config.labels) - set(config.withdrawn)
