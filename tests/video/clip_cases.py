"""Make clips with the program itself, and read them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("imageio_ffmpeg")

from openwu.video.frames import frames
from openwu.video.probe import probe, survey
from openwu.video.program import run

SLOPES = "gradients=c0=0xC04020:c1=0x2060D0:nb_colors=2:seed=1:speed=0.02"
"""Smooth colours that move: little is lost to H.264."""
PICTURES = ("-f", "lavfi", "-i", f"{SLOPES}:size=32x24:rate=25:duration=0.4")
SOUND = ("-f", "lavfi", "-i", "sine=duration=0.4:sample_rate=16000")


def make(path: Path, *arguments: str) -> Path:
    """A file of what the program writes with these arguments."""
    finished = run(["-y", *arguments, "-fflags", "+bitexact", str(path)])
    assert not finished.code, finished.messages
    return path


def clip(path: Path, *more: str, sound: bool = False) -> Path:
    """Ten frames of 32 x 24 in H.264; `more`: options of the output."""
    inputs = [*PICTURES, *(SOUND if sound else ())]
    return make(path, *inputs, "-pix_fmt", "yuv420p", *more)


def pictures(path: Path) -> NDArray[np.uint8]:
    """All frames `[n, h, w, 3]`."""
    found = probe(path)
    return np.stack([photo.pixels for photo in frames(found, survey(found))])


def times(path: Path) -> list[float]:
    """When every frame is shown, in seconds."""
    found = survey(probe(path))
    return [round(float(stamp * found.base), 4) for stamp in found.stamps]
