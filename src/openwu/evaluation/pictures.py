"""Pictures of evaluations: grids of cells with titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

LABEL, HEAD = 130, 18
"""Pixels for the names of rows, and of columns."""


def grid(rows: Mapping[str, Sequence[Tensor]], titles: Sequence[str]) -> Image.Image:
    """Draw a row per name with a cell `[3, h, w]` per title, as wide as the largest cell; missing cells stay white."""
    height, side = (max(cell.shape[axis] for cells in rows.values() for cell in cells) for axis in (-2, -1))
    sheet = Image.new("RGB", (LABEL + len(titles) * side, HEAD + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((LABEL + column * side + 4, 3), title, fill="black")
    for row, (name, cells) in enumerate(rows.items()):
        draw.text((4, HEAD + row * height + height // 2 - 6), name.replace(" + ", " +\n"), fill="black")
        for column, cell in enumerate(cells):
            sheet.paste(to_image(cell), (LABEL + column * side, HEAD + row * height))
    return sheet


def to_image(cell: Tensor) -> Image.Image:
    """Convert `[3, h, w]` in 0..1 to an 8-bit picture."""
    pixels = (cell.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def middle(x: Tensor, side: int) -> Tensor:
    """Crop the square of this side from the middle of `[3, h, w]`."""
    top, left = ((length - side) // 2 for length in x.shape[-2:])
    return x[:, max(0, top) : max(0, top) + side, max(0, left) : max(0, left) + side]
