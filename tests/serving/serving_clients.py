"""What the tests of the service share."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

PROMPT = "make it brighter"


def png(width: int = 48, height: int = 40, seed: int = 0, format: str = "PNG") -> bytes:
    """A picture file of smooth noise."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()
